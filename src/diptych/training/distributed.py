"""Several processes, one run. Only this file knows of ranks; with one process everything in it is the identity.

Every process encodes its part of the batch; `gather` joins the parts, so each computes the same loss of the whole batch. The gradient of the
whole reaches a process for its own rows only, times the number of processes; the mean over processes that `average_gradients` takes
then is the gradient of one process with the whole batch, for what the loss uses itself (temperature) as for the towers.
Whatever an objective's loss does with its batch is therefore right in any number of processes.

Collectives per step: one for the numbers of samples, one per tensor of the encoded record and of the batch, one for the keys, and ONE for
all gradients, after the last backward pass. `shard` cuts towers between processes instead of copying them; their gradients take the same mean,
layer by layer, in that pass. Launch with `torchrun --nproc-per-node 2 -m diptych train ...`.
"""

import datetime
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diptych.errors import ConfigError, TrainingError
from diptych.models.dual import DualEncoder
from diptych.models.modes import is_frozen
from diptych.models.text import AbstractTextTower
from diptych.models.vision import AbstractVisionTower
from diptych.types import Batch, fill_up, join_rows, map_tensors
from diptych.verbs import AbstractObjective

Sharding = Literal["none", "full"]

R = TypeVar("R")
T = TypeVar("T", bound=Tensor)


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
        if "DTensor" in str(error) or "sharding strategy" in str(error):
            raise ConfigError(
                f"Sharded towers can only be called as a whole, and this objective uses some weights of one by themselves ({error}). "
                "Set sharding to none."
            ) from error
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
    """Replace each gradient by its mean over processes, in one collective; those of sharded towers have been in backward."""
    if part()[1] == 1:
        return
    whole, _ = by_sharding(module.parameters())
    gradients = [p.grad for p in whole if p.grad is not None]
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


def shard(objective: AbstractObjective[Any]) -> None:
    """Cut the towers that train: each process keeps a part of every parameter, and so of its gradient and its moments (FSDP2).

    A tower's layers are put together one at a time when they are called, and taken apart again. Of teachers the towers of the
    same side are cut too, so that they can follow. Heads, temperature, an objective's own modules and frozen towers stay whole in every process.

    Source: Zhao et al. 2023, "PyTorch FSDP", arXiv 2304.11277; Rajbhandari et al. 2020, "ZeRO", stage 3.
    """
    if part()[1] == 1:
        warnings.warn(
            "sharding is full, but there is one process, which keeps all. Start several with torchrun.", stacklevel=2
        )
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Outputs of towers are views (the class token of a stream). FSDP warns of those, since changing one in place would lose its gradient.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    model = objective.model
    mesh = init_device_mesh(model.device.type, (part()[1],))
    sides = ((model.vision, AbstractVisionTower), (model.text, AbstractTextTower))
    trained = tuple(kind for tower, kind in sides if not is_frozen(tower))
    for tower in [module for module in objective.modules() if isinstance(module, trained)]:
        for module in (*layers_of(tower), tower):
            # Always taken apart after use, so that outside of a call every parameter is this process's part.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for encoder in [module for module in objective.modules() if isinstance(module, DualEncoder)]:
        encoder.texts_by_length = False  # all processes must call a tower equally often, whatever their texts


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a tower: what its outermost lists hold, in our towers and in those of timm and transformers."""
    for child in module.children():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            yield from layers_of(child)
        elif any(True for _ in child.parameters()):
            yield child


def is_sharded(module: nn.Module) -> bool:
    """Return whether some parameters are cut."""
    return bool(by_sharding(module.parameters())[1])


def is_cut(tensor: Tensor) -> bool:
    """Return whether a tensor is spread over the processes."""
    return hasattr(tensor, "to_local")  # a DTensor; to ask for its type would be to import it, which takes a second


def by_sharding(tensors: Iterable[T]) -> tuple[list[T], list[T]]:
    """Return the tensors that are whole in every process, and those that are cut."""
    found: tuple[list[T], list[T]] = [], []
    for tensor in tensors:
        found[is_cut(tensor)].append(tensor)
    return found


def own_part(tensor: Tensor) -> Tensor:
    """Return the rows of a cut tensor that this process has, sharing their memory; a whole tensor as it is."""
    with torch.no_grad():
        return tensor.to_local() if is_cut(tensor) else tensor  # type: ignore[attr-defined]


def own_rows(tensor: Tensor) -> tuple[int, int | None]:
    """Return which rows of a tensor this process has: from, to (None for the end); as `torch.chunk` deals them out."""
    if not is_cut(tensor):
        return 0, None
    (rank, world), rows = part(), len(tensor)
    size = -(-rows // world)
    return min(rank * size, rows), min((rank + 1) * size, rows)


def synchronise(module: nn.Module, *, on: bool) -> None:
    """Let the next backward pass add up the gradients of sharded towers over processes, or keep them for a later one."""
    layer: Any
    for layer in module.modules():
        if hasattr(layer, "set_requires_gradient_sync"):
            layer.set_requires_gradient_sync(on, recurse=False)


def gradient_norm(module: nn.Module) -> Tensor:
    """Return the norm of all gradients, cut ones included."""
    groups = by_sharding(p.grad for p in module.parameters() if p.grad is not None)
    norms = [nn.utils.get_total_norm(group) for group in groups if group]
    norms = [norm.full_tensor() if is_cut(norm) else norm for norm in norms]  # type: ignore[attr-defined]
    return norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms)


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
