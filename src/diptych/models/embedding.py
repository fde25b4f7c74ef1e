"""From samples and strings to embeddings on the CPU, for evaluation and use; nothing here trains."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diptych.data.images import decode
from diptych.data.transforms import preprocess
from diptych.errors import ImageError
from diptych.models.dual import DualEncoder
from diptych.types import Sample, map_tensors

Advance = Callable[[int], None]
"""Called with the number of items done since the last call, to move a progress bar."""


@contextmanager
def inference(model: DualEncoder) -> Iterator[None]:
    """Put the model in eval mode without gradients while the context is open."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def embed_images(
    model: DualEncoder, samples: Iterable[Sample], *, batch_size: int = 64, advance: Advance | None = None
) -> Float[Tensor, "n d"]:
    """Return one L2-normalised fp32 embedding per sample, on the CPU.

    Args:
        model: Preprocesses as its own policy says.
        samples: Taken lazily, so images are never all in memory.
        batch_size: Images per forward pass.
        advance: Progress.

    Raises:
        ImageError: If an image is missing or cannot be decoded; names the sample.
    """
    policy, samples = model.image_policy, iter(samples)
    parts = []
    with inference(model):
        while batch := list(islice(samples, batch_size)):
            pixels = torch.stack([preprocess(_decode(sample, policy.background), policy) for sample in batch])
            parts.append(model.encode_image(pixels.to(model.device)).cpu())
            if advance is not None:
                advance(len(batch))
    return torch.cat(parts).clone() if parts else torch.empty(0, 0)


def embed_texts(
    model: DualEncoder, texts: Sequence[str], *, batch_size: int = 256, advance: Advance | None = None
) -> Float[Tensor, "m d"]:
    """Return one L2-normalised fp32 embedding per string, on the CPU.

    Args:
        model: Tokenises as its own policy says.
        texts: None may be empty.
        batch_size: Texts per forward pass.
        advance: Progress.

    Raises:
        TextError: If a text is empty.
    """
    parts = []
    with inference(model):
        for start in range(0, len(texts), batch_size):
            tokens = model.tokenizer(texts[start : start + batch_size])
            parts.append(model.encode_text(map_tensors(lambda tensor: tensor.to(model.device), tokens)).cpu())
            if advance is not None:
                advance(len(tokens.ids))
    return torch.cat(parts).clone() if parts else torch.empty(0, 0)


def _decode(sample: Sample, background: tuple[int, int, int]) -> Image.Image:
    if sample.image is None:
        raise ImageError(f"{sample.key!r} has no image. Drop the row, or embed its texts only.")
    try:
        return decode(sample.image, background=background)
    except ImageError as error:
        raise ImageError(f"{sample.key!r}: {error}") from error
