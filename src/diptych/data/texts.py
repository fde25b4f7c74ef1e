"""Which text of a sample is used, and sources whose texts are changed: more of them, or shuffled for a study of noise."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from diptych.data.sources import AbstractSource
from diptych.errors import ConfigError, DataError
from diptych.types import Role, Sample, Text


def choose_text(texts: Sequence[Text], place: int, *, min_words: int = 1, count_spaces: bool = False) -> Text:
    """Return text number `place`, or the first one, the original, when that has too few words.

    Args:
        texts: The original, then its rewrites.
        place: Drawn by the caller, uniformly in most uses.
        min_words: Fewest words of a text that is not the original; 2 in LaCLIP, whose rewrites of one word are failures.
        count_spaces: Count the pieces between single spaces, as the official code does: ` taxi` has two of them.

    Source: Fan et al. 2023, official code, `data.py`.
    """
    words = texts[place].text.split(" " if count_spaces else None)
    return texts[0] if len(words) < min_words else texts[place]


class WithTexts(AbstractSource):
    """Another source with more texts per sample."""

    def __init__(self, source: AbstractSource, texts: Sequence[Sequence[Text]]) -> None:
        """Make the source.

        Args:
            source: Stays as it is.
            texts: What is added to each sample, behind its own texts.

        Raises:
            DataError: If there are not as many entries as samples.
        """
        if len(texts) != len(source):
            raise DataError(
                f"{source.name} has {len(source)} samples; texts came for {len(texts)}. Give one entry each."
            )
        self.source, self.added = source, [tuple(more) for more in texts]
        self.name, self.notes, self.chances = source.name, source.notes, source.chances
        self.order, self.run_length = source.order, source.run_length

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return replace(self.source[index], texts=self.texts(index))

    def texts(self, index: int) -> tuple[Text, ...]:
        """Return the texts of one sample, the added ones last."""
        return (*self.source.texts(index), *self.added[index])


class ShuffledTexts(AbstractSource):
    """Another source, in which a share of the samples have each other's texts. Images, keys and groups stay where they are.

    Attributes:
        taken_from: For each sample, whose texts it has; its own index where nothing was changed.
    """

    def __init__(
        self, source: AbstractSource, share: float, *, seed: int = 0, roles: Sequence[Role] = ("caption",)
    ) -> None:
        """Make the source.

        Args:
            source: Stays as it is.
            share: Of the samples, in [0, 1]; none of these keeps its own texts. Equal seeds choose equal samples, and a larger
                share chooses those of a smaller one and more.
            seed: Of the choice.
            roles: Texts of other roles stay where they are.

        Raises:
            ConfigError: If the share is out of range.
        """
        if not 0 <= share <= 1:
            raise ConfigError(f"A share of samples lies between 0 and 1, not at {share}.")
        self.source, self.roles = source, tuple(roles)
        self.name, self.notes, self.chances = source.name, source.notes, source.chances
        self.order, self.run_length = source.order, source.run_length
        self.taken_from = list(range(len(source)))
        chosen = np.random.default_rng([seed, len(source)]).permutation(len(source))[: round(share * len(source))]
        if len(chosen) > 1:  # one alone has nobody to change with
            for index, other in zip(chosen.tolist(), np.roll(chosen, 1).tolist(), strict=True):
                self.taken_from[index] = other

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return replace(self.source[index], texts=self.texts(index))

    def texts(self, index: int) -> tuple[Text, ...]:
        """Return the texts of one sample: those of the roles that are shuffled first."""
        shuffled = (text for text in self.source.texts(self.taken_from[index]) if text.role in self.roles)
        own = (text for text in self.source.texts(index) if text.role not in self.roles)
        return (*shuffled, *own)

    @property
    def moved(self) -> list[bool]:
        """Return which samples have the texts of another one."""
        return [index != other for index, other in enumerate(self.taken_from)]
