"""A student learns from the distribution that a teacher gives over K outputs. Pure functions of tensors, in fp32 whatever the autocast.

Against collapse (every input the same output) the teacher's logits are centred, which keeps one output from winning everywhere, and
sharpened by a low temperature, which keeps all outputs from becoming equal.

Source: Caron et al. 2021 (DINO), section 3.1 and algorithm 1.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def teacher_distribution(
    logits: Float[Tensor, "*n k"], centre: Float[Tensor, " k"], temperature: Float[Tensor, ""] | float
) -> Float[Tensor, "*n k"]:
    """Return softmax((logits - centre) / temperature), without gradient.

    Args:
        logits: Of the teacher.
        centre: A running mean of such logits, see `moved_centre`; zeros for no centring.
        temperature: Above 0; small is sharp.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return ((_full(logits) - centre) / temperature).softmax(-1).detach()


def cross_entropy_of_views(
    student: Float[Tensor, "b v k"], target: Float[Tensor, "b g k"], temperature: float
) -> Float[Tensor, " b"]:
    """Return, per sample, the mean cross-entropy from what the teacher says of one view to what the student says of another.

    L = 1 / (g (v - 1)) sum_{x <= g} sum_{y != x} -target_x . log softmax(student_y / temperature)

    Args:
        student: Logits of all v views of each sample; the first g views are those that the teacher saw.
        target: Distributions over outputs, from `teacher_distribution`.
        temperature: Of the student, above 0.

    Returns:
        One number per sample; log k when the student's logits are all equal; at least the mean entropy of the targets.

    Source: Caron et al. 2021, equation 3, as a mean instead of a sum.
    """
    views, teachers = student.shape[1], target.shape[1]
    with torch.autocast(student.device.type, enabled=False):
        cost = -_full(target) @ (_full(student) / temperature).log_softmax(-1).mT  # [b g v]
        own = torch.eye(teachers, views, dtype=torch.bool, device=cost.device)
        return cost.masked_fill(own, 0.0).sum((1, 2)) / (teachers * (views - 1))


def moved_centre(centre: Float[Tensor, " k"], mean_logits: Float[Tensor, " k"], momentum: float) -> Float[Tensor, " k"]:
    """Return momentum * centre + (1 - momentum) * mean_logits.

    Args:
        centre: As it was.
        mean_logits: Of the teacher, over all samples and views of a step.
        momentum: In [0, 1]; 1 never moves.

    Source: Caron et al. 2021, equation 4.
    """
    return momentum * centre + (1 - momentum) * _full(mean_logits).detach()


def warmed_up(step: int, start: float, end: float, steps: int) -> float:
    """Return a value that goes from `start` to `end` in a straight line over the first `steps` steps, and stays there.

    Args:
        step: Steps taken so far.
        start: Value before the first step.
        end: Value after `steps` steps.
        steps: 0 for no warm-up.
    """
    return end if step >= steps else start + (end - start) * step / steps


def used_share(target: Float[Tensor, "n k"]) -> Float[Tensor, ""]:
    """Return the entropy of the mean distribution over log k: how evenly a batch uses the outputs.

    Returns:
        A number in [0, 1]; 1 when all outputs are used alike, 0 when one takes everything (collapse).
    """
    entropy: Tensor = torch.special.entr(_full(target).mean(0)).sum()
    return entropy / math.log(target.shape[-1])


def _full(x: Tensor) -> Tensor:
    """Return at least fp32; fp64 stays, for gradient checks."""
    return x if x.dtype == torch.float64 else x.float()
