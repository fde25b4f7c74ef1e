"""Towers through `torch.compile`: the same computation in fewer, larger kernels, paid for once at the start."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from diptych.models.dual import DualEncoder
from diptych.types import Batch, TowerOutput


@contextmanager
def compiled(
    model: DualEncoder, batch: Batch, autocast: AbstractContextManager[None], *, say: Callable[[str], None]
) -> Iterator[None]:
    """Compile the towers while the context is open, or say why that cannot be.

    Lengths of texts and sizes of batches are symbols in what is compiled, so that other batches need no other code. The names of the
    weights stay.

    Args:
        model: In the modes of its training.
        batch: One of those to come, on the device of the model: it makes the compiler do its work now. Nothing moves but time.
        autocast: Precision of the towers.
        say: Told how long it took, or why nothing is compiled.
    """
    towers = (model.vision, model.text)
    buffers = [buffer.clone() for buffer in model.buffers()]
    devices = [model.device] if model.device.type == "cuda" else []
    began = time.perf_counter()
    try:
        model.vision.compile()
        model.text.compile(dynamic=True)
        with torch.random.fork_rng(devices), autocast:
            _try(model, batch)
        say(f"Compile: both towers, in {time.perf_counter() - began:.0f} s.")
    except Exception as error:  # the compiler's own, a missing C++ compiler, a failed build
        for tower in towers:
            tower._compiled_call_impl = None
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        say(
            f"Compile: off, though asked for: {why} It needs a C++ compiler on a CPU (g++ or clang++), triton on a GPU."
        )
    finally:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)
    try:
        yield
    finally:
        for tower in towers:
            tower._compiled_call_impl = None


@contextmanager
def uncompiled(model: DualEncoder) -> Iterator[None]:
    """Call the towers as they are written while the context is open: evaluation would be compiled anew, for a few batches."""
    before: list[tuple[nn.Module, object]] = [
        (tower, tower._compiled_call_impl) for tower in (model.vision, model.text)
    ]
    for tower, _ in before:
        tower._compiled_call_impl = None
    try:
        yield
    finally:
        for tower, implementation in before:
            tower._compiled_call_impl = implementation  # type: ignore[assignment]


def _try(model: DualEncoder, batch: Batch) -> None:
    """Call the towers on whatever they will be asked for, forward and backward."""
    outputs = [model.image_output(view) for view in batch.images if not isinstance(view, TowerOutput)]
    outputs += [model.text_output(tokens) for tokens in batch.texts if tokens.output is None]
    if trained := [output.pooled.float().sum() for output in outputs if output.pooled.requires_grad]:
        torch.stack(trained).sum().backward()
