"""From samples and strings to embeddings on the CPU, for evaluation and use; nothing here trains."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diptych.data.images import decode
from diptych.data.sources import AbstractSource
from diptych.data.transforms import preprocess
from diptych.errors import ImageError
from diptych.models.dual import DualEncoder
from diptych.types import Sample, Text, map_tensors

Advance = Callable[[int], None]
"""Called with the number of items done since the last call, to move a progress bar."""

ProgressBar = Callable[[str, int], AbstractContextManager[Advance]]
"""Opens a progress bar with a title over so many items."""


@dataclass(frozen=True)
class Embedded:
    """A source as a model sees it.

    Attributes:
        rows: Of the images, in their source.
        keys: Of the images.
        groups: Of the images; those of one group are positives of each other's captions.
        images: One embedding per image.
        captions: All texts measured, grouped by image.
        owner: Row of `images` for each caption.
        texts: One embedding per caption.
        labels: One per image, None where unknown.
        domains: One per image, None where unknown.
        skipped: Images left out because they could not be read, with reasons.
    """

    rows: tuple[int, ...]
    keys: tuple[str, ...]
    groups: tuple[str, ...]
    images: Float[Tensor, "n d"]
    captions: tuple[str, ...]
    owner: tuple[int, ...]
    texts: Float[Tensor, "m d"]
    labels: tuple[str | None, ...]
    domains: tuple[str | None, ...]
    skipped: tuple[str, ...]


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
    return _embed_pixels(model, (_pixels(model, sample) for sample in samples), batch_size, advance)


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
    return torch.cat(parts).clone() if parts else torch.empty(0, 0)  # a clone can be used outside of inference mode


def embed_source(
    model: DualEncoder,
    source: AbstractSource,
    *,
    language: str | None = None,
    batch_size: int = 64,
    progress: ProgressBar | None = None,
) -> Embedded:
    """Return the embeddings of a source's images and captions; unreadable images are left out and counted.

    Args:
        model: Preprocesses as its own policy says.
        source: Samples; those without captions have images only.
        language: Take the captions and translations of this language (ISO 639-1) instead of all captions.
        batch_size: Images per forward pass.
        progress: Shows progress.

    Raises:
        ImageError: If no image can be read.
    """
    bar = progress or _no_progress
    rows: list[int] = []
    samples: list[Sample] = []
    skipped: list[str] = []

    def readable() -> Iterator[Tensor]:
        for index in range(len(source)):
            try:
                sample = source[index]
                pixels = _pixels(model, sample)
            except ImageError as error:
                skipped.append(f"{index}: {error}")
                continue
            rows.append(index)
            samples.append(replace(sample, image=None, mask=None))
            yield pixels

    with bar("embedding images", len(source)) as advance:
        images = _embed_pixels(model, readable(), batch_size, advance)
    if not samples:
        reason = f" First: {skipped[0]}" if skipped else ""
        raise ImageError(f"None of the {len(source)} images of {source.name} can be read.{reason}")
    pairs = [
        (row, text.text)
        for row, sample in enumerate(samples)
        for text in sample.texts
        if (text.role == "caption" if language is None else describes(text, language))
    ]
    captions, owner = tuple(text for _, text in pairs), tuple(row for row, _ in pairs)
    with bar("embedding texts", len(captions)) as advance:
        texts = embed_texts(model, captions, advance=advance) if captions else torch.empty(0, images.shape[1])
    return Embedded(
        tuple(rows),
        tuple(sample.key for sample in samples),
        tuple(sample.group for sample in samples),
        images,
        captions,
        owner,
        texts,
        tuple(sample.label for sample in samples),
        tuple(sample.domain for sample in samples),
        tuple(skipped),
    )


def folded(caption: str) -> str:
    """Return a caption as retrieval compares it: captions that differ in case and white space only are the same."""
    return " ".join(caption.casefold().split())


def describes(text: Text, language: str) -> bool:
    """Return whether a text says in this language (ISO 639-1) what its image shows."""
    return text.language == language and text.role in ("caption", "translation")


def _embed_pixels(
    model: DualEncoder, pixels: Iterable[Tensor], batch_size: int, advance: Advance | None
) -> Float[Tensor, "n d"]:
    pixels, parts = iter(pixels), []
    with inference(model):
        while batch := list(islice(pixels, batch_size)):
            parts.append(model.encode_image(torch.stack(batch).to(model.device)).cpu())
            if advance is not None:
                advance(len(batch))
    return torch.cat(parts).clone() if parts else torch.empty(0, 0)


def _pixels(model: DualEncoder, sample: Sample) -> UInt8[Tensor, "3 h w"]:
    """Return the evaluation view of a sample's image."""
    if sample.image is None:
        raise ImageError(f"{sample.key!r} has no image. Drop the row, or embed its texts only.")
    try:
        return preprocess(decode(sample.image, background=model.image_policy.background), model.image_policy)
    except ImageError as error:
        raise ImageError(f"{sample.key!r}: {error}") from error


def _no_progress(title: str, total: int) -> AbstractContextManager[Advance]:
    del title, total
    return nullcontext(lambda done: None)
