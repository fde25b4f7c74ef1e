"""One optimiser step. The seam between `encode` and `loss` is what step kinds differ in; this file holds the plain one."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import nn

from diptych.errors import TrainingError
from diptych.types import Batch, Encoded, Losses, map_tensors
from diptych.verbs import AbstractObjective


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on another device."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def accumulate_gradients(
    objective: AbstractObjective[Encoded], batches: Sequence[Batch], autocast: AbstractContextManager[None]
) -> list[Losses]:
    """Add the gradient of the mean loss of `batches` to the parameters; return the losses, detached.

    With one batch this is the plain step. With several, each contrasts only its own samples: accumulation saves memory but adds no
    negatives.

    Raises:
        TrainingError: If a loss is not finite.
    """
    seen = []
    for batch in batches:
        with autocast:
            encoded = objective.encode(batch)
        losses = objective.loss(encoded, replace(batch, images=()))
        if not torch.isfinite(losses.total):
            parts = ", ".join(f"{name} = {value.item():g}" for name, value in losses.parts.items())
            raise TrainingError(
                f"the loss is {losses.total.item()} ({parts}; first sample {batch.keys[0]!r}). "
                "Lower optimizer.lr, or look for broken images or texts with `diptych doctor`."
            )
        (losses.total / len(batches)).backward()
        seen.append(map_tensors(torch.Tensor.detach, losses))
    return seen


def clip_gradients(module: nn.Module, norm: float | None) -> float:
    """Scale gradients down to `norm`; return the norm before.

    Raises:
        TrainingError: If the norm is not finite.
    """
    found = float(nn.utils.clip_grad_norm_(module.parameters(), norm if norm is not None else float("inf")))
    if not found < float("inf"):
        raise TrainingError(f"the gradient norm is {found}. Lower optimizer.lr, or try precision fp32.")
    return found
