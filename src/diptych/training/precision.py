"""In which number format the towers compute. Losses are always fp32."""

from contextlib import AbstractContextManager
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]


def choose_precision(precision: Precision, device: torch.device) -> tuple[Literal["fp32", "bf16"], str]:
    """Return the format and a sentence that says why; `auto` takes bf16 autocast where the processor computes it natively."""
    if precision != "auto":
        return precision, f"{precision}, as asked."
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported()
    else:
        native = device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if native:
        return "bf16", f"bf16 autocast: this {device.type} multiplies bf16 natively. Losses stay fp32."
    return "fp32", f"fp32: this {device.type} has no native bf16."


def autocast(precision: Literal["fp32", "bf16"], device: torch.device) -> AbstractContextManager[None]:
    """Return the context to run towers in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
