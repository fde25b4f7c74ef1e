"""Files to Arrow tables: csv, tsv, jsonl, parquet, folders. Tar shards are read in `tar`; what columns mean is decided in `columns`."""

import csv
import json
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from diptych.data.parquet import read_parquet
from diptych.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_PREFERRED = ("metadata", "captions", "labels")
_PARTS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")
_ROWS_AT_ONCE = 100_000
csv.field_size_limit(2**31 - 1)


def is_image_name(name: str) -> bool:
    """Return whether a path or an address ends like an image's."""
    return name.split("?")[0].lower().endswith(IMAGE_SUFFIXES)


def read_table(path: Path) -> pa.Table:
    """Return a csv, tsv, jsonl or parquet file as an Arrow table; bytes in a parquet file stay on the disk, see `read_parquet`.

    Text that is not UTF-8 is refused, never repaired: a replaced character would be trained on without anyone noticing.

    Raises:
        DataError: If it is empty, not UTF-8, or damaged; names the line where there is one.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl}
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise DataError(f"{path} ends in {path.suffix!r}. Known: a folder, .tar, {', '.join(TABLE_SUFFIXES)}.")
    try:
        table = readers[suffix](path) if suffix in readers else _read_parquet(path)
    except UnicodeDecodeError as error:
        raise DataError(f"Line {_undecodable(path)} of {path} is not UTF-8 text. Save the file as UTF-8.") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if table.num_rows == 0:
        raise DataError(f"{path} has no rows.")
    return table


def join_tables(paths: Sequence[Path]) -> pa.Table:
    """Return the rows of several tables one after another.

    Raises:
        DataError: If one cannot be read, or a column has different types in two of them.
    """
    tables = [read_table(path) for path in paths]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"The {len(paths)} tables in {paths[0].parent} do not fit together: {error}") from error


def _undecodable(path: Path) -> int:
    with path.open("rb") as file:
        return next(number for number, line in enumerate(file, 1) if line.decode(errors="replace").encode() != line)


def _read_parquet(path: Path) -> pa.Table:
    table = read_parquet(path)
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            column.validate(
                full=True
            )  # Arrow checks text only when asked, else the first bad row would stop a training
        except pa.ArrowInvalid as error:
            raise DataError(f"Column {name!r} of {path} is damaged: {error}") from error
    return table


def _read_csv(path: Path) -> pa.Table:
    """Return all columns as strings; an empty field is null."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        first = file.readline()
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t|", key=first.count)
    try:
        return _parse_csv(path, delimiter, csv.QUOTE_MINIMAL)
    except DataError:
        if delimiter != "\t":
            raise
        return _parse_csv(path, delimiter, csv.QUOTE_NONE)  # in many tab-separated files a quote is just a character


def _parse_csv(path: Path, delimiter: str, quoting: Any) -> pa.Table:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        names = next(rows, [])
        first: list[list[str]] = []
        if any(is_image_name(name) or "://" in name for name in names):  # no names on top: a row like all others
            names, first = [f"column{place}" for place in range(1, len(names) + 1)], [names]
        if len(set(names)) < len(names):
            raise DataError(f"{path} names a column twice in its first line: {', '.join(names)}.")
        checked, blocks = chain(first, _checked(rows, names, delimiter, path)), []
        while block := list(islice(checked, _ROWS_AT_ONCE)):
            columns = zip(names, zip(*block, strict=True), strict=True)
            blocks.append(
                pa.table({name: pa.array([v or None for v in values], pa.string()) for name, values in columns})
            )
    return pa.concat_tables(blocks) if blocks else pa.table({})


def _checked(rows: Any, names: list[str], delimiter: str, path: Path) -> Iterator[list[str]]:
    """Yield the rows of a csv reader that are not blank; all have one field per name."""
    try:
        for row in rows:
            if row and len(row) != len(names):
                raise DataError(
                    f"Line {rows.line_num} of {path} has {len(row)} fields, its first line has {len(names)} "
                    f"({', '.join(names)}). Put texts that contain {delimiter!r} in double quotes."
                )
            if row:
                yield row
    except csv.Error as error:
        raise DataError(
            f"Line {rows.line_num} of {path} cannot be read: {error}. Inside quotes, a double quote is written twice."
        ) from error


def _read_jsonl(path: Path) -> pa.Table:
    records = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"Line {number} of {path} is not JSON: {error}. Each line must be one object."
                ) from error
            if not isinstance(record, dict):
                raise DataError(f"Line {number} of {path} is {type(record).__name__}; each line must be one object.")
            records.append(record)
    return from_records(records)


def from_records(records: list[dict[str, Any]]) -> pa.Table:
    """Return a table with one column per key that any record has.

    One text beside lists of texts becomes a list; values of other mixed kinds become strings.

    Raises:
        DataError: If a string is no valid Unicode.
    """
    names = list(dict.fromkeys(name for record in records for name in record))
    return pa.table({name: _column(name, [record.get(name) for record in records]) for name in names})


def _column(name: str, values: list[Any]) -> pa.Array:
    if any(isinstance(value, list) for value in values):
        values = [value if value is None or isinstance(value, list) else [value] for value in values]
    try:
        try:
            return pa.array(values)
        except (pa.ArrowException, OverflowError):
            spelled = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
            return pa.array(spelled, pa.string())
    except UnicodeEncodeError as error:  # half of an emoji, as "\ud83d"
        raise DataError(f"Column {name!r} holds text that is no valid Unicode: {error.object[:80]!r}.") from error


def read_folder(folder: Path) -> tuple[pa.Table, str]:
    """Return a folder's one table, or a table of its images, and a sentence about the layout that was found.

    Image paths in the table are relative to the folder.

    Raises:
        DataError: If there is nothing to read.
    """
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in TABLE_SUFFIXES)
    if tables and all(path.suffix == ".parquet" for path in tables):
        return join_tables(tables), f"{len(tables)} parquet files: {some([path.name for path in tables])}."
    if len(tables) > 1:
        preferred = [path for path in tables if path.stem in _PREFERRED]
        if len(preferred) != 1:
            raise DataError(f"{folder} holds several tables ({', '.join(p.name for p in tables)}). Name one of them.")
        tables = preferred
    if tables:
        return read_table(tables[0]), f"Images described by {tables[0].name}."
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    images = sorted(name for name in names if not any(part.startswith(".") for part in name.parts))
    if not images:
        raise DataError(
            f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}), no table ({', '.join(TABLE_SUFFIXES)}) and no .tar shard."
        )
    return _describe_images(folder, images)


def _describe_images(folder: Path, images: list[Path]) -> tuple[pa.Table, str]:
    """Return images with the text files of the same name, else with the names of their folders as classes."""
    columns: dict[str, Any] = {"image": [str(path) for path in images]}
    in_parts = all(path.parts[0].lower() in _PARTS for path in images)
    if in_parts:
        columns["split"] = [path.parts[0] for path in images]
    captions = [_captions(folder / path.with_suffix(".txt")) for path in images]
    labels = [path.parts[-2] if len(path.parts) > 1 + in_parts else None for path in images]
    if found := sum(map(bool, captions)):
        columns["caption"] = pa.array(captions, pa.list_(pa.string()))
        note = f"Images with text files of the same name: {found:,} of {len(images):,} have one."
    elif all(labels):
        columns["label"] = labels
        note = f"One folder per class: {some(sorted(set(map(str, labels))))}."
    else:
        note = "Images without any text."
    return pa.table(columns), note


def _captions(path: Path) -> list[str]:
    try:
        return text_lines(path.read_text(encoding="utf-8-sig")) if path.exists() else []
    except UnicodeDecodeError as error:
        raise DataError(f"Line {_undecodable(path)} of {path} is not UTF-8 text. Save the file as UTF-8.") from error


def text_lines(text: str) -> list[str]:
    """Return the lines that are not blank; only a line break ends a line, not the rarer marks that `splitlines` knows."""
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


def some(names: Sequence[str]) -> str:
    """Return the first five names in words."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
