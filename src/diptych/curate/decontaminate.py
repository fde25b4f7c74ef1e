"""Pairs that are in an evaluation set, and would make its numbers too good: the same image, an image near it, or a long piece of its captions.

Images are compared by a hash of their pixels, which says that an image is exactly the same, and as in `perceptual.py`. Captions are compared by
runs of words, word for word after folding.

Source: runs of 13 words: Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C; captions are shorter, hence 8 here.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
from PIL import Image

from diptych.curate.minhash import folded_words
from diptych.curate.perceptual import Looks, looking_alike, mean_colour, perceptual_hash
from diptych.curate.pictures import images_of_rows, look, with_faults
from diptych.curate.reasons import kept, with_column, with_reason
from diptych.data.images import decode
from diptych.data.sources import AbstractSource, open_source
from diptych.errors import ConfigError, ImageError
from diptych.verbs import AbstractCurator

SAME_IMAGE, NEAR_IMAGE, SAME_WORDS = (
    "image of an evaluation set",
    "image near one of an evaluation set",
    "words of an evaluation set",
)
"""Reasons, in the order in which they are looked for. The column `leak` names the set and its sample."""


@dataclass(frozen=True)
class DecontaminationConfig:
    """What must not be trained on.

    Attributes:
        on: Whether the step is taken.
        sources: Evaluation sets, as `open_source` takes them: `flickr8k-1k:dev`, a folder, a table.
        images: Whether images are compared, and rows without one are dropped; otherwise none is read.
        bits: At how many of 64 bits hashes differ at most, 0 to 16; more than for duplicates, since a leak costs more than a lost pair.
        colour: By how much each mean colour differs at most, 0 to 255.
        words: Length of the runs of words that count; None for none. Captions of fewer words are not compared: `a dog` proves nothing.
    """

    on: bool = False
    sources: tuple[str, ...] = ()
    images: bool = True
    bits: int = 8
    colour: int = 32
    words: int | None = 8

    def __post_init__(self) -> None:
        if self.on and not self.sources:
            raise ConfigError(
                "Decontamination needs the evaluation sets that must not be trained on. Name them with `sources`."
            )
        if not 0 <= self.bits <= 16 or not 0 <= self.colour <= 255 or (self.words is not None and self.words < 1):
            raise ConfigError(f"bits lies in 0 to 16, colour in 0 to 255, words is at least 1 or None; this is {self}.")


class Decontamination(AbstractCurator):
    """Drops pairs that are in an evaluation set. All pairs of an image go with it, of a caption only its own."""

    def __init__(self, config: DecontaminationConfig) -> None:
        """Make the curator; evaluation sets are opened when the first table comes, once per process."""
        self.config, self.reads_images = config, config.images

    def curate(self, table: pa.Table) -> pa.Table:
        """Return the table with reasons and what leaked.

        Raises:
            DataError: If an evaluation set cannot be opened.
        """
        known, leak = _known(self.config), np.full(table.num_rows, None, object)
        if self.config.images:
            alive = kept(table)
            rows, which = images_of_rows(table, alive)
            found = [look(table, row, _Picture.of) for row in rows.tolist()]
            table = with_faults(table, alive, which, [fault for _, fault in found])
            for reason, of_image in zip((SAME_IMAGE, NEAR_IMAGE), known.images([one for one, _ in found]), strict=True):
                of_row = np.full(table.num_rows, None, object)
                of_row[alive] = of_image[which]
                table = _with_leaks(table, leak, of_row, reason)
        if self.config.words is not None:
            of_row = np.array([known.caption(text or "") for text in table["caption"].to_pylist()], object)
            table = _with_leaks(table, leak, of_row, SAME_WORDS)
        return with_column(table, "leak", pa.array(leak, pa.string()))


def _with_leaks(table: pa.Table, leak: np.ndarray, found: np.ndarray, reason: str) -> pa.Table:
    """Give rows for which something was found a reason, unless they have one, and write down what it was."""
    here = kept(table) & np.array([one is not None for one in found], np.bool_)
    leak[here] = found[here]
    return with_reason(table, here, reason)


@dataclass(frozen=True)
class _Picture:
    """What of an image is compared.

    Attributes:
        digest: Of its pixels.
        bits: Perceptual hash.
        colour: Mean colour.
    """

    digest: bytes
    bits: int
    colour: tuple[int, int, int]

    @classmethod
    def of(cls, image: Image.Image) -> "_Picture":
        digest = hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).digest()
        return cls(digest, perceptual_hash(image), mean_colour(image))


class _Known:
    """Evaluation sets by what their images look like and by the runs of words in their captions."""

    def __init__(self, sources: Sequence[AbstractSource], config: DecontaminationConfig) -> None:
        self._config, self._names, self._runs = config, list[str](), dict[str, str]()
        pictures = list[_Picture]()
        for source in sources:
            unread = 0
            for index in range(len(source)):
                name = f"{source.name}: {source.without_image(index).key}"
                for text in source.texts(index):
                    self._runs |= dict.fromkeys(_runs(text.text, config.words), name)
                if config.images:
                    try:
                        image = source[index].image
                        pictures += [] if image is None else [_Picture.of(decode(image))]
                        self._names += [] if image is None else [name]
                    except ImageError:
                        unread += 1
            if unread:
                warnings.warn(
                    f"{unread:,} of {len(source):,} images of {source.name} cannot be read, so nothing is compared with them.",
                    stacklevel=2,
                )
        self._same = {picture.digest: name for picture, name in zip(pictures, self._names, strict=True)}
        self._looks = _looks(pictures)

    def images(self, pictures: Sequence[_Picture | None]) -> tuple[np.ndarray, np.ndarray]:
        """Return for each image the name of one that is the same, and of one that is near; None where there is none."""
        same, near = np.full((2, len(pictures)), None, object)
        seen = [place for place, picture in enumerate(pictures) if picture is not None]
        some = [picture for picture in pictures if picture is not None]
        same[seen] = [self._same.get(picture.digest) for picture in some]
        first, looks = len(self._names), _looks(some)
        bits = np.concatenate([self._looks.bits, looks.bits])
        colour = np.concatenate([self._looks.colour, looks.colour])
        neighbours = looking_alike(Looks(bits, colour), self._config.bits, self._config.colour)
        best = np.full(len(some), first)
        for known, place in neighbours(np.arange(first), np.arange(first, first + len(some))):
            np.minimum.at(best, place - first, known)
        near[seen] = [self._names[known] if known < first else None for known in best.tolist()]
        return same, near

    def caption(self, text: str) -> str | None:
        """Return the name of a sample that shares a run of words with a text."""
        return next((self._runs[run] for run in _runs(text, self._config.words) if run in self._runs), None)


def _looks(pictures: Sequence[_Picture]) -> Looks:
    return Looks.of([(picture.bits, picture.colour) for picture in pictures])


def _runs(text: str, words: int | None) -> list[str]:
    """Return all runs of so many words, folded; none of a text with fewer."""
    if words is None:
        return []
    folded = folded_words(text)
    return [" ".join(folded[i : i + words]) for i in range(len(folded) - words + 1)]


@lru_cache(maxsize=1)
def _known(config: DecontaminationConfig) -> _Known:
    return _Known([open_source(spec) for spec in config.sources], config)
