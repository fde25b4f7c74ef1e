"""What was computed before, for batches: views and texts looked up in a `TensorStore` instead of decoded, tokenised and encoded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from diptych.data.store import TensorStore
from diptych.errors import ImageError
from diptych.types import Tokens, TowerOutput


@dataclass(frozen=True)
class CachedView:
    """One view of every sample of a source.

    Attributes:
        store: Holds `pixels`, or `pooled` and perhaps `tokens`.
        rows: Of the store, per version and sample; -1 where the image cannot be used. Epoch e shows version e mod versions; a view that is
            not random has one.
        problems: Why an image cannot be used, by sample.
    """

    store: TensorStore
    rows: Int64[Tensor, "versions n"]
    problems: Mapping[int, str]

    def row(self, epoch: int, index: int) -> int:
        """Return where a sample is in the store.

        Raises:
            ImageError: If its image cannot be used.
        """
        if index in self.problems:
            raise ImageError(self.problems[index])
        return int(self.rows[epoch % len(self.rows), index])

    def take(self, rows: Sequence[int]) -> UInt8[Tensor, "b 3 size size"] | TowerOutput:
        """Return the view of some samples: pixels, or what the tower made of them."""
        places = torch.tensor(rows)
        if "pixels" in self.store.columns:
            return self.store.take("pixels", places)
        output = TowerOutput(self.store.take("pooled", places))
        if "tokens" not in self.store.columns:
            return output
        rows_, columns = self.store.constant("grid").tolist()
        return replace(output, tokens=self.store.take("tokens", places), grid=(rows_, columns))


@dataclass(frozen=True)
class CachedImages:
    """Every image of a source, decoded and whole, for views that are cropped from it at random.

    Attributes:
        store: Holds `size` (height, width), and `pixels` row by row.
        rows: Of the store, per sample; -1 where the image cannot be used.
        problems: Why an image cannot be used, by sample.
    """

    store: TensorStore
    rows: Int64[Tensor, " n"]
    problems: Mapping[int, str]

    def pixels(self, index: int) -> np.ndarray:
        """Return uint8 [h, w, 3] of one sample.

        Raises:
            ImageError: If its image cannot be used.
        """
        if index in self.problems:
            raise ImageError(self.problems[index])
        row = self.rows[index : index + 1]
        height, width = self.store.take("size", row)[0].tolist()
        return self.store.take_ragged("pixels", row, height * width)[0].view(height, width, 3).numpy()


@dataclass(frozen=True)
class CachedTexts:
    """All texts of a source that a text column may hold.

    Attributes:
        store: Holds `pooled` and perhaps `tokens`.
    """

    store: TensorStore

    def fill(self, tokens: Tokens) -> Tokens:
        """Return tokens with what the tower made of them; without, if one of the texts is not in the store."""
        rows = self.store.find(tokens.key)
        if (rows < 0).any():
            return tokens
        pooled = self.store.take("pooled", rows)
        if "tokens" not in self.store.columns:
            return replace(tokens, output=TowerOutput(pooled))
        states = self.store.take_ragged("tokens", rows, tokens.ids.shape[1])
        return replace(tokens, output=TowerOutput(pooled, states, mask=tokens.mask))


@dataclass(frozen=True)
class Cached:
    """What batches need not compute.

    Attributes:
        views: One entry per view, None for those that are decoded.
        texts: One entry per text column, None for those that the tower must still encode.
        images: What the other views are made of; None if images are decoded for them.
    """

    views: tuple[CachedView | None, ...]
    texts: tuple[CachedTexts | None, ...]
    images: CachedImages | None = None
