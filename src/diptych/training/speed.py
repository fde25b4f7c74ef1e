"""How fast a run computes, as a share of what the machine can: floating-point operations counted, peak measured."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from diptych.training.precision import autocast

_SIDE, _TRIES = 1024, 5


@dataclass
class Flops:
    """Floating-point operations of matrix products, convolutions and attention, a multiplication and an addition counted as two.

    Attributes:
        count: How many, once the counting context has closed.
    """

    count: int = 0


@contextmanager
def counting(*, on: bool = True) -> Iterator[Flops]:
    """Count the operations of what runs while the context is open, forward and backward; `on` off counts nothing and costs nothing."""
    found = Flops()
    if not on:
        yield found
        return
    with FlopCounterMode(display=False) as counter:
        yield found
    found.count = counter.get_total_flops()


@lru_cache
def matmul_peak(device: torch.device, precision: Literal["fp32", "bf16"]) -> float:
    """Return the GFLOP/s of a 1024 x 1024 matrix product in this process, the best of five; about a tenth of a second."""
    a, b = torch.ones(_SIDE, _SIDE, device=device), torch.ones(_SIDE, _SIDE, device=device)  # draws no random numbers
    best = 0.0
    with torch.no_grad(), autocast(precision, device):
        a @ b
        for _ in range(_TRIES):
            began = time.perf_counter()
            (a @ b)[0, 0].item()  # on a GPU, waits for the result
            best = max(best, 2 * _SIDE**3 / (time.perf_counter() - began) / 1e9)
    return best
