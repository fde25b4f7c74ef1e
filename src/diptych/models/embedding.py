"""From samples and strings to embeddings on the CPU, for evaluation and use; nothing here trains."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from diptych.data.images import decode
from diptych.data.sources import AbstractSource
from diptych.data.transforms import preprocess
from diptych.errors import ImageError
from diptych.models.dual import DualEncoder
from diptych.models.fusing import fused_images
from diptych.models.memory import Shown, TowerMemory
from diptych.models.perturbation import as_floats
from diptych.models.precision import Precision, autocast, choose_precision, first_in_fp32
from diptych.types import Sample, Text, map_tensors

Change = Callable[[Float[Tensor, "b 3 h w"]], Float[Tensor, "b 3 h w"]]
"""Makes other pixels of a batch's, all in [0, 1]."""

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
def inference(model: DualEncoder, precision: Precision = "fp32") -> Iterator[None]:
    """Put the model in eval mode without gradients while the context is open.

    Args:
        model: Any.
        precision: Of the towers. In bf16 the first convolutions of an image tower with batch norms stay fp32, see `first_in_fp32`.
    """
    chosen, _ = choose_precision(precision, model.device)
    with eval_mode(model), torch.inference_mode(), autocast(chosen, model.device):
        with first_in_fp32(model.vision, on=chosen == "bf16"):
            yield


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode while the context is open; gradients stay possible, for those with respect to the input."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def looking(model: DualEncoder, precision: Precision = "fp32") -> Iterator[None]:
    """Open `inference` for many images: a tower of convolutions then goes through fused kernels, see `models/fusing.py`."""
    with inference(model, precision), fused_images(model, choose_precision(precision, model.device)[0]):
        yield


def embed_images(
    model: DualEncoder,
    samples: Iterable[Sample],
    *,
    batch_size: int = 64,
    advance: Advance | None = None,
    precision: Precision = "fp32",
) -> Float[Tensor, "n d"]:
    """Return one L2-normalised fp32 embedding per sample, on the CPU.

    Args:
        model: Preprocesses as its own policy says.
        samples: Taken lazily, so images are never all in memory.
        batch_size: Images per forward pass.
        advance: Progress.
        precision: Of the towers; `auto` takes bf16 where the processor has it.

    Raises:
        ImageError: If an image is missing or cannot be decoded; names the sample.
    """
    return embed_pixels(model, (evaluation_view(model, sample) for sample in samples), batch_size, advance, precision)


def embed_texts(
    model: DualEncoder,
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    advance: Advance | None = None,
    memory: TowerMemory | None = None,
    precision: Precision = "fp32",
) -> Float[Tensor, "m d"]:
    """Return one L2-normalised fp32 embedding per string, on the CPU.

    Args:
        model: Tokenises as its own policy says.
        texts: None may be empty.
        batch_size: Texts per forward pass.
        advance: Progress.
        memory: Of the model, always used with one precision.
        precision: Of the towers; `auto` takes bf16 where the processor has it.

    Raises:
        TextError: If a text is empty.
    """
    assert memory is None or memory.model is model
    parts = []
    with inference(model, precision):
        for start in range(0, len(texts), batch_size):
            tokens = map_tensors(
                lambda tensor: tensor.to(model.device), model.tokenizer(texts[start : start + batch_size])
            )
            parts.append(model.encode_text(tokens if memory is None else memory.texts(tokens)).cpu())
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
    memory: TowerMemory | None = None,
    precision: Precision = "fp32",
) -> Embedded:
    """Return the embeddings of a source's images and captions; unreadable images are left out and counted.

    Args:
        model: Preprocesses as its own policy says.
        source: Samples; those without captions have images only.
        language: Take the captions and translations of this language (ISO 639-1) instead of all captions.
        batch_size: Images per forward pass.
        progress: Shows progress.
        memory: Of the model and the source, always used with one precision; frozen towers are asked once, and numbers stay the same to the
            last bit.
        precision: Of the towers; `auto` takes bf16 where the processor has it.

    Raises:
        ImageError: If no image can be read.
    """
    bar = progress or no_progress
    shown, images = embed_source_images(
        model, source, batch_size=batch_size, progress=progress, memory=memory, precision=precision
    )
    samples = shown.samples
    pairs = [
        (row, text.text)
        for row, sample in enumerate(samples)
        for text in sample.texts
        if (text.role == "caption" if language is None else describes(text, language))
    ]
    captions, owner = tuple(text for _, text in pairs), tuple(row for row, _ in pairs)
    with bar("embedding texts", len(captions)) as advance:
        texts = embed_texts(model, captions, advance=advance, memory=memory, precision=precision)
    return Embedded(
        shown.rows,
        tuple(sample.key for sample in samples),
        tuple(sample.group for sample in samples),
        images,
        captions,
        owner,
        texts if captions else torch.empty(0, images.shape[1]),
        tuple(sample.label for sample in samples),
        tuple(sample.domain for sample in samples),
        shown.skipped,
    )


def embed_source_images(
    model: DualEncoder,
    source: AbstractSource,
    *,
    batch_size: int = 64,
    progress: ProgressBar | None = None,
    memory: TowerMemory | None = None,
    precision: Precision = "fp32",
    change: Change | None = None,
) -> tuple[Shown, Float[Tensor, "n d"]]:
    """Return the readable samples of a source, without their images, and the embeddings of those; see `embed_source`.

    With `change` the model sees changed images, as under an attack; not with a memory, which would keep what it made of others.
    """
    assert memory is None or (memory.model is model and memory.source is source and change is None)
    bar = progress or no_progress
    batches = readable_batches(model, source, batch_size)
    seen: list[Shown] = []
    parts: list[Tensor] = []
    with bar("embedding images", len(source)) as advance, looking(model, precision):
        for shown, images in batches if memory is None else memory.images(batches, batch_size):
            seen.append(shown)
            if images is not None:
                parts.append(model.encode_image(images if change is None else change(as_floats(images))).cpu())
                advance(len(shown.rows))
    skipped = tuple(reason for shown in seen for reason in shown.skipped)
    if not parts:
        raise none_readable(source, skipped)
    rows = tuple(row for shown in seen for row in shown.rows)
    samples = tuple(sample for shown in seen for sample in shown.samples)
    return Shown(rows, samples, skipped), torch.cat(parts).clone()  # a clone can be used outside of inference mode


def folded(caption: str) -> str:
    """Return a caption as retrieval compares it: captions that differ in case and white space only are the same."""
    return " ".join(caption.casefold().split())


def describes(text: Text, language: str) -> bool:
    """Return whether a text says in this language (ISO 639-1) what its image shows."""
    return text.language == language and text.role in ("caption", "translation")


def readable_batches(
    model: DualEncoder, source: AbstractSource, batch_size: int
) -> Iterator[tuple[Shown, UInt8[Tensor, "b 3 h w"] | None]]:
    """Yield the readable samples of a source with their pixels; at the end what is left, which may be no sample."""
    rows, samples, pixels, skipped = list[int](), list[Sample](), list[Tensor](), list[str]()
    for row, sample, view in readable(model, source, skipped.append):
        rows.append(row)
        samples.append(sample)
        pixels.append(view)
        if len(rows) == batch_size:
            yield Shown(tuple(rows), tuple(samples), tuple(skipped)), torch.stack(pixels).to(model.device)
            rows, samples, pixels = [], [], []
            skipped.clear()
    rest = torch.stack(pixels).to(model.device) if pixels else None
    yield Shown(tuple(rows), tuple(samples), tuple(skipped)), rest


def readable(
    model: DualEncoder, source: AbstractSource, skip: Callable[[str], None]
) -> Iterator[tuple[int, Sample, UInt8[Tensor, "3 h w"]]]:
    """Yield the row of every sample whose image can be read, the sample without its image, and its image as evaluation shows it.

    Args:
        model: Preprocesses as its own policy says.
        source: Samples.
        skip: Told why an image is left out.
    """
    for row in range(len(source)):
        try:
            sample = source[row]
            view = evaluation_view(model, sample)
        except ImageError as error:
            skip(f"{row}: {error}")
            continue
        yield row, replace(sample, image=None, mask=None), view


def left_out(skipped: Sequence[str]) -> tuple[str, ...]:
    """Return a sentence on images that could not be read, for notes and warnings; none where all could."""
    if not skipped:
        return ()
    return (f"{len(skipped)} images could not be read and were left out. First: {skipped[0]}",)


def none_readable(source: AbstractSource, skipped: Sequence[str]) -> ImageError:
    """Return the error to raise where no image of a source can be read."""
    reason = f" First: {skipped[0]}" if skipped else ""
    return ImageError(f"None of the {len(source)} images of {source.name} can be read.{reason}")


def embed_pixels(
    model: DualEncoder,
    pixels: Iterable[Tensor],
    batch_size: int = 64,
    advance: Advance | None = None,
    precision: Precision = "fp32",
) -> Float[Tensor, "n d"]:
    """Return `embed_images` of what `preprocess` made of images; [0, 0] without any."""
    pixels, parts = iter(pixels), []
    with looking(model, precision):
        while batch := list(islice(pixels, batch_size)):
            parts.append(model.encode_image(torch.stack(batch).to(model.device)).cpu())
            if advance is not None:
                advance(len(batch))
    return torch.cat(parts).clone() if parts else torch.empty(0, 0)


def evaluation_view(model: DualEncoder, sample: Sample) -> UInt8[Tensor, "3 h w"]:
    """Return a sample's image as the model sees it in evaluation and use.

    Raises:
        ImageError: If it is missing or cannot be decoded; names the sample.
    """
    if sample.image is None:
        raise ImageError(f"{sample.key!r} has no image. Drop the row, or embed its texts only.")
    try:
        return preprocess(decode(sample.image, background=model.image_policy.background), model.image_policy)
    except ImageError as error:
        raise ImageError(f"{sample.key!r}: {error}") from error


def no_progress(title: str, total: int) -> AbstractContextManager[Advance]:
    """Open no progress bar."""
    del title, total
    return nullcontext(lambda done: None)
