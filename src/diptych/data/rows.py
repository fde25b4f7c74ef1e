"""What is done to the rows of a table before samples are made of them: pick a part, join captions, make keys unique."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diptych.data.columns import Columns, head, is_list, is_text
from diptych.errors import ColumnError, DataError, nearest


def without_categories(table: pa.Table) -> pa.Table:
    """Return the table with every dictionary column (what pandas calls categorical) spelled out."""
    for place, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(place, field.name, table[field.name].cast(field.type.value_type))
    return table


def only_part(table: pa.Table, column: str | None, part: str) -> pa.Table:
    """Return the rows whose `column` says `part`.

    Raises:
        ColumnError: If there is no such column.
        DataError: If no row belongs to the part; names those there are.
    """
    if column is None:
        raise ColumnError(
            f"The part {part!r} was asked for, but no column tells parts apart. Name it with columns.split."
        )
    names = table[column].cast(pa.string())
    kept = table.filter(pc.equal(names, part))
    if kept.num_rows == 0:
        known = [name for name in pc.unique(names).to_pylist() if name is not None]
        raise DataError(f"No row has {part!r} in column {column!r}. {nearest(part, known)}")
    return kept


def join_captions(table: pa.Table, columns: Columns) -> pa.Table:
    """Return one row per image where several rows name the same one, as in Flickr's one caption per line.

    The texts of such rows become a list, in the order of the rows; everything else is the first row's.
    """
    texts = columns.texts
    if columns.image is None or not texts or not all(is_text(table[c].type) for c in (columns.image, *texts)):
        return table
    place = pa.array(np.arange(table.num_rows))
    image = pc.coalesce(
        table[columns.image], pc.cast(place, table[columns.image].type)
    )  # rows without image stay alone
    groups = pa.table({"image": image, "place": place}).group_by("image", use_threads=False)
    found = groups.aggregate([("place", "min"), ("place", "list")]).combine_chunks()
    if found.num_rows == table.num_rows:
        return table
    places = found["place_list"].combine_chunks()
    joined = table.take(found["place_min"])
    for column in texts:
        values = pa.ListArray.from_arrays(places.offsets, table[column].take(places.values).combine_chunks())
        joined = joined.set_column(joined.column_names.index(column), column, values)
    return joined


def with_keys(table: pa.Table, columns: Columns) -> tuple[pa.Table, Columns, tuple[str, ...]]:
    """Return the table with a key column whose values are unique, and a note when they had to be made so.

    Keys are the key column's values, else image paths. The second row of a key gets `#2` behind it, and so on; a row without key
    gets its number. Rows that share an image path stay in one group.
    """
    paths = columns.image if columns.image is not None and is_text(table[columns.image].type) else None
    if columns.group is None and paths is not None and not _is_unique(table[paths]):
        columns = replace(columns, group=paths)
    column = columns.key or paths
    if column is None or _is_unique(table[column]):
        return table, replace(columns, key=column), ()
    last: dict[str, int] = {}  # key -> the highest number given behind it
    for row, value in enumerate(table[column].to_pylist()):
        key = plain = f"row-{row}" if value is None else str(value)
        while key in last:
            last[plain] += 1
            key = f"{plain}#{last[plain]}"
        last[key] = 1
    name = f"{column} (made unique)"
    note = (
        f"Column {column!r} repeats or lacks values: repeated keys got a number behind them, absent ones a row number."
    )
    return table.append_column(name, pa.array(last, pa.string())), replace(columns, key=name), (note,)


def image_folder(table: pa.Table, column: str | None, folder: Path) -> Path:
    """Return what image paths are relative to: `folder`, or the folder right below it that holds the first image."""
    first = next(iter(head(table[column])), None) if column is not None else None
    if not isinstance(first, str) or "://" in first or (folder / first).exists() or not folder.is_dir():
        return folder
    return next((below for below in sorted(folder.iterdir()) if (below / first).is_file()), folder)


def count_without_text(table: pa.Table, texts: tuple[str, ...]) -> int:
    """Return how many rows have no text but white space in any of the columns."""
    filled = pa.array(np.zeros(table.num_rows, bool))
    for column in texts:
        values = table[column].combine_chunks()
        if is_list(values.type):
            flat, parents = pc.list_flatten(values), pc.list_parent_indices(values)
            rows = parents.filter(_has_text(flat))
            filled = pc.or_(filled, pc.is_in(pa.array(np.arange(table.num_rows)), value_set=rows.cast(pa.int64())))
        else:
            filled = pc.or_(filled, _has_text(values.cast(pa.string())))
    return int(table.num_rows - (pc.sum(filled).as_py() or 0))


def _has_text(values: pa.Array) -> pa.Array:
    return pc.fill_null(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(values)), 0), False)


def _is_unique(column: pa.ChunkedArray) -> bool:
    return bool(column.null_count == 0 and pc.count_distinct(column).as_py() == len(column))
