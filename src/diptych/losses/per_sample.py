"""Contrastive losses that give one number per sample, for objectives that weigh their samples."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from diptych.losses.positives import Positives


def info_nce_per_sample(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    scale: Float[Tensor, ""] | float,
    *,
    positives: Positives | Bool[Tensor, "n n"] | None = None,
) -> Float[Tensor, " n"]:
    """Return what each pair adds to the symmetric InfoNCE loss; the mean is `contrastive.info_nce`.

    l_i = (CE(S_i) + CE(S^T_i)) / 2 with S = scale * image @ text^T; computed in fp32 whatever the autocast. The n x n matrix is held whole.

    Args:
        image: Normalised embeddings.
        text: Normalised embeddings.
        scale: 1 / temperature, > 0.
        positives: Which image rows and text columns belong together; the diagonal when absent. As a matrix: True where they do.

    Returns:
        One value per pair; log n at chance.

    Source: Yang et al. 2023, adaptive contrastive loss; the mean of both directions as in the official code.
    """
    with torch.autocast(image.device.type, enabled=False):
        precise = torch.float64 if image.dtype == torch.float64 else torch.float32
        logits = scale * image.to(precise) @ text.to(precise).T
        if isinstance(positives, Positives):
            positives = positives.matrix()
        if positives is None:
            target = transposed = torch.arange(len(logits), device=logits.device)
        else:
            share = positives.to(logits.dtype)
            target, transposed = share / share.sum(1, keepdim=True), (share / share.sum(0)).T
        rows = F.cross_entropy(logits, target, reduction="none")
        columns = F.cross_entropy(logits.T, transposed, reduction="none")
        return (rows + columns) / 2
