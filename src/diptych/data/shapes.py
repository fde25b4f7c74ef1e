"""Coloured shapes with captions, drawn without any package or file: the least that any model of images and texts should tell apart."""

import math
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

from diptych.data.sources import Listed
from diptych.types import Sample, Text

COLOURS = {
    "red": "#d62828",
    "green": "#2a9d3a",
    "blue": "#1d4ed8",
    "yellow": "#facc15",
    "orange": "#f97316",
    "purple": "#7e22ce",
    "pink": "#f472b6",
    "brown": "#7c4a1e",
    "grey": "#8a8a8a",
    "black": "#111111",
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "ring")
_SIDE = 96


def shapes() -> Listed:
    """Return one drawing of every shape in every colour on white, 80 in all, each with a caption such as `a red circle`."""
    pairs = product(COLOURS, SHAPES)
    return Listed([_sample(colour, shape) for colour, shape in pairs], "shapes")


def _sample(colour: str, shape: str) -> Sample:
    key = f"{colour}-{shape}"
    return Sample(key, _drawn(COLOURS[colour], shape), (Text(f"a {colour} {shape}", language="en"),), key)


def _drawn(colour: str, shape: str) -> np.ndarray:
    image = Image.new("RGB", (_SIDE, _SIDE), "white")
    canvas, box = ImageDraw.Draw(image), (16, 16, 80, 80)
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "ring":
        canvas.ellipse(box, outline=colour, width=14)
    elif shape == "square":
        canvas.rectangle(box, fill=colour)
    elif shape == "heart":
        canvas.ellipse((16, 20, 50, 54), fill=colour)
        canvas.ellipse((46, 20, 80, 54), fill=colour)
        canvas.polygon([(19, 46), (77, 46), (48, 82)], fill=colour)
    elif shape == "cross":
        canvas.rectangle((38, 14, 58, 82), fill=colour)
        canvas.rectangle((14, 38, 82, 58), fill=colour)
    else:
        canvas.polygon(_corners(shape), fill=colour)
    return np.asarray(image)


def _corners(shape: str) -> list[tuple[float, float]]:
    """Return the corners of a triangle, a diamond or a star with five points, the first one on top."""
    radii = {"triangle": (36,) * 3, "diamond": (36,) * 4, "star": (38, 15) * 5}[shape]
    turns = [math.tau * number / len(radii) for number in range(len(radii))]
    return [
        (48 + radius * math.sin(turn), 48 - radius * math.cos(turn)) for radius, turn in zip(radii, turns, strict=True)
    ]
