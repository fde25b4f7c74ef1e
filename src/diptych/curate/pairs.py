"""Rows of a source as pairs, one row per caption, and the images that belong to them."""

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diptych.curate.normalise import NO_TEXT, blank
from diptych.curate.parts import Block, Layout, Part, read
from diptych.curate.reasons import kept, with_column, with_reason
from diptych.data.columns import is_list

PAIRS = pa.schema(
    {
        "key": pa.string(),
        "group": pa.string(),
        "number": pa.int64(),
        "row": pa.int64(),
        "place": pa.int32(),
        "caption": pa.string(),
        "language": pa.string(),
        "reason": pa.string(),
    }
)
"""What every step finds: a unique key; one key for all captions of a source row; place in the run; row of the part; number of the caption in its
row; caption; its language; what dropped it."""

_PARTS = 40  # bits for the number of a pair within its part
_WITH_IMAGES = 512  # pairs whose images are in memory together


def read_pairs(part: Part, number: int, layout: Layout) -> Iterator[pa.Table]:
    """Yield the pairs of part number `number`, with the schema `PAIRS`."""
    row = pair = 0
    for block in read(part):
        table = pairs_of(block, layout, part.name, row)
        numbers = np.arange(pair, pair + table.num_rows) + (number << _PARTS)
        yield table.set_column(2, "number", pa.array(numbers))
        row, pair = row + block.table.num_rows, pair + table.num_rows


def pairs_of(block: Block, layout: Layout, name: str, first: int) -> pa.Table:
    """Return one row per caption; a source row without one is a pair with the reason `no text`, or with that of its fault.

    Args:
        block: Rows of a part.
        layout: What its columns mean.
        name: Of the part, for rows without a key.
        first: Number of the block's first row.
    """
    table, count = block.table, block.table.num_rows
    bad = np.zeros(count, np.bool_)
    bad[list(block.faults)] = True
    row, place, captions = captions_of(_strings(table, layout.text, bad))
    own = pc.binary_join_element_wise(name, pa.array(np.arange(first, first + count)).cast(pa.string()), ":")
    group = pc.coalesce(_whole(_strings(table, layout.key, bad)), own).take(row)
    suffix = pc.binary_join_element_wise(group, pa.array(place + 1).cast(pa.string()), "#")
    fault = pa.array([block.faults.get(i) for i in range(count)] if block.faults else [None] * count, pa.string())
    found = pa.table(
        {
            "key": pc.if_else(pa.array(place == 0), group, suffix),
            "group": group,
            "number": np.zeros(len(row), np.int64),
            "row": row + first,
            "place": place,
            "caption": captions,
            "language": _whole(_strings(table, layout.language, bad)).take(row),
            "reason": fault.take(row),
        }
    ).cast(PAIRS)
    return with_reason(found, blank(found["caption"]), NO_TEXT)


def _strings(table: pa.Table, column: str | None, bad: np.ndarray) -> pa.ChunkedArray:
    """Return a column of strings or of lists of them, null for bad rows and where there is no such column."""
    if column is None or column not in table.column_names:
        return pa.chunked_array([pa.nulls(table.num_rows, pa.string())])
    values = table[column]
    if is_list(values.type) or (pa.types.is_list(values.type) and pa.types.is_null(values.type.value_type)):
        kind: pa.DataType = pa.list_(pa.string())
    elif pa.types.is_nested(values.type) or pa.types.is_binary(values.type):
        return pa.chunked_array([pa.nulls(table.num_rows, pa.string())])
    else:
        kind = pa.string()
    values = values.filter(pa.array(~bad)).cast(kind)
    places = np.cumsum(~bad) - 1
    return values.take(pa.array(np.where(bad, 0, places), mask=bad)) if bad.any() else values


def captions_of(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, pa.Array]:
    """Return row, number within the row, and text of every caption; each row has at least one, null if need be."""
    whole = _whole(column)
    if not pa.types.is_nested(whole.type):
        return np.arange(len(whole)), np.zeros(len(whole), np.int32), whole
    row, texts = pc.list_parent_indices(whole).to_numpy().astype(np.int64), pc.list_flatten(whole)
    alone = np.setdiff1d(np.arange(len(whole)), row)
    order = np.argsort(np.concatenate([row, alone]), kind="stable")
    row = np.concatenate([row, alone])[order]
    place = (np.arange(len(row)) - np.searchsorted(row, row)).astype(np.int32)
    return row, place, pa.concat_arrays([texts, pa.nulls(len(alone), texts.type)]).take(order)


def beside(pairs: Iterator[pa.Table], part: Part, *, images: bool = True) -> Iterator[tuple[Block, pa.Table, int]]:
    """Yield each block of a part with the pairs that were made of it, and the number of its first row."""
    waiting = pa.table({name: pa.array([], kind) for name, kind in zip(PAIRS.names, PAIRS.types, strict=True)})
    row, left = 0, chain(pairs, ())
    for block in read(part, images=images):
        stop, own = row + block.table.num_rows, []
        while True:
            cut = int(np.searchsorted(waiting["row"].to_numpy(), stop))
            own.append(waiting.slice(0, cut))
            waiting = waiting.slice(cut)
            if waiting.num_rows or (more := next(left, None)) is None:
                break
            waiting = more
        some = [table for table in own if table.num_rows] or own[:1]
        yield block, pa.concat_tables(some), row
        row = stop


def with_images(pairs: Iterator[pa.Table], part: Part, layout: Layout) -> Iterator[pa.Table]:
    """Yield the pairs of a part again, with a column `image`: encoded bytes for those that are kept and have one."""
    for block, table, first in beside(pairs, part):
        for start in range(0, table.num_rows, _WITH_IMAGES):
            some = table.slice(start, _WITH_IMAGES)
            alive = kept(some)
            rows = some["row"].to_numpy() - first
            images = images_of(block.table, np.unique(rows[alive]), layout)
            cells = [images.get(row) if stays else None for row, stays in zip(rows.tolist(), alive, strict=True)]
            yield with_column(some, "image", pa.array(cells, pa.binary()))


def images_of(table: pa.Table, rows: np.ndarray, layout: Layout) -> dict[int, bytes]:
    """Return the encoded images of some rows of a block, those that are there; addresses are never opened."""
    if layout.image is None or layout.image not in table.column_names:
        return {}
    cells = zip(rows.tolist(), table[layout.image].take(rows).to_pylist(), strict=True)
    return {row: image for row, cell in cells if (image := _image(cell, Path(layout.folder)))}


def _image(cell: Any, folder: Path) -> bytes | None:
    if isinstance(cell, Mapping):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if not isinstance(cell, str) or is_address(cell):
        return cell if isinstance(cell, bytes) else None
    try:
        return (folder / cell).read_bytes()
    except (OSError, ValueError):  # ValueError: a null character in the name
        return None


def is_address(cell: Any) -> bool:
    """Return whether an image cell is an address on the network."""
    return isinstance(cell, str) and "://" in cell


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks()
