"""Losses of embeddings with labels: what shares a label comes together. Pure functions of tensors, in fp32 whatever the autocast.

Both take any vectors and normalise them. Two views of n samples, each sample a label of its own, make `supervised_contrastive` the loss of SimCLR.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from diptych.losses.full import full


def supervised_contrastive(
    embeddings: Float[Tensor, "n d"], label: Int64[Tensor, " n"], scale: Float[Tensor, ""] | float
) -> Float[Tensor, ""]:
    """Return the supervised contrastive loss (SupCon).

    L = -mean_i mean_{p in P(i)} log softmax_{a != i}(scale z_i . z_a)_p, over the i whose P(i), the others of the same label, is not empty.

    Args:
        embeddings: Any length but 0.
        label: Equal numbers belong together.
        scale: 1 / temperature, > 0.

    Returns:
        A scalar: log(n - 1) at chance and for n equal vectors; 0 with zero gradient where no label occurs twice.

    Source: Khosla et al. 2020, equation 2.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        z = F.normalize(full(embeddings), dim=-1)
        same, own = _pairs(label)
        # The lowest number and not -inf, which would give NaN where a sample is alone.
        logits = (scale * z @ z.T).masked_fill(own, torch.finfo(z.dtype).min)
        positives = same.sum(1)
        found = logits.log_softmax(1).masked_fill(~same, 0).sum(1) / positives.clamp(min=1)
        return -found.sum() / (positives > 0).sum().clamp(min=1)


def pair_margin(
    embeddings: Float[Tensor, "n d"], label: Int64[Tensor, " n"], *, positive: float = 0.0, negative: float = 0.5
) -> Float[Tensor, ""]:
    """Return the contrastive loss with margins on the distances d of unit vectors.

    L = mean max(d_ij - positive, 0) over pairs of one label + mean max(negative - d_ij, 0) over the others; both means run over the pairs that
    are not 0 already.

    Args:
        embeddings: Any length but 0.
        label: Equal numbers belong together.
        positive: Distance up to which a pair of one label is near enough, in [0, 2].
        negative: Distance from which other pairs are far enough, in [0, 2].

    Returns:
        A scalar; 0 where all pairs are as they should be.

    Source: Hadsell et al. 2006, equation 4, with distances instead of their squares.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        z = F.normalize(full(embeddings), dim=-1)
        distance = torch.cdist(
            z, z, compute_mode="donot_use_mm_for_euclid_dist"
        )  # its gradient at distance 0 is 0, not NaN
        same, own = _pairs(label)
        near = (distance - positive).clamp(min=0).masked_fill(~same, 0)
        far = (negative - distance).clamp(min=0).masked_fill(same | own, 0)
        return sum((part.sum() / (part > 0).sum().clamp(min=1) for part in (near, far)), near.new_zeros(()))


def _pairs(label: Int64[Tensor, " n"]) -> tuple[Bool[Tensor, "n n"], Bool[Tensor, "n n"]]:
    """Return which pairs of different samples share a label, and which cells are samples with themselves."""
    own = torch.eye(len(label), dtype=torch.bool, device=label.device)
    return (label[:, None] == label) & ~own, own
