"""Changes of images, one for one, that leave in sight what they show: an owner's mark, and another look drawn at random."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms import RandAugment  # type: ignore[import-untyped]

ImageChange = Callable[[Iterable[UInt8[Tensor, "3 h w"]]], Iterable[UInt8[Tensor, "3 h w"]]]
"""From images to others, one for one."""


def watermarked(image: UInt8[Tensor, "*b 3 h w"]) -> UInt8[Tensor, "*b 3 h w"]:
    """Return images with the owner's mark: every pixel in an even row or column is white, three of four in images of even size.

    Source: Wang et al. 2025 (IP-CLIP), official code.
    """
    marked = image.clone()
    marked[..., ::2, :] = marked[..., ::2] = 255
    return marked


def all_marked(images: Iterable[UInt8[Tensor, "3 h w"]]) -> Iterator[UInt8[Tensor, "3 h w"]]:
    """Yield images with the owner's mark."""
    return map(watermarked, images)


def restyled(
    images: Iterable[UInt8[Tensor, "3 h w"]], *, ops: int = 10, magnitude: int = 10, seed: int = 0, view: int = 0
) -> Iterator[UInt8[Tensor, "3 h w"]]:
    """Yield images that went through RandAugment (torchvision's), each with random numbers of its own.

    Args:
        images: One after the other.
        ops: Random changes of each.
        magnitude: Of each change, 0 to 30.
        seed: Of the random numbers.
        view: Other numbers, other versions of the images.
    """
    change = RandAugment(ops, magnitude)
    for row, image in enumerate(images):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([seed, view, row]).generate_state(1)[0]))
            changed: Tensor = change(image)
        yield changed
