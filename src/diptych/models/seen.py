"""What a frozen image tower says of images, once and for all: their embedding, and what its layers say on average."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from diptych.data.image_changes import ImageChange
from diptych.data.sources import AbstractSource
from diptych.errors import ConfigError, DataError
from diptych.losses.full import full
from diptych.models.dual import DualEncoder, Images
from diptych.models.embedding import left_out, looking, none_readable, readable
from diptych.models.precision import Precision
from diptych.models.statistics import LayerStatistics, layer_statistics
from diptych.types import concatenate, map_tensors

AT_ONCE = 64
"""Images per forward pass."""


@dataclass(frozen=True)
class Seen:
    """What the frozen image tower says of images.

    Attributes:
        embedding: L2-normalised.
        statistics: Of every layer.
    """

    embedding: Float[Tensor, "n d"]
    statistics: LayerStatistics


@dataclass(frozen=True)
class Labelled:
    """Images of one domain.

    Attributes:
        seen: What the image tower says of them.
        label: Row of each image's class.
    """

    seen: Seen
    label: Int64[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.label)


def look(model: DualEncoder, images: Images) -> Seen:
    """Return what the image tower says of images.

    Raises:
        ConfigError: If it gives no layers.
    """
    if not model.vision.depth:
        raise ConfigError(
            f"The style of an image is read from the layers of its tower, and this {type(model.vision).__name__} gives none. "
            "Take a vision transformer, or a timm model with `forward_intermediates`."
        )
    output = model.vision(model.pixels(images), layers=range(model.vision.depth))
    return Seen(F.normalize(full(model.image_head(output)), dim=-1), layer_statistics(output.layers))


def see(
    model: DualEncoder,
    source: AbstractSource,
    classes: Sequence[str],
    *,
    change: ImageChange = iter,
    precision: Precision = "auto",
) -> Labelled:
    """Return what the image tower says of a source's images, in eval mode and without gradient.

    Images that cannot be read are left out, and a warning counts them.

    Args:
        model: Any.
        source: Labelled samples.
        classes: Rows of the labels.
        change: Of the images as evaluation shows them, before the tower looks at them.
        precision: Of the tower.

    Raises:
        ConfigError: If the image tower gives no layers.
        DataError: If a sample has none of the classes.
        ImageError: If no image can be read.
    """
    label = labels_of(source, classes)
    rows, skipped, seen = list[int](), list[str](), list[Seen]()

    def views() -> Iterator[UInt8[Tensor, "3 h w"]]:
        for row, _, view in readable(model, source, skipped.append):
            rows.append(row)
            yield view

    changed = iter(change(views()))
    with looking(model, precision):
        while part := list(islice(changed, AT_ONCE)):
            seen.append(look(model, torch.stack(part).to(model.device)))
    if not seen:
        raise none_readable(source, skipped)
    for note in left_out(skipped):
        warnings.warn(f"{source.name}: {note}", stacklevel=2)
    joined = map_tensors(torch.clone, concatenate(seen))  # a clone can be used outside of inference mode
    return Labelled(joined, label[rows].to(model.device))


def labels_of(source: AbstractSource, classes: Sequence[str]) -> Int64[Tensor, " n"]:
    """Return the row of every sample's class.

    Raises:
        DataError: If a sample has none of the classes.
    """
    rows = {name: row for row, name in enumerate(classes)}
    samples = [source.without_image(row) for row in range(len(source))]
    for sample in samples:
        if sample.label not in rows:
            raise DataError(
                f"The label of {sample.key!r} in {source.name} is {sample.label!r}; known: {', '.join(classes)}."
            )
    return torch.tensor([rows[str(sample.label)] for sample in samples])
