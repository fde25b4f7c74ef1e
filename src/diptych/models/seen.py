"""What a frozen image tower says of images, once and for all: their embedding, and what its layers say on average."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from diptych.data.sources import AbstractSource
from diptych.errors import ConfigError, DataError
from diptych.losses.full import full
from diptych.models.dual import DualEncoder, Images
from diptych.models.embedding import evaluation_view, looking
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
    views: Iterable[UInt8[Tensor, "3 h w"]],
    label: Int64[Tensor, " n"],
    precision: Precision = "auto",
) -> Labelled:
    """Return what the image tower says of images, in eval mode and without gradient.

    Args:
        model: Any.
        views: One per label, as `shown` gives them, or changed.
        label: From `labels_of`.
        precision: Of the tower.

    Raises:
        ConfigError: If the image tower gives no layers.
        ImageError: If an image cannot be read.
    """
    views, seen = iter(views), []
    with looking(model, precision):
        while part := list(islice(views, AT_ONCE)):
            seen.append(look(model, torch.stack(part).to(model.device)))
    joined = map_tensors(torch.clone, concatenate(seen))  # a clone can be used outside of inference mode
    return Labelled(joined, label.to(model.device))


def shown(model: DualEncoder, source: AbstractSource) -> Iterator[UInt8[Tensor, "3 h w"]]:
    """Yield every image of a source as evaluation shows it."""
    for row in range(len(source)):
        yield evaluation_view(model, source[row])


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
