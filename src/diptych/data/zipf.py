"""Emoji that follow Zipf's law, as things on the web do: few are everywhere, most are rare, and a tenth of the captions says nothing."""

import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from diptych.data.openmoji import glyphs, over_white
from diptych.data.sources import AbstractSource
from diptych.types import Sample, Text

CONCEPTS = 300
"""Kinds of things."""
TEMPLATES = (
    "{}",
    "a photo of a {}",
    "the {} in the picture",
    "image of {} on white",
    "{} for sale",
    "this is what a {} is to me",
    "New {} , free",
)
_JUNK = ("IMG_{}.jpg", "untitled photo {}", "a photo of the day")


class EmojiPairs(AbstractSource):
    """Drawings of emoji with captions. Each is scaled, moved and tinted in its own way, from its number."""

    def __init__(self, concepts: Sequence[int], captions: Sequence[str], name: str) -> None:
        """Make the source.

        Args:
            concepts: Which concept each sample shows; its name is the label.
            captions: One per sample.
            name: Seeds the drawings, too.
        """
        self.concepts, self.captions, self.name = concepts, captions, name
        self.names, self._pixels = concept_names(), glyphs(64).pixels
        self._seed = zlib.crc32(name.encode())

    def __len__(self) -> int:
        return len(self.concepts)

    def __getitem__(self, index: int) -> Sample:
        name, glyph = self.names[self.concepts[index]]
        rng = np.random.default_rng([self._seed, index])
        image = _moved(over_white(self._pixels[glyph]), rng)
        return Sample(f"{self.name}-{index}", image, self.texts(index), f"{self.name}-{index}", label=name)

    def texts(self, index: int) -> tuple[Text, ...]:
        """Return the caption."""
        return (Text(self.captions[index]),)


def _moved(image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    side = len(image)
    small = Image.fromarray(image).resize((size := int(rng.integers(side // 2, side + 1)),) * 2)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(small, tuple(rng.integers(0, side - size + 1, 2).tolist()))
    return (np.asarray(canvas) * rng.uniform(0.6, 1.0, 3)).astype(np.uint8)


@lru_cache(maxsize=1)
def concept_names() -> tuple[tuple[str, int], ...]:
    """Return the concepts, the most frequent first, each with the number of its drawing. Skin tones, flags, keys and clocks are left out."""
    left_out = ("skin", "flag", "keycap", "button", "clock")
    names = {of_one["en"]: number for number, of_one in enumerate(glyphs(64).names)}
    usable = [name for name in names if len(name.split()) <= 3 and not any(word in name for word in left_out)]
    chosen = np.random.default_rng(0).permutation(sorted(usable))[:CONCEPTS]
    return tuple((str(name), names[str(name)]) for name in chosen)


@lru_cache(maxsize=1)
def zipf_pool(count: int = 20_000) -> EmojiPairs:
    """Return the pool: concepts by Zipf's law, templates around their names, junk for a tenth."""
    rng, names = np.random.default_rng(1), concept_names()
    weights = np.arange(1, len(names) + 1) ** -1.2
    concepts = rng.choice(len(names), count, p=weights / weights.sum())
    captions = [
        _JUNK[rng.integers(len(_JUNK))].format(rng.integers(2000))
        if rng.random() < 0.1
        else TEMPLATES[rng.integers(len(TEMPLATES))].format(names[concept][0])
        for concept in concepts
    ]
    return EmojiPairs(concepts.tolist(), captions, "zipf")
