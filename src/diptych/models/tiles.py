"""An image that is not square as overlapping squares, and maps of the squares as one map again."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


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
        return torch.stack([image[..., y : y + self.side, x : x + self.side] for y, x in self.corners])

    def merge(self, maps: Float[Tensor, "tiles ... side side"]) -> Float[Tensor, "... h w"]:
        """Return one map, the mean of the squares where they overlap."""
        total = maps.new_zeros(*maps.shape[1:-2], self.height, self.width)
        count = maps.new_zeros(self.height, self.width)
        for part, (y, x) in zip(maps, self.corners, strict=True):
            total[..., y : y + self.side, x : x + self.side] += part
            count[y : y + self.side, x : x + self.side] += 1
        return total / count
