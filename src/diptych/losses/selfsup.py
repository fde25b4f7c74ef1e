"""Losses without negatives, between two views of a sample or two modalities. Pure functions of tensors, in fp32 whatever the autocast.

Row i of one argument belongs to row i of the other. What keeps each from collapsing (every input the same output): a predictor and a
stopped gradient (`cosine_regression`), decorrelated outputs (`redundancy_reduction`), outputs that are used evenly (`sinkhorn`).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diptych.losses.full import full


def cosine_regression(prediction: Float[Tensor, "n d"], target: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Return how far predictions point away from their targets, which get no gradient.

    L = 2 - 2 mean_i cos(prediction_i, target_i)

    Args:
        prediction: Any length.
        target: Any length.

    Returns:
        A scalar in [0, 4]: 0 for the same direction, 2 at chance, 4 for the opposite one.

    Source: Grill et al. 2020 (BYOL), equation 2; up to scale and shift Chen and He 2021 (SimSiam), equation 1.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        prediction, target = F.normalize(full(prediction), dim=-1), F.normalize(full(target).detach(), dim=-1)
        return 2 - 2 * (prediction * target).sum(-1).mean()


def redundancy_reduction(
    first: Float[Tensor, "n d"], second: Float[Tensor, "n d"], *, off_diagonal_weight: float = 5e-3
) -> Float[Tensor, ""]:
    """Return how far the cross-correlation of two sets of features is from the identity.

    L = sum_i (R_ii - 1)^2 + off_diagonal_weight sum_{i != j} R_ij^2 with R = first^T second / n

    Args:
        first: Features that have mean 0 and variance 1 over the batch, as batch normalisation leaves them.
        second: The same.
        off_diagonal_weight: Of decorrelation against agreement.

    Returns:
        A scalar; 0 for R = 1; d (1 + 1/n) + off_diagonal_weight d (d - 1) / n expected for independent features.

    Source: Zbontar et al. 2021 (Barlow Twins), equations 1 and 2.
    """
    with torch.autocast(first.device.type, enabled=False):
        correlation = full(first).T @ full(second) / len(first)
        diagonal = correlation.diagonal()
        others = correlation - torch.diag(diagonal)
        return (diagonal - 1).square().sum() + off_diagonal_weight * others.square().sum()


@torch.no_grad()
def sinkhorn(scores: Float[Tensor, "b k"], *, epsilon: float = 0.05, iterations: int = 3) -> Float[Tensor, "b k"]:
    """Return soft assignments of b samples to k codes that use all codes about evenly, without gradient.

    Q = exp(scores / epsilon); then, `iterations` times, every column is scaled to one sum and every row to sum 1. In the limit columns sum
    to b / k. Computed with logarithms, so no epsilon overflows.

    Args:
        scores: Cosines of samples and codes.
        epsilon: Above 0; small gives hard assignments.
        iterations: At least 1.

    Returns:
        Rows that sum to 1; 1 / k everywhere for equal scores.

    Source: Cuturi 2013; Caron et al. 2020 (SwAV), section 3.1.
    """
    with torch.autocast(scores.device.type, enabled=False):
        log_q = full(scores) / epsilon
        for _ in range(iterations):
            log_q = log_q - log_q.logsumexp(0, keepdim=True)
            log_q = log_q - log_q.logsumexp(1, keepdim=True)
        return log_q.exp()


def soft_cross_entropy(logits: Float[Tensor, "b k"], target: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """Return the cross-entropy between distributions: -mean_i sum_k target_ik log softmax(logits_i)_k.

    In a swapped prediction (SwAV) the target is the assignment of another view of the same sample.

    Args:
        logits: Scale included.
        target: Rows that sum to 1.

    Returns:
        A scalar; log k when all logits are equal; at least the mean entropy of the targets.

    Source: Caron et al. 2020, equation 2.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(full(logits), full(target))
