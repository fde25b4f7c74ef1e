"""From a decoded image to the uint8 square a tower expects, exactly (evaluation) or with augmentation (training)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from diptych.data.images import MAX_PIXELS
from diptych.errors import ConfigError, ImageError

Interpolation = Literal["bicubic", "bilinear", "nearest"]
_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


@dataclass(frozen=True)
class ImagePolicy:
    """How images become tensors. Travels inside every checkpoint.

    Attributes:
        size: Side of the square, pixels.
        resize: `crop` resizes the short side to size / crop_fraction and cuts the centre; `squash` ignores the aspect ratio;
            `pad` resizes the long side and fills with `background`.
        crop_fraction: Share of the resized short side that the centre crop keeps, in (0, 1]. Only `crop` uses it.
        interpolation: Always antialiased: resizing is Pillow's.
        mean: Per channel, subtracted from pixels in [0, 1] by the model's first op.
        std: Per channel, divided by.
        background: RGB behind transparent pixels and around padded images, 0 to 255.
    """

    size: int = 64
    resize: Literal["crop", "squash", "pad"] = "crop"
    crop_fraction: float = 1.0
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    background: tuple[int, int, int] = (255, 255, 255)

    def __post_init__(self) -> None:
        _check(
            self,
            size=(self.size >= 1, "a side of 1 pixel or more"),
            crop_fraction=(0 < self.crop_fraction <= 1, "a share above 0 and at most 1"),
            std=(min(self.std) > 0, "numbers above 0"),
            background=(all(0 <= level <= 255 for level in self.background), "levels from 0 to 255"),
        )


@dataclass(frozen=True)
class Augment:
    """Random changes of a training image. The defaults change nothing.

    Attributes:
        crop_scale: Range of the share of the area that a random crop keeps, in (0, 1]; (1, 1) keeps the evaluation path.
        crop_ratio: Range of the crop's aspect ratio, width / height.
        flip_rate: Probability of a left-right flip. Leave 0 where captions speak of left and right.
        jitter: Brightness, contrast and saturation factors are drawn from [1 - jitter, 1 + jitter]; at most 1.
        hue: The hue is turned by an angle drawn from [-hue, hue], in turns; at most 0.5.
        jitter_rate: Probability that `jitter` and `hue` act at all.
        gray_rate: Probability of dropping colour.
        blur_rate: Probability of a Gaussian blur of the finished square.
        blur_sigma: Range of its standard deviation, pixels.
        size: Side of this view, pixels; None for the policy's.
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    flip_rate: float = 0.0
    jitter: float = 0.0
    hue: float = 0.0
    jitter_rate: float = 1.0
    gray_rate: float = 0.0
    blur_rate: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    size: int | None = None

    def __post_init__(self) -> None:
        share, ordered = "from 0 to 1", "the smaller first"
        _check(
            self,
            crop_scale=(_rising(self.crop_scale, most=1), f"two shares above 0 and at most 1, {ordered}"),
            crop_ratio=(_rising(self.crop_ratio), f"two numbers above 0, {ordered}"),
            flip_rate=(0 <= self.flip_rate <= 1, share),
            jitter=(0 <= self.jitter <= 1, share),
            hue=(0 <= self.hue <= 0.5, "from 0 to 0.5"),
            jitter_rate=(0 <= self.jitter_rate <= 1, share),
            gray_rate=(0 <= self.gray_rate <= 1, share),
            blur_rate=(0 <= self.blur_rate <= 1, share),
            blur_sigma=(0 <= self.blur_sigma[0] <= self.blur_sigma[1], f"two numbers of 0 or more, {ordered}"),
            size=(self.size is None or self.size >= 1, "a side of 1 pixel or more, or None"),
        )

    @property
    def random(self) -> bool:
        """Return whether two views of one image may differ."""
        return self.crop_scale != (1.0, 1.0) or any(
            (self.flip_rate, self.jitter, self.hue, self.gray_rate, self.blur_rate)
        )


def _check(record: ImagePolicy | Augment, **rules: tuple[bool, str]) -> None:
    """Raise if a field's rule does not hold; beside each stands what the field is to be."""
    for name, (holds, needed) in rules.items():
        if not holds:
            raise ConfigError(f"{type(record).__name__}.{name} is to be {needed}, not {getattr(record, name)}.")


def _rising(bounds: tuple[float, float], *, most: float = math.inf) -> bool:
    """Return whether a range lies above 0, is not above `most`, and its ends are in order."""
    return 0 < bounds[0] <= bounds[1] <= most


def preprocess(image: Image.Image, policy: ImagePolicy) -> UInt8[Tensor, "3 size size"]:
    """Return the deterministic view of an RGB image that evaluation uses.

    Raises:
        ImageError: If `crop` would make more than `MAX_PIXELS` pixels of an extremely long image before cutting its centre.
    """
    return to_tensor(_square(image, policy))


def uncut(image: Image.Image, policy: ImagePolicy) -> UInt8[Tensor, "3 h w"]:
    """Return an RGB image whose short side is the policy's size, its proportions kept and nothing cut off, for dense uses.

    Raises:
        ImageError: If that would make more than `MAX_PIXELS` pixels of an extremely long image.
    """
    width, height = image.size
    size = policy.size
    width, height = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"An image of {image.width} x {image.height} pixels becomes {width} x {height}; at most {MAX_PIXELS:,} are made. Cut the image."
        )
    return to_tensor(image.resize((width, height), _RESAMPLING[policy.interpolation]))


def _square(image: Image.Image, policy: ImagePolicy) -> Image.Image:
    """Return the square that `preprocess` makes a tensor of."""
    size, resampling = policy.size, _RESAMPLING[policy.interpolation]
    if image.size == (size, size) and policy.crop_fraction == 1:
        return image
    if policy.resize == "squash":
        return image.resize((size, size), resampling)
    if policy.resize == "pad":
        return ImageOps.pad(image, (size, size), resampling, color=policy.background)
    width, height = image.size
    # Same order of rounding as torchvision: the short side is exact, the long side truncated, the crop offset rounded.
    short = round(size / policy.crop_fraction)
    width, height = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"An image of {image.width} x {image.height} pixels becomes {width} x {height} before its centre is cut; "
            f"at most {MAX_PIXELS:,} are made. Cut the image, or drop the row."
        )
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), resampling).crop((left, top, left + size, top + size))


def augment(
    image: Image.Image, policy: ImagePolicy, change: Augment, rng: np.random.Generator
) -> UInt8[Tensor, "3 size size"]:
    """Return a random view of an RGB image; equals `preprocess` when `change` is `Augment()`."""
    if change.size is not None:
        policy = replace(policy, size=change.size)
    cropped = change.crop_scale != (1.0, 1.0)
    if cropped:
        box = random_box(image.size, change, rng)
        image = image.resize((policy.size, policy.size), _RESAMPLING[policy.interpolation], box=box)
    if rng.random() < change.flip_rate:
        image = ImageOps.mirror(image)
    if change.jitter_rate == 1 or rng.random() < change.jitter_rate:
        image = _jittered(image, change, rng)
    if rng.random() < change.gray_rate:
        image = ImageOps.grayscale(image).convert("RGB")
    if not cropped:  # a crop is final: no second one, of its centre
        image = _square(image, policy)
    if change.blur_rate > 0 and rng.random() < change.blur_rate:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*change.blur_sigma)))
    return to_tensor(image)


def pass_over(change: Augment, rng: np.random.Generator) -> None:
    """Draw from the generator what `augment` draws, whatever the image, for a view that need not be made."""
    augment(_DOT, _DOT_POLICY, replace(change, size=None), rng)


def reduction(size: tuple[int, int], policy: ImagePolicy, changes: Sequence[Augment]) -> int:
    """Return by how much an image of (width, height) may be reduced while even the smallest crop is still reduced, never enlarged.

    1 if one of the views is not cropped at random: that is the view of evaluation, and evaluation is exact.
    """
    if any(change.crop_scale == (1.0, 1.0) for change in changes):
        return 1
    area = size[0] * size[1]
    sides = [
        min(*size, math.sqrt(area * change.crop_scale[0] * min(change.crop_ratio[0], 1 / change.crop_ratio[1])))
        / (change.size or policy.size)
        for change in changes
    ]
    return max(1, int(min(sides)))


def _jittered(image: Image.Image, change: Augment, rng: np.random.Generator) -> Image.Image:
    """Return an image with random brightness, contrast, saturation and hue; no number is drawn for what is off."""
    if change.jitter > 0:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(1 + change.jitter * rng.uniform(-1, 1))
    if change.hue > 0:
        hue, saturation, value = image.convert("HSV").split()
        turn = round(256 * change.hue * rng.uniform(-1, 1))
        image = Image.merge("HSV", (hue.point(lambda level: (level + turn) % 256), saturation, value)).convert("RGB")
    return image


def random_box(size: tuple[int, int], change: Augment, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Return (x0, y0, x1, y1) of a random crop inside an image of (width, height), in pixels, not rounded.

    The aspect ratio is drawn log-uniformly and the crop is shrunk where it would stick out, so one draw always suffices.
    """
    width, height = size
    area = width * height * rng.uniform(*change.crop_scale)
    ratio = math.exp(rng.uniform(math.log(change.crop_ratio[0]), math.log(change.crop_ratio[1])))
    w, h = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return x, y, min(x + w, width), min(y + h, height)


def to_tensor(image: Image.Image) -> UInt8[Tensor, "3 h w"]:
    """Return the pixels of an RGB image, channels first."""
    planes = bytearray().join(band.tobytes() for band in image.split())  # in half the time of turning an array round
    return torch.frombuffer(planes, dtype=torch.uint8).view(3, image.height, image.width)


_DOT, _DOT_POLICY = Image.new("RGB", (1, 1)), ImagePolicy(size=1)
