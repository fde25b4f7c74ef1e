"""Common corruptions of a picture at five severities: what cameras, codecs and light do, without anyone meaning harm.

Source: Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", section 4; strengths are
those of their ImageNet-C, for 224 pixels. What differs here: eight kinds, those that need neither other pictures nor other libraries (Gaussian blur
is one of their additional kinds; their other blurs, snow, frost, fog and elastic changes are left out); a blur grows with the side of the picture,
and is theirs at 224 pixels; levels are rounded to the nearest; nothing is written as JPEG afterwards. Noise is drawn per pixel, so small pictures
suffer more from it than they do in the sets of these authors for 64 and 32 pixels, which have strengths of their own.
"""

import io
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from diptych.errors import ConfigError, nearest

Pixels = UInt8[np.ndarray, "h w 3"]
Shares = Float[np.ndarray, "h w 3"]
"""Pixels in [0, 1]."""

SEVERITIES = (1, 2, 3, 4, 5)
_SIDE = 224


def corrupt(pixels: Pixels, kind: str, severity: int, rng: np.random.Generator) -> Pixels:
    """Return the corrupted picture, of the same size.

    Args:
        pixels: RGB, as the model will see it.
        kind: One of `CORRUPTIONS`.
        severity: 1 (weak) to 5 (strong).
        rng: Of the noises; the others draw nothing.

    Raises:
        ConfigError: If there is no such kind or severity.
    """
    check_corruption(kind, severity)
    change, strengths = CORRUPTIONS[kind]
    return change(pixels, strengths[severity - 1], rng)


def check_corruption(kind: str, severity: int) -> None:
    """Raise if there is no such corruption.

    Raises:
        ConfigError: With the nearest kind, or the severities there are.
    """
    if kind not in CORRUPTIONS:
        raise ConfigError(f"There is no corruption {kind!r}. {nearest(kind, CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ConfigError(f"A corruption has severities 1 to 5, not {severity}.")


def gaussian_noise(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Return pixels with normal noise of standard deviation `strength`, in units of [0, 1]."""
    return _levels(_shares(pixels) + rng.normal(scale=strength, size=pixels.shape))


def shot_noise(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Return pixels as counts of light: Poisson, with `strength` quanta for white."""
    return _levels(rng.poisson(_shares(pixels) * strength) / strength)


def impulse_noise(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Return pixels of which a share `strength` of all values, channel by channel, is 0 or 255, one as likely as the other."""
    hit, white = rng.random(pixels.shape) < strength, rng.random(pixels.shape) < 0.5
    return np.where(hit, np.where(white, 255, 0), pixels).astype(np.uint8)


def gaussian_blur(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Return pixels blurred with a standard deviation of `strength` pixels in a picture of 224; the edge is continued outwards."""
    del rng
    sigma = strength * max(pixels.shape[:2]) / _SIDE
    reach = int(4 * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    blurred = _shares(pixels)
    for axis in (0, 1):
        around = [(reach, reach) if side == axis else (0, 0) for side in range(3)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(blurred, around, "edge"), 2 * reach + 1, axis)
        blurred = windows @ kernel
    return _levels(blurred)


def brightness(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Return pixels whose value, the largest channel, is raised by `strength` up to white; hue and saturation stay (of black, no hue)."""
    del rng
    shares = _shares(pixels)
    value = shares.max(-1, keepdims=True)
    raised = (value + strength).clip(max=1)
    return _levels(np.where(value > 0, shares * raised / np.where(value > 0, value, 1), raised))


def contrast(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Return pixels drawn to the mean colour of the picture until `strength` of their distance from it is left."""
    del rng
    shares = _shares(pixels)
    mean = shares.mean((0, 1), keepdims=True)
    return _levels((shares - mean) * strength + mean)


def pixelate(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Return pixels averaged into blocks, `strength` times as many along each side."""
    del rng
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    small = image.resize((max(1, int(width * strength)), max(1, int(height * strength))), Image.Resampling.BOX)
    return np.array(small.resize((width, height), Image.Resampling.BOX))


def jpeg(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Return pixels after JPEG of quality `strength`, colours at half resolution as Pillow writes them."""
    del rng
    Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", quality=int(strength))
    return np.array(Image.open(file))


CORRUPTIONS: dict[str, tuple[Callable[[Pixels, float, np.random.Generator], Pixels], tuple[float, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "gaussian_blur": (gaussian_blur, (1, 2, 3, 4, 6)),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": (pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg": (jpeg, (25, 18, 15, 10, 7)),
}
"""Each kind with its strength at severity 1 to 5."""


def _shares(pixels: Pixels) -> Shares:
    return pixels / 255.0


def _levels(shares: Shares) -> Pixels:
    """Return the nearest of 256 levels."""
    return (shares.clip(0, 1) * 255).round().astype(np.uint8)
