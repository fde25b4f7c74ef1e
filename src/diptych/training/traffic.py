"""What processes send to each other, counted where it leaves: the numbers behind docs/scaling.md."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diptych.training import distributed

_SENT = {
    "allgather": lambda own, world: own * (world - 1),
    "reducescatter": lambda own, world: own * (world - 1),
    "allreduce": lambda own, world: 2 * own * (world - 1) // world,
    "broadcast": lambda own, world: own,
}
"""Bytes that one process sends in a ring, from those of its own part."""


@dataclass
class Traffic:
    """Collectives of one process.

    Attributes:
        calls: How many of each kind: allgather, reducescatter, allreduce, broadcast.
        sent: Bytes that this process sends in them, if they go around in a ring.
    """

    calls: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)


@contextmanager
def counting_traffic() -> Iterator[Traffic]:
    """Count the collectives of this process while the context is open; on a CPU, where backward runs in the thread that asked for it."""
    found = Traffic()
    with _Counting(found):
        yield found


class _Counting(TorchDispatchMode):
    def __init__(self, found: Traffic) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        kind = next((kind for kind in _SENT if kind in name.replace("_", "")), None)
        if kind is not None and "c10d" in namespace:
            own = min(size for size in map(_bytes, args) if size is not None)
            self._found.calls[kind] += 1
            self._found.sent[kind] += _SENT[kind](own, distributed.part()[1])
        return func(*args, **(kwargs or {}))


def _bytes(value: Any) -> int | None:
    """Return the bytes of all tensors in an argument, None if there are none."""
    if isinstance(value, Tensor):
        return value.nbytes
    sizes = [_bytes(item) for item in value] if isinstance(value, (list, tuple)) else []
    return sum(size for size in sizes if size is not None) if any(size is not None for size in sizes) else None
