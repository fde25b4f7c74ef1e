"""In which number format the towers compute. Losses are always fp32."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

Precision = Literal["auto", "fp32", "bf16"]

FIRST = 5
"""How many convolutions of a tower stay fp32 in bf16: rounding there is carried through the whole tower. Least cosine between embeddings of 100
photos (flickr8k-1k:dev, lite0-minilm) in bf16 and in fp32: 0.9989 with three, 0.9994 with five, for a fifth more time."""


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


def is_convolutional(tower: nn.Module) -> bool:
    """Return whether an image tower is one of convolutions with batch norms."""
    return any(isinstance(module, nn.BatchNorm2d) for module in tower.modules())


@contextmanager
def first_in_fp32(tower: nn.Module, *, on: bool = True, count: int = FIRST) -> Iterator[None]:
    """Compute the first convolutions of a convolutional tower in fp32, whatever autocast says, while open; other towers are left alone."""
    found = [module for module in tower.modules() if isinstance(module, nn.Conv2d)] if is_convolutional(tower) else []
    chosen = found[:count] if on else []
    for module in chosen:
        module.forward = partial(_in_fp32, module.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in chosen:
            del module.forward  # that of its class is back


def _in_fp32(convolve: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    with torch.autocast(pixels.device.type, enabled=False):
        return convolve(pixels.float())
