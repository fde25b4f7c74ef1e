"""Captions and images that are nearly those of another row: one of each stays, the same one however the source is cut and ordered.

Rows are put in an order that follows from their keys by a hash, and the first of similar ones stays (`similar.py`). All signatures are in memory for
that.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64, UInt8
from PIL import Image

from diptych.curate.minhash import bands, estimated_jaccard, rows_per_band, signatures
from diptych.curate.perceptual import Looks, looking_alike, mean_colour, perceptual_hash
from diptych.curate.pictures import embed_rows, images_of_rows, look, opened
from diptych.curate.reasons import kept
from diptych.curate.similar import Neighbours, close_in_direction, first_of_similar, sharing_a_band
from diptych.curate.verdicts import Verdicts, in_drawn_order
from diptych.errors import ConfigError
from diptych.verbs import AbstractSurveyor

SIMILAR_TEXT, SIMILAR_IMAGE = "caption near that of another row", "image near that of another row"
"""Reasons. The column `duplicate_of` names the row, or the group, that stays."""

_FOUND = ("reason", "duplicate_of")
_NOTHING = pa.table({name: pa.array([], pa.string()) for name in ("key", *_FOUND)})


@dataclass(frozen=True)
class TextDuplicatesConfig:
    """Which captions are near duplicates.

    Attributes:
        on: Whether the step is taken. Captions that are honest and common, such as `a dog`, go with it, whatever their images.
        jaccard: Least Jaccard index of their pieces, in [0.1, 1]; estimated from signatures, see `minhash.py`.
        characters: Of a piece; 5 is a word and its borders.
    """

    on: bool = False
    jaccard: float = 0.8
    characters: int = 5

    def __post_init__(self) -> None:
        if not 0.1 <= self.jaccard <= 1 or self.characters < 1:
            raise ConfigError(f"jaccard lies in [0.1, 1] and characters is at least 1; this is {self}.")


class TextDuplicates(AbstractSurveyor):
    """Drops pairs whose caption is nearly that of another."""

    def __init__(self, config: TextDuplicatesConfig = TextDuplicatesConfig()) -> None:
        self.config = config

    def survey(self, table: pa.Table) -> pa.Table:
        """Return key and signature of each pair with a caption."""
        table = table.filter(pc.and_(pa.array(kept(table)), pc.is_valid(table["caption"])))
        signed = signatures(table["caption"].to_pylist(), size=self.config.characters)
        return pa.table({"key": table["key"], "signature": _cells(signed)})

    def merge(self, surveys: Iterable[pa.Table]) -> pa.Table:
        """Return the pairs that go, and for each the one that stays."""
        pairs = in_drawn_order(surveys)
        if pairs.num_rows == 0:
            return _NOTHING
        signed, least = _rows(pairs["signature"]), self.config.jaccard
        neighbours = sharing_a_band(
            bands(signed, rows_per_band(least)),
            lambda one, other: estimated_jaccard(signed[one], signed[other]) >= least,
        )
        return _verdicts(pairs, first_of_similar(len(signed), neighbours), SIMILAR_TEXT)

    def informed(self, merged: pa.Table) -> Verdicts:
        """Return the curator that drops those."""
        return Verdicts(merged)


@dataclass(frozen=True)
class ImageDuplicatesConfig:
    """Which images are near duplicates.

    Attributes:
        on: Whether the step is taken.
        bits: At how many of the 64 bits of their perceptual hashes they differ at most, 0 to 16. At 4, photos are found that were scaled or
            compressed again; those with borders cut off need 8, turned or mirrored ones are not found. Line drawings of one style are alike to
            these bits.
        colour: By how much each mean colour differs at most, 0 to 255.
        model: Compare embeddings of this model instead, any that `diptych.load` knows; finds more, and takes time in the square of the images.
        cosine: Least cosine of embeddings, in (0, 1].
    """

    on: bool = False
    bits: int = 4
    colour: int = 16
    model: str | None = None
    cosine: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.bits <= 16 or not 0 <= self.colour <= 255 or not 0 < self.cosine <= 1:
            raise ConfigError(f"bits lies in 0 to 16, colour in 0 to 255 and cosine in (0, 1]; this is {self}.")


class ImageDuplicates(AbstractSurveyor):
    """Drops all pairs of an image that is nearly another one; the captions of one image stay together."""

    reads_images = True

    def __init__(self, config: ImageDuplicatesConfig = ImageDuplicatesConfig()) -> None:
        self.config = config

    def survey(self, table: pa.Table) -> pa.Table:
        """Return the group of each image with its hash and colour or its embedding, or why it cannot be seen."""
        by = "group" if "group" in table.column_names else "key"
        rows, _ = images_of_rows(table, kept(table))
        if self.config.model is not None:
            vectors, faults = embed_rows(opened(self.config.model), table, rows)
            looks = [vector.tobytes() for vector in vectors]
        else:
            found = [look(table, row, _look) for row in rows.tolist()]
            faults, looks = [fault for _, fault in found], [one for one, _ in found if one is not None]
        rest = iter(looks)
        cells = [next(rest) if fault is None else None for fault in faults]
        names = table[by].take(pa.array(rows))
        return pa.table({by: names, "look": pa.array(cells, pa.large_binary()), "fault": pa.array(faults, pa.string())})

    def merge(self, surveys: Iterable[pa.Table]) -> pa.Table:
        """Return the images that go, and for each the one that stays; and those that cannot be seen."""
        images = in_drawn_order(surveys)
        if images.num_rows == 0:
            return _NOTHING
        seen, lost = (images.filter(pc.is_valid(images[name])) for name in ("look", "fault"))
        unseen = pa.table(
            [lost[0], lost["fault"], pa.nulls(lost.num_rows, pa.string())], [lost.column_names[0], *_FOUND]
        )
        if seen.num_rows == 0:
            return unseen
        stands = first_of_similar(seen.num_rows, self._neighbours(_rows(seen["look"])))
        return pa.concat_tables([_verdicts(seen, stands, SIMILAR_IMAGE), unseen])

    def informed(self, merged: pa.Table) -> Verdicts:
        """Return the curator that drops those; it reads no images."""
        return Verdicts(merged)

    def _neighbours(self, looks: UInt8[np.ndarray, "n bytes"]) -> Neighbours:
        if self.config.model is not None:
            return close_in_direction(looks.view("<f4"), self.config.cosine)
        bits = np.ascontiguousarray(looks[:, :8]).view("<u8")[:, 0]
        return looking_alike(Looks(bits, looks[:, 8:]), self.config.bits, self.config.colour)


def _look(image: Image.Image) -> bytes:
    return perceptual_hash(image).to_bytes(8, "little") + bytes(mean_colour(image))


def _verdicts(rows: pa.Table, stands: Int64[np.ndarray, " n"], reason: str) -> pa.Table:
    """Return the names of rows for which another one stands, with the reason and its name."""
    gone, names = np.flatnonzero(stands != np.arange(len(stands))), rows[0]
    said = pa.repeat(pa.scalar(reason), len(gone))
    columns = [names.take(pa.array(gone)), said, names.take(pa.array(stands[gone]))]
    return pa.table(columns, [rows.column_names[0], *_FOUND])


def _cells(rows: UInt8[np.ndarray, "n bytes"]) -> pa.Array:
    """Return one cell of bytes per row."""
    places = np.arange(len(rows) + 1, dtype=np.int64) * rows.shape[1]
    return pa.Array.from_buffers(pa.large_binary(), len(rows), [None, pa.py_buffer(places), pa.py_buffer(rows)])


def _rows(cells: pa.ChunkedArray) -> UInt8[np.ndarray, "n bytes"]:
    """Return cells of as many bytes each as rows; there must be one."""
    whole = cells.cast(pa.large_binary()).combine_chunks()
    _, places, data = whole.buffers()
    ends = np.frombuffer(places, np.int64)[whole.offset : whole.offset + len(whole) + 1]
    return np.frombuffer(data, np.uint8)[ends[0] : ends[-1]].reshape(len(whole), -1)
