"""Projected gradient ascent: how far pixels can take a loss while none moves by more than eps. For audits of a model, and for hardening it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.data.tokenizer import hash_strings
from diptych.errors import ConfigError
from diptych.models.perturbation import LEVELS, check_eps, project

Views = tuple[Float[Tensor, "b 3 _h _w"], ...]


@dataclass(frozen=True)
class PGDConfig:
    """One ascent.

    Attributes:
        eps: Bound of the change of each channel of each pixel, in levels of 255; 0 changes nothing.
        steps: Gradients taken.
        step_size: Of one step, in units of eps.
    """

    eps: float = 0.0
    steps: int = 10
    step_size: float = 0.25

    def __post_init__(self) -> None:
        check_eps(self.eps)
        if self.steps < 1 or self.step_size <= 0:
            raise ConfigError(f"PGD needs steps >= 1 and a step_size > 0, not {self.steps} and {self.step_size:g}.")


def ascend(
    loss: Callable[[Views], Float[Tensor, ""]], views: Views, config: PGDConfig, *, start: Views | None = None
) -> Views:
    """Return views whose loss is larger: x <- project(x + step_size * eps * sign(grad loss(x))), `steps` times.

    For a loss that is linear in the pixels one step of size 1 is the exact maximum, where nothing is cut to [0, 1]. No parameter gets a
    gradient, and gradients that parameters have stay as they are. Inference mode must be off.

    Args:
        loss: A number for all images together.
        views: Clean, in [0, 1].
        config: Settings; with eps 0 the views come back as they are.
        start: Values in [-1, 1], in units of eps, where the ascent begins; at the clean views when absent.

    Source: Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks", section 2.1.
    """
    if config.eps == 0:
        return views
    radius, moved = config.eps / LEVELS, views
    if start is not None:
        moved = tuple(project(x + radius * s, x, config.eps) for x, s in zip(views, start, strict=True))
    for _ in range(config.steps):
        moved = tuple(x.detach().requires_grad_() for x in moved)
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(moved), moved, materialize_grads=True)
        moved = tuple(
            project(x + config.step_size * radius * gradient.sign(), clean, config.eps)
            for x, gradient, clean in zip(moved, gradients, views, strict=True)
        )
    return tuple(x.detach() for x in moved)


def random_start(views: Views, keys: Sequence[str], seed: str) -> Views:
    """Return uniform values in [-1, 1] that follow from `seed`, the key of the sample and the number of the view alone."""
    return tuple(
        torch.stack([_uniform(view.shape[1:], f"{seed}\n{number}\n{key}") for key in keys]).to(view)
        for number, view in enumerate(views)
    )


def _uniform(shape: torch.Size, seed: str) -> Tensor:
    generator = torch.Generator().manual_seed(int(hash_strings([seed])[0]))
    return torch.rand(shape, generator=generator) * 2 - 1
