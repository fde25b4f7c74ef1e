"""How fast a run computes, as a share of what the machine can: floating-point operations counted, peak measured, choices said."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from diptych.models.dual import DualEncoder
from diptych.models.precision import autocast, is_convolutional
from diptych.models.transformer import Attention, plain_up_to
from diptych.training.levers import SpeedConfig

_SIDE, _TRIES = 1024, 5


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    del rest, named
    return int(sdpa_flop_count(query, key, value))


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    del rest, named
    return int(sdpa_backward_flop_count(gradient, query, key, value))


# torch's counter knows the fused kernels of GPUs only.
_CPU_ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


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
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
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


def choices(model: DualEncoder, precision: Literal["fp32", "bf16"], config: SpeedConfig, peak: float) -> Iterator[str]:
    """Yield one sentence for each way in which towers are computed, and why that one.

    Args:
        model: On its device.
        precision: Of the towers.
        config: What was asked for.
        peak: From `matmul_peak`.
    """
    threads = torch.get_num_threads()
    yield f"Threads: {threads}; a large matrix product reaches {peak:,.0f} GFLOP/s with them. OMP_NUM_THREADS sets another number."
    if is_convolutional(model.vision):
        yield "Memory format: channels_last, since the image tower is one of convolutions."
    for name, tower in (("image", model.vision), ("text", model.text)):
        if kernel := _attention(tower, precision, model.device):
            yield f"Attention of the {name} tower: {kernel}."
    if not config.compile:
        yield "Compile: off, unless speed.compile asks for it."
    if not config.texts_by_length:
        yield "Texts of a batch are padded to the longest, since speed.texts_by_length is off."


def _attention(tower: nn.Module, precision: Literal["fp32", "bf16"], device: torch.device) -> str | None:
    """Return which kernel a tower's attention takes; None where it has none, or does not say."""
    if any(isinstance(module, Attention) for module in tower.modules()):
        positions = plain_up_to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
        return (
            f"two matrix products up to {positions} positions, which is faster in bf16 on a CPU"
            if positions
            else "fused"
        )
    return getattr(getattr(getattr(tower, "model", None), "config", None), "_attn_implementation", None)
