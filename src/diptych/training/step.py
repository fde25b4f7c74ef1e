"""How the gradient of one optimiser step comes about. The seam between `encode` and `loss` is what the kinds of step differ in.

- `accumulate_gradients`: the plain step, and the mean of several. Each batch contrasts only its own samples.
- `cached_gradients`: several batches are one: the loss sees all samples, the memory holds the activations of one batch at a time.

With several processes both see the batch of all of them, see `distributed`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from diptych.errors import TrainingError
from diptych.training import distributed
from diptych.types import Batch, Encoded, Losses, concatenate, map_tensors, tensors_of
from diptych.verbs import AbstractObjective

StepKind = Literal["accumulated", "cached"]
Autocast = AbstractContextManager[None]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on another device."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def accumulate_gradients(
    objective: AbstractObjective[Encoded], batches: Iterable[Batch], count: int, autocast: Autocast
) -> list[Losses]:
    """Add the gradient of the mean loss of the next `count` batches to the parameters; return the losses, detached.

    With one batch this is the plain step. With several, each contrasts only its own samples: accumulation saves memory but adds no
    negatives.

    Raises:
        TrainingError: If a loss is not finite.
    """
    seen = []
    with _converting_once(objective):
        for number, batch in enumerate(islice(batches, count), start=1):
            distributed.synchronise(objective, on=number == count)
            with autocast:
                encoded = objective.encode(batch)
            losses = _loss(objective, encoded, batch)
            (losses.total / count).backward()
            seen.append(map_tensors(torch.Tensor.detach, losses))
    return seen


def cached_gradients(
    objective: AbstractObjective[Encoded], batches: Iterable[Batch], count: int, autocast: Autocast
) -> list[Losses]:
    """Add the gradient of ONE loss over the samples of `count` batches to the parameters; return that loss, detached.

    First every batch is encoded without a graph, and the loss of all gives the gradient of what was encoded. Then every batch is encoded
    again, with the random numbers of the first time, and that gradient is sent on through the towers. Equal to encoding all batches in
    turn with their graphs kept, at the memory of one batch and the time of one more forward pass.

    Args:
        objective: Any; its `encode` may use dropout, its `loss` its own parameters.
        batches: Gives the `count` batches twice, in the same order, as a `Loader` with `passes=2` does; images are not kept between.
        count: Batches per step.
        autocast: Precision of the towers.

    Raises:
        TrainingError: If the loss is not finite.

    Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", section 3.
    """
    source, device = iter(batches), objective.model.device
    buffers = [buffer.clone() for buffer in objective.buffers()]
    chunks, states = [], []
    with torch.no_grad(), _converting_once(objective):
        for batch in islice(source, count):
            states.append(_generators(device))
            with autocast:
                chunks.append((objective.encode(batch), _light(batch)))
        for buffer, before in zip(objective.buffers(), buffers, strict=True):
            buffer.copy_(before)  # running statistics move once, in the second pass
    encoded = map_tensors(_leaf, concatenate([chunk for chunk, _ in chunks]))
    losses = _loss(objective, encoded, concatenate([batch for _, batch in chunks]))
    losses.total.backward()
    after, start = _generators(device), 0
    gradients = [tensor.grad for tensor in tensors_of(encoded)]
    with _converting_once(objective):
        for number, (batch, state) in enumerate(zip(islice(source, count), states, strict=True), start=1):
            distributed.synchronise(objective, on=number == count)
            _replay(state, device)
            with autocast:
                again = objective.encode(batch)
            _send_back(tensors_of(again), gradients, start)
            start += len(batch)
    _replay(after, device)
    return [map_tensors(torch.Tensor.detach, losses)]


STEPS: dict[StepKind, Callable[..., list[Losses]]] = {"accumulated": accumulate_gradients, "cached": cached_gradients}


def clip_gradients(module: nn.Module, norm: float | None) -> float:
    """Scale gradients down to `norm`; return the norm before.

    Raises:
        TrainingError: If the norm is not finite.
    """
    found = distributed.gradient_norm(module)
    if not found < float("inf"):
        raise TrainingError(f"the gradient norm is {found.item()}. Lower optimizer.lr, or try precision fp32.")
    if norm is not None:
        for parameters in distributed.by_sharding(module.parameters()):
            nn.utils.clip_grads_with_norm_(parameters, norm, found)
    return found.item()


@contextmanager
def _converting_once(objective: AbstractObjective[Encoded]) -> Iterator[None]:
    """Let what autocast has converted of the weights last from batch to batch while open; they do not change within a step.

    Autocast forgets when the outermost context closes, so a context that is off goes around. Sharded weights are not to be kept whole.
    """
    with (
        nullcontext()
        if distributed.is_sharded(objective)
        else torch.autocast(objective.model.device.type, enabled=False)
    ):
        yield


def _loss(objective: AbstractObjective[Encoded], encoded: Encoded, batch: Batch) -> Losses:
    """Return the loss over the samples of all processes, if it is finite."""
    everything = distributed.gather_batch(_light(batch))
    losses = objective.loss(distributed.gather(encoded), everything)
    if not torch.isfinite(losses.total):
        parts = ", ".join(f"{name} = {value.item():g}" for name, value in losses.parts.items())
        raise TrainingError(
            f"the loss is {losses.total.item()} ({parts}; first sample {batch.keys[0]!r}). "
            "Lower optimizer.lr, or look for broken images or texts with `diptych doctor`."
        )
    return losses


def _light(batch: Batch) -> Batch:
    """Return a batch without what only `encode` needs: pixels, and outputs of frozen towers."""
    return replace(batch, images=(), texts=tuple(replace(tokens, output=None) for tokens in batch.texts))


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_(tensor.is_floating_point())


def _send_back(encoded: list[Tensor], gradients: list[Tensor | None], start: int) -> None:
    """Send the rows of the cached gradients that belong to one batch back through its graph."""
    pairs = [
        (tensor, gradient[start : start + len(tensor)][tuple(map(slice, tensor.shape))])
        for tensor, gradient in zip(encoded, gradients, strict=True)
        if gradient is not None and tensor.requires_grad
    ]
    if pairs:
        torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])


def _generators(device: torch.device) -> tuple[Tensor, ...]:
    """Return the states of the random generators that a forward pass may draw from."""
    states = (torch.get_rng_state(),)
    return (*states, torch.cuda.get_rng_state(device)) if device.type == "cuda" else states


def _replay(states: tuple[Tensor, ...], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
