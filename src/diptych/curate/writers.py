"""Who rewrites: a language model that is shown examples, or plain rules, which need no model and repeat themselves."""

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from diptych.config import fingerprint
from diptych.curate.language_model import AbstractLanguageModel, LanguageModelConfig
from diptych.curate.prompts import FewShot
from diptych.errors import ConfigError, TextError, nearest


class AbstractWriter(ABC):
    """Rewrites captions in one of several styles.

    Attributes:
        styles: Names of the styles it knows.
        name: Changes whenever its rewrites may; part of what a resumed run must agree in.
    """

    styles: tuple[str, ...]
    name: str

    @abstractmethod
    def write(self, captions: Sequence[str], style: str, *, seed: int) -> list[str]:
        """Return one rewrite per caption, empty where it failed; equal arguments give equal rewrites if the writer can do so."""

    def check(self, styles: Sequence[str]) -> None:
        """Raise for a style that the writer does not know.

        Raises:
            ConfigError: Names the nearest.
        """
        for style in styles:
            if style not in self.styles:
                raise ConfigError(f"There is no style {style!r} here. {nearest(style, self.styles)}")


class PromptedWriter(AbstractWriter):
    """A language model with a few examples before each caption."""

    def __init__(
        self, model: AbstractLanguageModel, prompts: Mapping[str, FewShot], config: LanguageModelConfig | None = None
    ) -> None:
        """Make the writer.

        Args:
            model: Goes on with the prompts.
            prompts: Examples by style.
            config: What the model was opened with; it goes into the name.
        """
        self.model, self.prompts, self.styles = model, dict(prompts), tuple(prompts)
        self.name = fingerprint([self.prompts, config])

    def write(self, captions: Sequence[str], style: str, *, seed: int) -> list[str]:
        """Return the rewrites of a batch."""
        shots, rng = self.prompts[style], random.Random(seed)
        prompts = [shots.build(caption, rng) for caption in captions]
        answers = self.model.complete(prompts, seed=seed)
        if len(answers) != len(prompts):
            raise TextError(f"The language model was asked for {len(prompts)} texts and gave {len(answers)}.")
        return [_read(shots, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


FRAMES = (
    "a picture of {}",
    "{} can be seen here",
    "this shows {}",
    "in this picture: {}",
    "someone has drawn {}",
    "{}, nothing else",
)
"""Around captions that list things, as those of scenes do."""

_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_RELATION = re.compile(f"^(.+) ({'|'.join(_OPPOSITE)}) (.+)$")


class RuleWriter(AbstractWriter):
    """Other words around a list of things, or its things in another order. What is named, its number and its place stay true.

    Styles: `framed` puts one of the frames around the caption, `reordered` changes the order (`a cat left of a dog` becomes `a dog right of a
    cat`), `both` does both.
    """

    styles = ("framed", "reordered", "both")

    def __init__(self, frames: Sequence[str] = FRAMES) -> None:
        self.frames = tuple(frames)
        self.name = fingerprint(self.frames)

    def write(self, captions: Sequence[str], style: str, *, seed: int) -> list[str]:
        """Return one rewrite per caption."""
        rng = random.Random(seed)
        found = [caption if style == "framed" else reordered(caption, rng) for caption in captions]
        return found if style == "reordered" else [rng.choice(self.frames).format(caption) for caption in found]


def reordered(caption: str, rng: random.Random) -> str:
    """Return a list such as `a cat left of a dog, a bus and two keys` in another order, true as before; the caption itself if it has one item."""
    items = re.split(r", | and ", caption)
    turned = [_turned(item) if rng.random() < 0.5 or len(items) == 1 else item for item in items]
    rng.shuffle(turned)
    return turned[0] if len(turned) == 1 else f"{', '.join(turned[:-1])} and {turned[-1]}"


def _turned(item: str) -> str:
    found = _RELATION.match(item)
    return item if found is None else f"{found[3]} {_OPPOSITE[found[2]]} {found[1]}"


def _read(shots: FewShot, prompt: str, answer: str) -> str:
    try:
        return shots.parse(prompt, answer)
    except TextError:  # the official reading fails on some answers; the row then says that there is none
        return ""
