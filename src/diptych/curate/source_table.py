"""A source as a table that can be written to a file, with images that are found again from there."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diptych.data.images import decode
from diptych.data.parquet import holds_places
from diptych.data.sources import AbstractSource, TableSource
from diptych.errors import ConfigError
from diptych.files import atomic_file

_ENDINGS = (".parquet", ".jsonl")


def source_table(source: AbstractSource, folder: Path) -> pa.Table:
    """Return a source as a table for a file in `folder`.

    A table on disk keeps all its columns, and images that lie in a parquet file with it; image paths become relative to `folder`. Anything
    else becomes `key`, `image` (encoded) and `caption` (a list of all texts with the role `caption`).

    Raises:
        ImageError: If an image cannot be read; of a table on disk, only those inside it are.
    """
    if not isinstance(source, TableSource):
        samples = list(source)
        captions = [[text.text for text in sample.texts if text.role == "caption"] for sample in samples]
        images = [None if sample.image is None else encoded(sample.image) for sample in samples]
        return pa.table(
            {
                "key": [sample.key for sample in samples],
                "image": pa.array(images, pa.binary()),
                "caption": pa.array(captions, pa.list_(pa.string())),
            }
        )
    table, column = _with_bytes(source), source.columns.image
    if column is None or not pa.types.is_string(table.schema.field(column).type):
        return table
    paths = [_relative(path, source.folder, folder) for path in table[column].to_pylist()]
    return table.set_column(table.column_names.index(column), column, pa.array(paths, pa.string()))


def _with_bytes(source: TableSource) -> pa.Table:
    """Return the table with what lies in parquet files written out, since the new file may take the place of the old one."""
    table = source.table
    for place, field in enumerate(table.schema):
        if holds_places(field.type):
            cells = pa.array([value and source.cell(value) for value in table[field.name].to_pylist()])
            table = table.set_column(place, field.name, cells)
    return table


def write_table(table: pa.Table, path: Path) -> None:
    """Write a parquet or jsonl file, whole or not at all.

    Raises:
        ConfigError: If the name has another ending, or jsonl cannot hold what is in the table.
    """
    check_ending(path)
    try:
        with atomic_file(path) as file:
            if path.suffix == ".parquet":
                pq.write_table(table, file)
            else:
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())
                file.write_text("".join(lines), encoding="utf-8")
    except TypeError as error:
        raise ConfigError(f"{path.name} cannot hold images or other bytes ({error}). Name a .parquet file.") from error


def check_ending(path: Path) -> None:
    """Raise before any work is done for a file that could not be written.

    Raises:
        ConfigError: If the ending is not known.
    """
    if path.suffix not in _ENDINGS:
        raise ConfigError(f"{path} must end in {' or '.join(_ENDINGS)}, so that its format is known.")


def _relative(path: str | None, base: Path, folder: Path) -> str | None:
    return path if path is None or "://" in path else os.path.relpath(base / path, folder)


def encoded(image: Any) -> bytes:
    """Return an image as the bytes of a file; pixels become PNG."""
    if not isinstance(image, bytes):
        decode(image).save(file := io.BytesIO(), "PNG")
        return file.getvalue()
    return image
