"""The records that cross module borders. All are frozen; none knows how to do anything but describe itself.

Letters in shapes: b local batch, n global batch, d embedding, w tower width, p patches, t tokens, v views, k texts per image, r regions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

Role = Literal["caption", "translation", "rewrite", "synthetic", "hard_negative", "label"]
"""What a text is to its image. `hard_negative` is the only role that does not describe the image."""

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True)
class Text:
    """One text of a sample.

    Attributes:
        text: The string as it stands in the source.
        role: What it is to the image.
        language: ISO 639-1 code, or None when unknown.
    """

    text: str
    role: Role = "caption"
    language: str | None = None


@dataclass(frozen=True, slots=True)
class Region:
    """One object in an image.

    Attributes:
        box: (x0, y0, x1, y1) in pixels of the image, x1 and y1 exclusive.
        phrase: Words that name the object.
        attributes: For example {"tint": "red", "count": 2}.
    """

    box: tuple[float, float, float, float]
    phrase: str
    attributes: Mapping[str, str | int | float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its texts, before any preprocessing.

    Attributes:
        key: Unique inside its source and stable between runs.
        image: Encoded bytes (JPEG, PNG, ...), or uint8 pixels [h, w, 3], or None for text alone.
        texts: All texts of the image, in the order of the source.
        group: Samples with one group are positives of each other; the key when the source names none.
        label: Class name, for classification sources.
        domain: Style or origin, for domain-shift sources.
        regions: Objects with boxes, if known.
        mask: uint8 [h, w], 0 background, i + 1 for pixels of `regions[i]`, 255 where nobody knows.
        relations: (subject region, predicate, object region) triples.
        twin: Key of the sample that differs from this one in a single factor.
    """

    key: str
    image: bytes | np.ndarray | None
    texts: tuple[Text, ...]
    group: str
    label: str | None = None
    domain: str | None = None
    regions: tuple[Region, ...] = ()
    mask: np.ndarray | None = None
    relations: tuple[tuple[int, str, int], ...] = ()
    twin: str | None = None


@dataclass(frozen=True)
class TowerOutput:
    """What every tower returns from its one call.

    Attributes:
        pooled: One vector per sample, before the projection head.
        tokens: Patches in row order (no class token), or text tokens. None for towers that have none.
        mask: True at real tokens; None when all are real.
        grid: (rows, columns) of the patches; None for text.
        layers: The residual stream after each layer asked for, class token included, in the order asked. Of networks of convolutions the
            feature maps after each stage asked for, places in row order; stages differ in size and width.
        attention: Attention probabilities of each layer asked for.
    """

    pooled: Float[Tensor, "b w"]
    tokens: Float[Tensor, "b t w"] | None = None
    mask: Bool[Tensor, "b t"] | None = None
    grid: tuple[int, int] | None = None
    layers: tuple[Float[Tensor, "b _s _w"], ...] = ()
    attention: tuple[Float[Tensor, "b heads s s"], ...] = ()


@dataclass(frozen=True)
class Tokens:
    """One tokenised text per sample.

    Attributes:
        ids: Token ids, padded.
        mask: True at real tokens.
        key: Hash of the string; equal keys are equal strings, hence positives.
        output: What the text tower makes of them, where it is frozen and was asked before; `DualEncoder.text_output` takes it from here.
    """

    ids: Int64[Tensor, "b t"]
    mask: Bool[Tensor, "b t"]
    key: Int64[Tensor, " b"]
    output: TowerOutput | None = None


@dataclass(frozen=True)
class Batch:
    """What the loader hands to an objective.

    Attributes:
        keys: Sample keys.
        images: One tensor per view; view 0 is the main one. Views may differ in size. Still uint8: the model's first op makes them float;
            or floats in [0, 1], where something changed them. Where a frozen image tower was asked before, what it makes of the view;
            `DualEncoder.image_output` takes any of these.
        texts: One record per text column; column 0 is the main one.
        group: Hash of the sample's group; equal values are positives.
        skipped: Why samples that belonged here were left out, one sentence each.
    """

    keys: tuple[str, ...]
    images: tuple[UInt8[Tensor, "b 3 _h _w"] | Float[Tensor, "b 3 _h _w"] | TowerOutput, ...]
    texts: tuple[Tokens, ...]
    group: Int64[Tensor, " b"]
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Encoded:
    """Base of what an objective's `encode` returns.

    Every tensor in it, at any depth, has the samples along dimension 0. That is all the loop needs to cut a batch into chunks,
    to gather it across processes and to cache gradients; what the tensors mean is between `encode` and `loss`.
    """


@dataclass(frozen=True)
class PairEmbeddings(Encoded):
    """L2-normalised embeddings of both sides.

    Attributes:
        images: One [b, d] tensor per view.
        texts: One [b, d] tensor per text column.
    """

    images: tuple[Float[Tensor, "b d"], ...]
    texts: tuple[Float[Tensor, "b d"], ...]


@dataclass(frozen=True)
class Losses:
    """A loss and the parts it was summed from.

    Attributes:
        total: What is differentiated.
        parts: Unweighted parts by name, for the log.
    """

    total: Float[Tensor, ""]
    parts: Mapping[str, Float[Tensor, ""]]


@dataclass(frozen=True, slots=True)
class Interval:
    """A measured value with its 95 % interval: bootstrapped over items, or by Student's t over seeds.

    Attributes:
        value: The point estimate.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def signed(self) -> str:
        """Return it as text with signs, as differences are written."""
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    def to_json(self) -> dict[str, float]:
        """Return the three numbers by name."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Report:
    """What a measurement leaves behind: names, numbers with intervals, and how they came about.

    Attributes:
        title: One line.
        metrics: Values by name.
        settings: Everything needed to repeat the measurement, for example prompt hashes.
        notes: Plain sentences for the reader.
    """

    title: str
    metrics: Mapping[str, Interval]
    settings: Mapping[str, str | int | float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def map_tensors(function: Callable[[Tensor], Any], record: Record) -> Record:
    """Return a copy of `record` with `function` applied to every tensor in it, through nested records, tuples and mappings."""
    if isinstance(record, Tensor):
        return function(record)  # type: ignore[no-any-return]
    if isinstance(record, tuple):
        return tuple(map_tensors(function, item) for item in record)  # type: ignore[return-value]
    if isinstance(record, Mapping):
        return {key: map_tensors(function, value) for key, value in record.items()}  # type: ignore[return-value]
    if is_dataclass(record) and not isinstance(record, type):
        return replace(record, **{f.name: map_tensors(function, getattr(record, f.name)) for f in fields(record)})
    return record


def tensors_of(record: object) -> list[Tensor]:
    """Return every tensor of a record, at any depth, always in the same order."""
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, record)  # type: ignore[func-returns-value]
    return found


def concatenate(records: list[Record]) -> Record:
    """Return one record whose tensors are those of `records` joined along dimension 0; inverse of cutting a batch into chunks.

    Tensors that differ along other dimensions, as tokens padded to the longest of each chunk do, are first filled up with zeros
    (masks with False).
    """
    first = records[0]
    if isinstance(first, Tensor):
        return join_rows(records)  # type: ignore[arg-type, return-value]
    if isinstance(first, tuple):
        return tuple(concatenate(list(items)) for items in zip(*records, strict=True))  # type: ignore[return-value]
    if isinstance(first, Mapping):
        return {key: concatenate([record[key] for record in records]) for key in first}  # type: ignore[index, return-value]
    if is_dataclass(first) and not isinstance(first, type):
        names = {f.name for f in fields(first)}
        joined: dict[str, Any] = {}
        if isinstance(first, Batch):  # these are no tensors; `rows` gives every chunk all that was skipped
            batches: list[Batch] = records  # type: ignore[assignment]
            joined["keys"] = tuple(key for batch in batches for key in batch.keys)
            joined["skipped"] = tuple(dict.fromkeys(why for batch in batches for why in batch.skipped))
        joined |= {name: concatenate([getattr(r, name) for r in records]) for name in names - set(joined)}
        return replace(first, **joined)
    return first


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors joined along dimension 0, filled up with zeros along the others to the largest of each."""
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    return torch.cat([fill_up(part, largest) for part in parts])


def fill_up(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return a tensor filled up with zeros behind its rows' ends until dimensions 1, 2, ... have these sizes."""
    missing = [wanted - size for wanted, size in zip(sizes, tensor.shape[1:], strict=True)]
    return F.pad(tensor, [pad for size in reversed(missing) for pad in (0, size)]) if any(missing) else tensor


def rows(batch: Batch, start: int, stop: int) -> Batch:
    """Return samples `start` to `stop` of a batch."""
    return replace(map_tensors(lambda tensor: tensor[start:stop], batch), keys=batch.keys[start:stop])
