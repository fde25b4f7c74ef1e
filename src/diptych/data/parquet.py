"""Parquet files as tables whose images stay on the disk: an index says in which row group and row each lies, and it is read when a sample is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diptych.errors import ImageError

REMEMBERED_BYTES = 256 << 20
"""Of row groups, per process."""


def read_parquet(path: Path) -> pa.Table:
    """Return a parquet file in which each cell of a column of bytes says where the bytes are: {file, column, group, row}.

    Raises:
        ArrowException: If the file is damaged or cut short.
        OSError: Likewise.
    """
    with pq.ParquetFile(path) as file:
        fields = list(file.schema_arrow)
        table = file.read(columns=[field.name for field in fields if not holds_bytes(field.type)])
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    group = np.repeat(np.arange(len(sizes)), sizes)
    row = np.arange(sum(sizes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    for place, field in enumerate(fields):
        if holds_bytes(field.type):
            where = places(row, file=str(path.absolute()), column=field.name, group=group)
            table = table.add_column(place, field.name, where)
    return table


def holds_bytes(kind: pa.DataType) -> bool:
    """Return whether the cells of a column are encoded images or other bytes, alone or in a struct {bytes, path}."""
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and holds_bytes(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def holds_places(kind: pa.DataType) -> bool:
    """Return whether the cells of a column say where something lies."""
    return bool(pa.types.is_struct(kind) and kind.get_field_index("row") >= 0)


def places(row: np.ndarray, **more: np.ndarray | str) -> pa.StructArray:
    """Return structs that say where cells lie, in int32; a string holds for all rows and is stored once."""
    zeros = pa.array(np.zeros(len(row), np.int32))
    fields = {
        name: pa.DictionaryArray.from_arrays(zeros, [value]) if isinstance(value, str) else pa.array(value, pa.int32())
        for name, value in {**more, "row": row}.items()
    }
    return pa.StructArray.from_arrays([*fields.values()], [*fields])


def large_groups(column: pa.ChunkedArray) -> tuple[str, ...]:
    """Return a note if a row group that a column of places leads to is larger than what a process remembers."""
    paths = {path for chunk in column.chunks for path in chunk.field("file").dictionary.to_pylist()}
    sizes = {path: _largest_group(path) for path in sorted(paths)}
    path = max(sizes, key=sizes.__getitem__)
    if sizes[path] <= REMEMBERED_BYTES:
        return ()
    return (
        f"A row group of {Path(path).name} holds {sizes[path] / 1e6:,.0f} MB, and every process keeps one group of images whole. "
        "To need less, write the file with fewer rows per group (`row_group_size=100` in pandas and pyarrow).",
    )


def _largest_group(path: str) -> int:
    found = pq.read_metadata(path)
    return max(int(found.row_group(group).total_byte_size) for group in range(found.num_row_groups))


class RowGroups:
    """Gives the cells of parquet files by their place, and remembers the row groups that were asked for last.

    Attributes:
        limit: Bytes to remember; the last row group is, whatever its size. A copy for another process remembers none.
    """

    def __init__(self, limit: int = REMEMBERED_BYTES) -> None:
        self.limit = limit
        self._columns: dict[tuple[str, str, int], pa.ChunkedArray] = {}  # asked for last comes last

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_columns": {}}

    def __call__(self, place: Mapping[str, Any]) -> Any:
        """Return the cell at a place that `read_parquet` gave.

        Raises:
            ImageError: If the row group cannot be read any more; names the file.
        """
        key = place["file"], place["column"], place["group"]
        try:
            column = self._columns.pop(key, None)
            if column is None:
                column = _read_group(*key)
                self._forget(self.limit - column.nbytes)
            self._columns[key] = column
            return column[place["row"]].as_py()
        except (pa.ArrowException, OSError, LookupError) as error:
            raise ImageError(
                f"Row group {key[2]} of {key[0]} cannot be read: {error}. The file is damaged, or was changed since it was opened."
            ) from error

    def _forget(self, room: int) -> None:
        while self._columns and sum(column.nbytes for column in self._columns.values()) > room:
            del self._columns[next(iter(self._columns))]


def _read_group(path: str, column: str, group: int) -> pa.ChunkedArray:
    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column], use_threads=False)[column]
