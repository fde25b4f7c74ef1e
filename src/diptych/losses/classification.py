"""Classification by similarity to one embedding per class. Pure functions of tensors, in fp32 whatever the autocast."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from diptych.losses.full import full


def class_cross_entropy(
    image: Float[Tensor, "n d"],
    classes: Float[Tensor, "k d"],
    label: Int64[Tensor, " n"],
    scale: Float[Tensor, ""] | float,
    *,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Return the cross-entropy of images over classes: -mean_i log softmax(scale * image_i . classes)_label_i.

    Unlike in InfoNCE, an image is compared with every class, whether it is in the batch or not, and each class once.

    Args:
        image: Normalised embeddings.
        classes: Normalised embeddings of one prompt per class; they get a gradient too.
        label: Row of `classes`.
        scale: 1 / temperature, > 0.
        label_smoothing: Share of each target that is spread evenly over all classes, in [0, 1).

    Returns:
        A scalar, log k at chance.
    """
    with torch.autocast(image.device.type, enabled=False):
        logits = scale * full(image) @ full(classes).T
        return F.cross_entropy(logits, label, label_smoothing=label_smoothing)
