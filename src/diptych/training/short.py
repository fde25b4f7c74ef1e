"""A loop for small modules on data that lie in memory, such as adapters on frozen towers: no loader, no checkpoints, no log."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import TypeVar

import torch
from torch import nn

from diptych.errors import TrainingError
from diptych.training.optim import OptimizerConfig, make_optimizer, schedule, set_learning_rate
from diptych.training.step import clip_gradients
from diptych.types import Losses, map_tensors, tensors_of

B = TypeVar("B")


def minimise(
    module: nn.Module, losses: Callable[[B], Losses], batches: Iterable[B], steps: int, config: OptimizerConfig
) -> None:
    """Move the weights of a module down the gradient of a loss, in place.

    Args:
        module: What of it wants gradients is moved.
        losses: Of one batch.
        batches: At least `steps` of them.
        steps: How many are taken.
        config: Rates and their course.

    Raises:
        TrainingError: If a loss or a gradient is not finite; names the step.
    """
    optimizer = make_optimizer(module, (), config)
    for step, batch in enumerate(islice(batches, steps)):
        set_learning_rate(optimizer, schedule(step, steps, config.warmup_rate))
        found = losses(batch)
        if not torch.isfinite(found.total):
            parts = ", ".join(f"{name} = {value.item():g}" for name, value in found.parts.items())
            raise TrainingError(f"the loss is {found.total.item()} at step {step} ({parts}). Lower optimizer.lr.")
        optimizer.zero_grad()
        found.total.backward()
        clip_gradients(module, config.clip_norm)
        optimizer.step()


def shuffled(data: B, size: int, generator: torch.Generator) -> Iterator[B]:
    """Yield batches of a record of tensors without end: every row once, in an order drawn anew, before any comes again.

    Rows that do not fill a batch are left out until the next order.
    """
    tensors = tensors_of(data)
    while True:
        order = torch.randperm(len(tensors[0]), generator=generator).to(tensors[0].device)
        for start in range(0, len(order) - size + 1, size):
            yield map_tensors(partial(torch.index_select, dim=0, index=order[start : start + size]), data)
