"""An image and its text as one vector."""

from jaxtyping import Float
from torch import Tensor

from diptych.errors import InputError
from diptych.models.dual import normalise

OPPOSITE = 1e-6


def check_weight(image_weight: float | None) -> None:
    """Refuse a share of the image that is none; None stands for one that is to be chosen.

    Raises:
        InputError: If it is out of [0, 1].
    """
    if image_weight is not None and not 0 <= image_weight <= 1:
        raise InputError(
            f"image_weight is the share of the image in its record's vector, in [0, 1], not {image_weight}."
        )


def pool(image: Float[Tensor, "n d"], text: Float[Tensor, "n d"], image_weight: float = 0.5) -> Float[Tensor, "n d"]:
    """Return w image + (1 - w) text, normalised.

    With w = 1/2 the length before is sqrt((1 + cos) / 2), so it is undefined only where image and text are opposite.

    Args:
        image: Normalised embeddings.
        text: Normalised embeddings.
        image_weight: w, in [0, 1]; 1 returns the images and 0 the texts, bit by bit.

    Raises:
        InputError: If w is out of range, or an image and its text cancel each other.

    Source: Arora et al. 2023 (arXiv 2304.03464), section 3.
    """
    check_weight(image_weight)
    if image_weight in (0, 1):
        return image if image_weight else text
    both = image_weight * image + (1 - image_weight) * text
    if (both.norm(dim=-1) < OPPOSITE).any():
        row = int(both.norm(dim=-1).argmin())
        raise InputError(
            f"Image and text of row {row} cancel each other at image_weight {image_weight}. Choose another weight."
        )
    return normalise(both)
