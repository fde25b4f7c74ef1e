"""Synthetic captions: whatever can say what an image shows fills the role `synthetic` of a source."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from diptych.curate.source_table import check_ending, source_table, write_table
from diptych.data.images import decode
from diptych.data.scenes import NUMBERS, join, plural
from diptych.data.sources import AbstractSource
from diptych.data.texts import WithTexts
from diptych.errors import CheckpointError, ImageError, OfflineError, require
from diptych.types import Sample, Text


class AbstractCaptioner(ABC):
    """Says what images show."""

    @abstractmethod
    def caption(self, samples: Sequence[Sample]) -> list[str]:
        """Return one caption per sample, empty where there is nothing to say.

        Raises:
            ImageError: If an image is missing or cannot be decoded.
        """


class RegionCaptioner(AbstractCaptioner):
    """Names and counts the objects whose boxes are known, without colour, size or place: `two cats and a dog`."""

    def caption(self, samples: Sequence[Sample]) -> list[str]:
        """Return one caption per sample; empty for samples without regions."""
        return [
            _counted(Counter(str(r.attributes.get("noun", r.phrase)) for r in sample.regions)) for sample in samples
        ]


class ImageCaptioner(AbstractCaptioner):
    """Any image-to-text model of transformers (extra `hf`): BLIP, GIT, ViT-GPT2 and the like. Greedy, hence repeatable."""

    def __init__(
        self, path: str, *, prompt: str | None = None, max_tokens: int = 30, offline: bool = False, device: str = "cpu"
    ) -> None:
        """Load the model.

        Args:
            path: A folder, or a name on the Hugging Face hub.
            prompt: Words that the caption begins with or answers, as the model was trained to expect; they are not part of the caption.
            max_tokens: Longest caption, in the model's tokens.
            offline: Never touch the network.
            device: Where it runs.

        Raises:
            OfflineError: If the model is neither a folder nor in the cache, and `offline` is set.
            CheckpointError: If it is no image-to-text model, or is damaged.
        """
        transformers = require("transformers", "hf")
        self.prompt, self.max_tokens, self.device = prompt, max_tokens, device
        options = {"local_files_only": offline or Path(path).is_dir()}
        try:
            self.model: Any = (
                transformers.AutoModelForImageTextToText.from_pretrained(path, **options).eval().to(device)
            )
            self.images: Any = transformers.AutoImageProcessor.from_pretrained(path, **options)
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, **options)
        except (OSError, ValueError) as error:
            if offline and not Path(path).is_dir():
                raise OfflineError(
                    f"{path} is no folder, and not in the cache: {error}. Fetch it once without offline."
                ) from error
            raise CheckpointError(f"{path} is no image-to-text model of transformers: {error}") from error

    @torch.inference_mode()
    def caption(self, samples: Sequence[Sample]) -> list[str]:
        """Return one caption per sample."""
        pictures = [decode(_present(sample)) for sample in samples]
        inputs = self.images(images=pictures, return_tensors="pt").to(self.device)
        if self.prompt is not None:
            words = self.tokenizer([self.prompt] * len(pictures), return_tensors="pt")
            inputs |= {name: words[name].to(self.device) for name in ("input_ids", "attention_mask")}
        ids = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False, num_beams=1)
        found = (" ".join(text.split()) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True))
        return [text.removeprefix(self.prompt or "").strip() for text in found]


def add_captions(
    source: AbstractSource,
    captioner: AbstractCaptioner,
    *,
    batch_size: int = 16,
    advance: Callable[[int], None] | None = None,
) -> WithTexts:
    """Return the source with one more text per sample, of the role `synthetic`.

    Samples whose image cannot be read, or of which the captioner has nothing to say, get none; a note of the result counts them.

    Args:
        source: Images.
        captioner: Says what they show.
        batch_size: Images per call.
        advance: Progress.
    """
    texts: list[tuple[Text, ...]] = [()] * len(source)
    for start in range(0, len(source), batch_size):
        places = range(start, min(start + batch_size, len(source)))
        read = {place: sample for place in places if (sample := _readable(source, place)) is not None}
        said = captioner.caption(list(read.values())) if read else []
        for place, caption in zip(read, said, strict=True):
            texts[place] = (Text(caption, "synthetic"),) if caption.strip() else ()
        if advance is not None:
            advance(len(places))
    captioned = WithTexts(source, texts)
    if silent := texts.count(()):
        captioned.notes += (f"{silent:,} of {len(texts):,} samples got no synthetic caption.",)
    return captioned


def write_captions(
    source: AbstractSource,
    out: Path,
    captioner: AbstractCaptioner,
    *,
    batch_size: int = 16,
    advance: Callable[[int], None] | None = None,
) -> Path:
    """Write the source as a table with a column `synthetic`, whose role every reader of tables knows; return its path.

    Args:
        source: Images, with or without texts.
        out: A .parquet or .jsonl file.
        captioner: Says what they show.
        batch_size: Images per call.
        advance: Progress.
    """
    check_ending(out)
    captioned = add_captions(source, captioner, batch_size=batch_size, advance=advance)
    column = [texts[0].text if texts else None for texts in captioned.added]
    write_table(source_table(source, out.parent).append_column("synthetic", pa.array(column, pa.string())), out)
    return out


def _counted(things: Counter[str]) -> str:
    return join([_phrase(noun, count) for noun, count in things.items()]) if things else ""


def _phrase(noun: str, count: int) -> str:
    if count == 1:
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    return f"{NUMBERS[count] if count < len(NUMBERS) else count} {plural(noun)}"


def _present(sample: Sample) -> Any:
    if sample.image is None:
        raise ImageError(f"{sample.key!r} has no image.")
    return sample.image


def _readable(source: AbstractSource, place: int) -> Sample | None:
    """Return a sample whose image can be decoded, or None."""
    try:
        sample = source[place]
        decode(_present(sample))
        return sample
    except ImageError:
        return None
