"""The images of a table of pairs: one per group of rows, decoded and looked at, or the reason why not."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TypeVar

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int64
from PIL import Image
from torch import Tensor

from diptych.curate.reasons import with_reason
from diptych.data.images import decode
from diptych.data.transforms import preprocess
from diptych.errors import ColumnError, ImageError
from diptych.models.dual import DualEncoder
from diptych.models.embedding import embed_pixels
from diptych.models.weights import load

NO_IMAGE, UNREADABLE = "no image", "image cannot be read"
"""Reasons."""

Seen = TypeVar("Seen")


def images_of_rows(
    table: pa.Table, rows: Bool[np.ndarray, " rows"]
) -> tuple[Int64[np.ndarray, " images"], Int64[np.ndarray, " chosen"]]:
    """Return a row for each image of the chosen rows, and for each chosen row the number of its image.

    Rows of one `group` have one image; without that column each row has its own.
    """
    chosen = np.flatnonzero(rows)
    if "group" not in table.column_names:
        return chosen, np.arange(len(chosen))
    groups = table["group"].take(pa.array(chosen)).combine_chunks().dictionary_encode()
    which = groups.indices.to_numpy().astype(np.int64)
    _, first = np.unique(which, return_index=True)
    return chosen[first], which


def look(table: pa.Table, row: int, see: Callable[[Image.Image], Seen]) -> tuple[Seen | None, str | None]:
    """Return what is seen in the image of a row, or why nothing is.

    Raises:
        ColumnError: If the table has no column of images.
    """
    if "image" not in table.column_names:
        raise ColumnError(
            f"This step looks at images, in a column 'image'; the table has {', '.join(table.column_names)}."
        )
    image = table["image"][row].as_py()
    if image is None:
        return None, NO_IMAGE
    try:
        return see(decode(image)), None
    except ImageError:
        return None, UNREADABLE


def embed_rows(
    model: DualEncoder, table: pa.Table, rows: Int64[np.ndarray, " images"]
) -> tuple[Float32[np.ndarray, "seen d"], list[str | None]]:
    """Return L2-normalised embeddings of those images that can be seen, and for each image why it cannot, None if it can."""
    faults: list[str | None] = []

    def pixels() -> Iterator[Tensor]:
        for row in rows.tolist():
            found, fault = look(table, row, lambda image: preprocess(image, model.image_policy))
            faults.append(fault)
            if found is not None:
                yield found

    return embed_pixels(model, pixels()).numpy(), faults


@lru_cache(maxsize=1)
def opened(spec: str) -> DualEncoder:
    """Return a model, loaded once per process."""
    return load(spec)


def with_faults(
    table: pa.Table, rows: Bool[np.ndarray, " rows"], which: Int64[np.ndarray, " chosen"], faults: list[str | None]
) -> pa.Table:
    """Return the table with the faults of images as the reasons of their rows."""
    for fault in (NO_IMAGE, UNREADABLE):
        of_row = np.zeros(table.num_rows, np.bool_)
        of_row[rows] = np.array([one == fault for one in faults], np.bool_)[which]
        table = with_reason(table, of_row, fault)
    return table
