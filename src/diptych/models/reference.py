"""Images and texts that a model is asked about again and again beside those it trains on. What does not change is computed once.

Answers are remembered for the process under a hash of the weights and of what was asked, so that stages and runs that ask the same of equal
weights share them.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from diptych.data.images import decode
from diptych.data.sources import open_source
from diptych.data.transforms import ImagePolicy, preprocess
from diptych.errors import ImageError
from diptych.models.dual import DualEncoder
from diptych.models.embedding import embed_texts
from diptych.types import TowerOutput, concatenate

AT_ONCE = 64
"""Images per forward pass."""

ANSWERS = 4
"""How many answers are remembered; the oldest goes first."""

R = TypeVar("R")
_answers: dict[str, Any] = {}


@lru_cache(maxsize=1)
def reference_pixels(source: str, policy: ImagePolicy, *, count: int | None, seed: int) -> UInt8[Tensor, "m 3 h w"]:
    """Return images as evaluation shows them, all of them in memory (150 kB each at 224 pixels).

    Args:
        source: As `open_source` takes it.
        policy: Preprocessing of the model that will see them.
        count: How many are drawn at random; None for all.
        seed: Of the drawing.

    Raises:
        ImageError: If one is missing or cannot be read.
    """
    samples = open_source(source)
    order = np.random.default_rng(seed).permutation(len(samples))[:count]
    pixels = []
    for index in np.sort(order).tolist():
        sample = samples[index]
        try:
            if sample.image is None:
                raise ImageError("there is none.")
            pixels.append(preprocess(decode(sample.image, background=policy.background), policy))
        except ImageError as error:
            raise ImageError(
                f"The image of {sample.key!r} in the reference {source} cannot be used: {error}"
            ) from error
    return torch.stack(pixels)


def reference_texts(source: str) -> tuple[str, ...]:
    """Return every different text of a source, in its order."""
    samples = open_source(source)
    return tuple(dict.fromkeys(text.text for index in range(len(samples)) for text in samples.texts(index)))


def tower_outputs(model: DualEncoder, pixels: UInt8[Tensor, "m 3 h w"]) -> TowerOutput:
    """Return what the image tower makes of images, in eval mode and without gradient; stands in for them while the tower is frozen."""
    return _remembered("outputs", (model.vision, pixels), lambda: _in_parts(model, pixels, model.image_output))


def image_embeddings(model: DualEncoder, pixels: UInt8[Tensor, "m 3 h w"]) -> Float[Tensor, "m d"]:
    """Return embeddings of images, in eval mode and without gradient."""
    return _remembered("images", (model, pixels), lambda: _in_parts(model, pixels, model.encode_image))


def text_embeddings(model: DualEncoder, texts: Sequence[str]) -> Float[Tensor, "m d"]:
    """Return embeddings of texts, in eval mode and without gradient."""
    asked = (model, *texts)
    return _remembered("texts", asked, lambda: embed_texts(model, texts).to(model.device))


def _in_parts(model: DualEncoder, pixels: Tensor, ask: Callable[[Tensor], R]) -> R:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        parts = [ask(part.to(model.device)) for part in pixels.split(AT_ONCE)]
    for module, mode in modes:
        module.training = mode
    return concatenate(parts)


def _remembered(kind: str, asked: tuple[object, ...], ask: Callable[[], R]) -> R:
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for part in asked:
        tensors = part.state_dict() if isinstance(part, nn.Module) else {"": part}
        for name, value in tensors.items():
            digest.update(f"\x1f{name}".encode())
            digest.update(_bytes(value) if isinstance(value, Tensor) else str(value).encode())
    key = digest.hexdigest()
    if key not in _answers:
        _answers[key] = ask()
        while len(_answers) > ANSWERS:
            del _answers[next(iter(_answers))]
    return _answers[key]  # type: ignore[no-any-return]


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    return (
        f"{tensor.device}{tensor.dtype}{tuple(tensor.shape)}".encode()
        + plain.view(-1).view(torch.uint8).numpy().tobytes()
    )
