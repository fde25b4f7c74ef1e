"""Weights that hold on to what they were, each as firmly as what was known depends on it. Pure functions of tensors.

Source: Kirkpatrick et al. 2017 (EWC), section 2.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diptych.losses.full import full


def diagonal_fisher(
    logits: Callable[[], Float[Tensor, "n k"]], weights: Sequence[Tensor], generator: torch.Generator
) -> list[Tensor]:
    """Return an estimate of the diagonal of the Fisher information: sum_i E_y~p(.|x_i) (d log p(y | x_i) / d theta)^2.

    One backward pass: labels are drawn from the model's own answers, so gradients of different samples are independent and of mean zero, and
    the square of their sum is the sum of their squares in expectation. It is unbiased, and never below 0.

    Args:
        logits: Returns the model's answers about n samples, with gradient.
        weights: Which gradients are asked for; what the answers do not depend on gets 0.
        generator: Of the labels; on the device of the logits.

    Returns:
        One tensor per weight, the sum over samples. p_j (1 - p_j) for one sample whose logits are themselves the weights.

    Source: Martens 2020, section 5 (labels from the model); Liu et al. 2024 (Sophia), algorithm 2 (one pass for a batch).
    """
    answers = full(logits())
    labels = torch.multinomial(answers.detach().softmax(-1), 1, generator=generator)[:, 0]
    total = F.cross_entropy(answers, labels, reduction="sum")
    gradients = torch.autograd.grad(total, list(weights), allow_unused=True, materialize_grads=True)
    return [gradient.square() for gradient in gradients]


def weighted_distance(
    weights: Sequence[Tensor], anchors: Sequence[Tensor], importance: Sequence[Tensor]
) -> Float[Tensor, ""]:
    """Return 1/2 sum_p F_p (theta_p - theta*_p)^2: EWC's penalty; 0 at the anchors.

    Added to a task's loss a/2 (theta - b)^2 it moves the least loss to (a b + F theta*) / (a + F).

    Args:
        weights: theta; they get the gradient.
        anchors: theta*, where the importance was measured.
        importance: F, 0 or more; all 2 make it the squared distance.

    Source: Kirkpatrick et al. 2017, equation 3.
    """
    parts = [
        (firm * (own - anchor.detach()).square()).sum()
        for own, anchor, firm in zip(weights, anchors, importance, strict=True)
    ]
    return torch.stack(parts).sum() / 2
