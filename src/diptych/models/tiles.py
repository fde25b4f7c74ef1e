"""An image as overlapping squares, and maps of the squares as one map again, the mean of the squares where they overlap.

Towers see whole patches, so lengths of windows are counted in them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor
from torch.nn import functional as F

from diptych.errors import ConfigError


@dataclass(frozen=True)
class Tiles:
    """As few squares as cover an image, evenly spread along its longer side.

    Attributes:
        height: Of the image.
        width: Of the image; one of the two is the side of the squares.
    """

    height: int
    width: int

    @property
    def side(self) -> int:
        """Return the side of the squares."""
        return min(self.height, self.width)

    @property
    def corners(self) -> tuple[tuple[int, int], ...]:
        """Return the top left corner of each square, (y, x)."""
        rest = max(self.height, self.width) - self.side
        count = math.ceil((rest + self.side) / self.side)
        starts = [round(i * rest / max(1, count - 1)) for i in range(count)]
        return tuple((start, 0) if self.height > self.width else (0, start) for start in starts)

    def cut(self, image: Shaped[Tensor, "... h w"]) -> Shaped[Tensor, "tiles ... side side"]:
        """Return the squares."""
        return _cut(image, self.corners, self.side)

    def merge(self, maps: Float[Tensor, "tiles ... side side"]) -> Float[Tensor, "... h w"]:
        """Return one map, the mean of the squares where they overlap."""
        return _merge(maps, self.corners, (self.height, self.width))


@dataclass(frozen=True)
class Windows:
    """Squares that slide over an image by a stride, row by row; the last of each row and column is shifted back to end with the image.

    Attributes:
        height: Of the image, at least `side`.
        width: Of the image, at least `side`.
        side: Of the squares.
        stride: From one to the next, at most `side`, or places would be left out.
    """

    height: int
    width: int
    side: int
    stride: int

    def __post_init__(self) -> None:
        if not 0 < self.stride <= self.side <= min(self.height, self.width):
            raise ConfigError(
                f"Windows need 0 < stride <= side <= sides of the image; stride is {self.stride}, side {self.side}, the image "
                f"{self.height} x {self.width}."
            )

    @property
    def corners(self) -> tuple[tuple[int, int], ...]:
        """Return the top left corner of each square, (y, x)."""
        rows, columns = (
            [min(start, length - self.side) for start in range(0, length - self.side + self.stride, self.stride)]
            for length in (self.height, self.width)
        )
        return tuple((y, x) for y in rows for x in columns)

    def of_maps(self, patch: int, fine: int = 1) -> "Windows":
        """Return the same windows over maps with `fine` places along each patch of `patch` pixels."""
        lengths = (self.height, self.width, self.side, self.stride)
        return Windows(*(length // patch * fine for length in lengths))

    def cut(self, image: Shaped[Tensor, "... h w"]) -> Shaped[Tensor, "windows ... side side"]:
        """Return the squares."""
        return _cut(image, self.corners, self.side)

    def merge(self, maps: Float[Tensor, "windows ... side side"]) -> Float[Tensor, "... h w"]:
        """Return one map, the mean of the squares where they overlap."""
        return _merge(maps, self.corners, (self.height, self.width))


def whole(length: float, patch: int) -> int:
    """Return a length rounded up to whole patches, at least one."""
    return patch * max(1, -int(-length // patch))


def resized_for_windows(
    image: UInt8[Tensor, "c h w"], *, short_side: int, long_side: int, side: int, patch: int
) -> UInt8[Tensor, "c _height _width"]:
    """Return an image as windows are cut from it: resized (bilinear), each side then to whole patches, and none below a window's.

    Args:
        image: Of any size.
        short_side: Of the result, before sides are made whole.
        long_side: It shrinks both sides where the longer one would be more.
        side: Of the windows, whole patches.
        patch: Pixels.
    """
    factor = min(short_side / min(image.shape[1:]), long_side / max(image.shape[1:]))
    size = tuple(max(side, whole(length * factor, patch)) for length in image.shape[1:])
    resized = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    return resized.round().clamp(0, 255).to(torch.uint8)


def upsampled(values: Float[Tensor, "tiles p k"], grid: tuple[int, int], tiles: Tiles) -> Float[Tensor, "k h w"]:
    """Return a value per patch as one per pixel: bilinear with the corner patches at the corners, then squares put together."""
    square = values.transpose(1, 2).unflatten(2, grid)
    return tiles.merge(F.interpolate(square, (tiles.side, tiles.side), mode="bilinear", align_corners=True))


def _cut(image: Tensor, corners: Sequence[tuple[int, int]], side: int) -> Tensor:
    return torch.stack([image[..., y : y + side, x : x + side] for y, x in corners])


def _merge(maps: Tensor, corners: Sequence[tuple[int, int]], size: tuple[int, int]) -> Tensor:
    total, count, side = maps.new_zeros(*maps.shape[1:-2], *size), maps.new_zeros(size), maps.shape[-1]
    for part, (y, x) in zip(maps, corners, strict=True):
        total[..., y : y + side, x : x + side] += part
        count[y : y + side, x : x + side] += 1
    return total / count
