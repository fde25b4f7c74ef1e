"""A student learns from the distribution that a teacher gives over K outputs. Pure functions of tensors, in fp32 whatever the autocast.

A teacher that stands still needs `soft_cross_entropy` alone. Where it follows its student, both could collapse (every input the same
output): the teacher's logits are then centred, which keeps one output from winning everywhere, and sharpened by a low temperature, which
keeps all outputs from becoming equal.

Source: Caron et al. 2021 (DINO), section 3.1 and algorithm 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.errors import ConfigError
from diptych.losses.full import full


@dataclass(frozen=True)
class AbstractDistillation:
    """Settings of an objective that keeps what a teacher makes of images and sentences, both ways. Subclasses add their own.

    Attributes:
        image_weight: Of the distributions over sentences, one per image.
        text_weight: Of the distributions over images, one per sentence.
        temperature: T; softens both.
    """

    image_weight: float = 1.0
    text_weight: float = 1.0
    temperature: float = 2.0

    @property
    def distils(self) -> bool:
        """Return whether the teacher has a say."""
        return self.image_weight > 0 or self.text_weight > 0


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
        return ((full(logits) - centre) / temperature).softmax(-1).detach()


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
        cost = -full(target) @ (full(student) / temperature).log_softmax(-1).mT  # [b g v]
        own = torch.eye(teachers, views, dtype=torch.bool, device=cost.device)
        return cost.masked_fill(own, 0.0).sum((1, 2)) / (teachers * (views - 1))


def soft_cross_entropy(
    student: Float[Tensor, "n k"], teacher: Float[Tensor, "n k"], temperature: float
) -> Float[Tensor, ""]:
    """Return the cross-entropy from a teacher's softened distribution over k outputs to the student's, times T^2.

    L = -T^2 mean_i sum_j softmax(teacher_i / T)_j log softmax(student_i / T)_j. The factor keeps the size of the gradient as T grows.

    Args:
        student: Logits, the scale included.
        teacher: Logits; they get no gradient.
        temperature: T, above 0.

    Returns:
        A scalar; T^2 log k when the student's logits are all equal; least, at T^2 times the mean entropy of the teacher, when the two differ by
        a constant per row. 0 for k = 1.

    Source: Hinton et al. 2015, section 2; Zheng et al. 2023 (ZSCL), equation 3.
    """
    with torch.autocast(student.device.type, enabled=False):
        target = (full(teacher).detach() / temperature).softmax(-1)
        return -(target * (full(student) / temperature).log_softmax(-1)).sum(-1).mean() * temperature**2


def moved_centre(centre: Float[Tensor, " k"], mean_logits: Float[Tensor, " k"], momentum: float) -> Float[Tensor, " k"]:
    """Return momentum * centre + (1 - momentum) * mean_logits.

    Args:
        centre: As it was.
        mean_logits: Of the teacher, over all samples and views of a step.
        momentum: In [0, 1]; 1 never moves.

    Source: Caron et al. 2021, equation 4.
    """
    return momentum * centre + (1 - momentum) * full(mean_logits).detach()


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
    entropy: Tensor = torch.special.entr(full(target).mean(0)).sum()
    return entropy / math.log(target.shape[-1])


def check_settings(weights: Sequence[float], temperature: float, label_smoothing: float) -> None:
    """Raise ConfigError unless weights are >= 0, the temperature is > 0 and the label smoothing in [0, 1)."""
    if min(weights) < 0 or temperature <= 0 or not 0 <= label_smoothing < 1:
        raise ConfigError(
            f"objective takes weights >= 0, a temperature > 0 and a label_smoothing in [0, 1); they are {tuple(weights)}, "
            f"{temperature} and {label_smoothing}."
        )
