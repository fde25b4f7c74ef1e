"""Numbers laid over a picture: heat where they are high, a colour for each class, outlines of masks."""

import colorsys

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image

HEAT = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))
"""From low to high, dark violet to pale yellow: lightness grows evenly, so that it reads in grey and with colour blindness too."""
MARK = (0, 229, 255)
"""Colour of outlines, which is none of `HEAT`."""


def heat_colours(values: Float[np.ndarray, "h w"], low: float, high: float) -> UInt8[np.ndarray, "h w 3"]:
    """Return a colour for each number, from `low` to `high`; what lies outside takes the nearer end."""
    place = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * (len(HEAT) - 1)
    table = np.array(HEAT, dtype=np.float64)
    channels = [np.interp(place, np.arange(len(HEAT)), table[:, channel]) for channel in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def heat_overlay(
    image: Image.Image, values: Float[np.ndarray, "h w"], low: float, high: float, *, strength: float = 0.65
) -> Image.Image:
    """Return a picture under the colours of a map of any size.

    Args:
        image: RGB.
        values: Resized to the picture, bilinear.
        low: Number with the first colour.
        high: Number with the last.
        strength: Share of the colour in the mixture, in [0, 1].
    """
    colours = Image.fromarray(heat_colours(values, low, high)).resize(image.size, Image.Resampling.BILINEAR)
    return Image.blend(image, colours, strength)


def outlined(image: Image.Image, mask: Bool[np.ndarray, "h w"], *, colour: tuple[int, int, int] = MARK) -> Image.Image:
    """Return a picture with a line around a mask of its size: the pixels just outside, those diagonal to it too."""
    framed = np.pad(mask, 1)
    grown = np.zeros_like(mask)
    for dy in range(3):
        for dx in range(3):
            grown |= framed[dy : dy + mask.shape[0], dx : dx + mask.shape[1]]
    pixels = np.array(image)
    pixels[grown & ~mask] = colour
    return Image.fromarray(pixels)


def class_colours(count: int) -> UInt8[np.ndarray, "count 3"]:
    """Return a colour for each class, neighbours far apart in hue: each is turned by the golden angle from the one before."""
    hues = (np.arange(count) * 0.6180339887 + 0.02) % 1
    lights = np.tile([0.45, 0.62, 0.35], count)[:count]
    colours = [colorsys.hls_to_rgb(hue, light, 0.8) for hue, light in zip(hues.tolist(), lights.tolist(), strict=True)]
    return (255 * np.array(colours).reshape(count, 3)).round().astype(np.uint8)


def class_overlay(
    image: Image.Image,
    labels: Int64[np.ndarray, "h w"],
    colours: UInt8[np.ndarray, "count 3"],
    *,
    strength: float = 0.6,
) -> Image.Image:
    """Return a picture under the colours of its classes; a negative label leaves a pixel as it is.

    Args:
        image: RGB.
        labels: One per pixel; row of `colours`.
        colours: Such as `class_colours`.
        strength: Share of the colour in the mixture, in [0, 1].
    """
    pixels = np.array(image)
    tinted = (1 - strength) * pixels + strength * colours[labels.clip(0)]
    return Image.fromarray(np.where((labels >= 0)[..., None], tinted.round(), pixels).astype(np.uint8))
