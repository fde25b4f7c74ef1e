"""Words written over a picture: what a model that reads may believe more than what it sees. The same box without words is the control.

Source: Goh et al. 2021, "Multimodal Neurons in Artificial Neural Networks", section "typographic attacks"; Materzynska et al. 2022, "Disentangling
Visual and Written Concepts in CLIP", section 4. Size and place of the words are ours.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from diptych.errors import TextError

Pixels = UInt8[np.ndarray, "h w 3"]

WIDTH, HEIGHT = 0.96, 0.34
"""Of the picture, what a box covers at most; a line of the smallest letters is higher than that where a picture is lower than 30 pixels."""

SMALLEST = 7
"""Pixels. Nobody reads smaller letters."""

LAST_LETTER = "\u024f"
"""Pillow's font has Latin letters; of those behind this one it draws empty boxes."""


@dataclass(frozen=True)
class Layout:
    """How words fill a box.

    Attributes:
        lines: From the top.
        font_size: Pixels.
        width: Of the box, pixels.
        height: Of the box, pixels.
    """

    lines: tuple[str, ...]
    font_size: int
    width: int
    height: int


def overlay(pixels: Pixels, words: str, rng: np.random.Generator, *, written: bool = True) -> Pixels:
    """Return the picture with words, black on white, in a box somewhere on it.

    Args:
        pixels: RGB.
        words: As `arrange` sets them.
        rng: Of the place.
        written: False leaves the box empty; with an equal `rng` it is the same box.

    Raises:
        TextError: If there is nothing to write.
    """
    layout = arrange(words, pixels.shape[1], pixels.shape[0])
    x = int(rng.integers(max(1, pixels.shape[1] - layout.width + 1)))
    y = int(rng.integers(max(1, pixels.shape[0] - layout.height + 1)))
    image = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((x, y, x + layout.width - 1, y + layout.height - 1), fill="white")
    if written:
        place = (x + layout.width / 2, y + layout.height / 2)
        canvas.multiline_text(
            place, "\n".join(layout.lines), "black", _font(layout.font_size), anchor="mm", spacing=0, align="center"
        )
    return np.array(image)


def arrange(words: str, width: int, height: int) -> Layout:
    """Return words in the largest letters with which their lines fit into a picture's box; in the smallest ones the end may be cut off.

    Args:
        words: Split at white space.
        width: Of the picture, pixels.
        height: Of the picture, pixels.

    Raises:
        TextError: If there is nothing to write.
    """
    parts = words.split()
    if not parts:
        raise TextError(f"Words were needed to write over a picture, and {words!r} has none. Give the sample a text.")
    for size in range(max(SMALLEST, int(HEIGHT * height)), SMALLEST, -1):
        lines = _lines(parts, size, WIDTH * width)
        if lines is not None and len(lines) * _line_height(size) <= HEIGHT * height:
            return _boxed(lines, size, width)
    lines = _lines(parts, SMALLEST, WIDTH * width) or [" ".join(parts)]
    shown = lines[: max(1, int(HEIGHT * height / _line_height(SMALLEST)))]
    return _boxed([_cut(line, SMALLEST, WIDTH * width) for line in shown], SMALLEST, width)


def drawable(words: str) -> bool:
    """Return whether the font has the letters."""
    return all(letter <= LAST_LETTER for letter in words)


def _lines(parts: list[str], size: int, width: float) -> list[str] | None:
    """Return words in as few lines as possible; None if one of them is wider than a line."""
    lines: list[str] = []
    for part in parts:
        longer = f"{lines[-1]} {part}" if lines else part
        if lines and _font(size).getlength(longer) <= width:
            lines[-1] = longer
        elif _font(size).getlength(part) <= width:
            lines.append(part)
        else:
            return None
    return lines


def _cut(line: str, size: int, width: float) -> str:
    """Return as much of a line's beginning as fits, one letter at least."""
    while len(line) > 1 and _font(size).getlength(line) > width:
        line = line[:-1]
    return line


def _boxed(lines: list[str], size: int, width: int) -> Layout:
    longest = max(_font(size).getlength(line) for line in lines)
    return Layout(tuple(lines), size, min(width, int(longest + size / 2)), len(lines) * _line_height(size))


def _line_height(size: int) -> int:
    return sum(_font(size).getmetrics())


@lru_cache(maxsize=256)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
