"""Several processes, one run. Only this file knows of ranks; with one process everything in it is the identity.

Every process encodes its part of the batch; `gather` joins the parts, so each computes the same loss of the whole batch. The gradient of the
whole reaches a process for its own rows only, times the number of processes; the mean over processes that `average_gradients` takes
then is the gradient of one process with the whole batch, for what the loss uses itself (temperature) as for the towers.
Whatever an objective's loss does with its batch is therefore right in any number of processes.

Collectives per step: one for the numbers of samples, one per tensor of the encoded record and of the batch, one for the keys, and ONE for
all gradients, after the last backward pass. Launch with `torchrun --nproc-per-node 2 -m diptych train ...`.
"""

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diptych.errors import TrainingError
from diptych.types import Batch, fill_up, join_rows, map_tensors

R = TypeVar("R")


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Join the other processes that `torchrun` started while the context is open; does nothing when there are none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=60))
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise TrainingError(
            f"Another process of this run has stopped ({error}). Start the same command again with --resume."
        ) from error
    finally:
        dist.destroy_process_group()


def part() -> tuple[int, int]:
    """Return which process this is, from 0, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first() -> bool:
    """Return whether this is the process that writes."""
    return part()[0] == 0


def wait() -> None:
    """Return when all processes have come here."""
    if dist.is_initialized():
        dist.barrier()


def gather(record: R) -> R:
    """Return a record with the rows of all processes, in their order; the gradient reaches this process's own rows.

    Processes may have different numbers of rows, and other dimensions of different sizes, which are filled up with zeros.
    """
    if part()[1] == 1:
        return record
    return map_tensors(_gather_rows, record)


def gather_batch(batch: Batch) -> Batch:
    """Return a batch with the samples of all processes."""
    if part()[1] == 1:
        return batch
    keys = gather_objects(batch.keys)
    return replace(gather(batch), keys=tuple(key for some in keys for key in some))


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all processes, in their order."""
    found: list[Any] = [value] * part()[1]
    if dist.is_initialized():
        dist.all_gather_object(found, value)
    return found


def average_gradients(module: nn.Module) -> None:
    """Replace each gradient by its mean over processes, in one collective."""
    if part()[1] == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= part()[1]
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


@torch.no_grad()
def same_weights(module: nn.Module) -> None:
    """Give every process the parameters and buffers of the first one."""
    if dist.is_initialized():
        for value in module.state_dict().values():
            dist.broadcast(value, 0)


def _gather_rows(tensor: Tensor) -> Tensor:
    return _Gather.apply(tensor)  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    """Rows of all processes; backward takes this process's own rows of the gradient, times the number of processes."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        rank, world = part()
        shapes = _shapes(local)
        largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
        padded = fill_up(local.new_zeros(largest[0], *local.shape[1:]), largest[1:])
        padded[tuple(map(slice, local.shape))] = local
        sent = padded.byte() if local.dtype == torch.bool else padded
        parts = [torch.empty_like(sent) for _ in range(world)]
        dist.all_gather(parts, sent)
        ctx.start, ctx.shape, ctx.world = sum(shape[0] for shape in shapes[:rank]), local.shape, world
        rows = [whole[: shape[0]] for whole, shape in zip(parts, shapes, strict=True)]
        return join_rows(rows).to(local.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient[ctx.start : ctx.start + ctx.shape[0]][tuple(map(slice, ctx.shape))]
        return own.mul(ctx.world)


def _shapes(local: Tensor) -> list[Sequence[int]]:
    """Return the shape that each process has."""
    own = torch.tensor(local.shape, device=local.device)
    found = [torch.empty_like(own) for _ in range(part()[1])]
    dist.all_gather(found, own)
    return [shape.tolist() for shape in found]
