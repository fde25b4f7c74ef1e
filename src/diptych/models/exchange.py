"""Renaming weights between our modules and another library's, both ways, from one list of entries."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.errors import CheckpointError
from diptych.models.dual import DualEncoder


@dataclass(frozen=True)
class Entry:
    """One tensor of the other library and where it goes.

    Attributes:
        theirs: Its name there.
        ours: Names here; several when theirs is fused, equal parts along dimension 0.
        transpose: Whether the matrix is stored the other way round there.
        leading: Dimensions of size 1 that theirs has in front of ours.
    """

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = False
    leading: int = 0


def pair(theirs: str, ours: str) -> Iterator[Entry]:
    """Yield the weight and the bias of a layer with one name on each side."""
    for kind in ("weight", "bias"):
        yield Entry(f"{theirs}.{kind}", (f"{ours}.{kind}",))


def fused(theirs: str, ours: str, parts: Iterable[str], *, joint: str = ".") -> Iterator[Entry]:
    """Yield the weight and the bias of a fused projection; `joint` stands between its name and `weight`."""
    parts = tuple(parts)
    for kind in ("weight", "bias"):
        yield Entry(f"{theirs}{joint}{kind}", tuple(f"{ours}.{part}.{kind}" for part in parts))


def import_weights(model: DualEncoder, weights: dict[str, Tensor], entries: Iterable[Entry]) -> None:
    """Fill every parameter of `model` from another library's tensors.

    Raises:
        CheckpointError: If a tensor is missing or has another shape, or a parameter of ours is left without a value.
    """
    own = model.state_dict()
    unfilled = set(own)
    with torch.no_grad():
        for entry in entries:
            if entry.theirs not in weights:
                raise CheckpointError(f"The weights have no {entry.theirs!r}; they belong to another architecture.")
            value = weights[entry.theirs].T if entry.transpose else weights[entry.theirs]
            parts = value.chunk(len(entry.ours)) if len(entry.ours) > 1 else (value,)
            for name, part in zip(entry.ours, parts, strict=True):
                if part.numel() != own[name].numel():
                    raise CheckpointError(
                        f"{entry.theirs!r} has shape {tuple(value.shape)}, which does not fit {name}."
                    )
                own[name].copy_(part.reshape(own[name].shape))
                unfilled.discard(name)
    if unfilled:
        raise CheckpointError(
            f"The weights leave {len(unfilled)} parameters without a value, first {sorted(unfilled)[0]!r}."
        )


def export_weights(model: DualEncoder, entries: Iterable[Entry]) -> dict[str, Tensor]:
    """Return the tensors of `model` under the other library's names and shapes.

    Raises:
        CheckpointError: If the other library has no place for a parameter.
    """
    own, left = model.state_dict(), set(model.state_dict())
    found = {}
    for entry in entries:
        value = torch.cat([own[name] for name in entry.ours]) if len(entry.ours) > 1 else own[entry.ours[0]]
        value = value.T if entry.transpose else value
        found[entry.theirs] = value.reshape((1,) * entry.leading + tuple(value.shape)).contiguous().clone()
        left -= set(entry.ours)
    if left:
        raise CheckpointError(f"The other format has no place for {sorted(left)[0]!r} ({len(left)} tensors).")
    return found
