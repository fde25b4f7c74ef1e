"""Files to Arrow tables: csv, tsv, jsonl, parquet, tar shards, folders. What columns mean is decided in `sources`."""

import csv
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diptych.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_TAR_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
csv.field_size_limit(2**31 - 1)


def read_table(path: Path) -> pa.Table:
    """Return a csv, tsv, jsonl or parquet file as an Arrow table.

    Raises:
        DataError: If it is empty, not UTF-8, or damaged; names the line where there is one.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl}
    try:
        table = readers[path.suffix](path) if path.suffix in readers else pq.read_table(path, memory_map=True)
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path} is not UTF-8 text (near line {line}). Save it as UTF-8.") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if table.num_rows == 0:
        raise DataError(f"{path} has no rows.")
    return table


def _read_csv(path: Path) -> pa.Table:
    """Return all columns as strings; an empty field is null."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        head = file.readline()
        delimiter = "\t" if path.suffix == ".tsv" else max(",;\t|", key=head.count)
        file.seek(0)
        rows = csv.reader(file, delimiter=delimiter)
        names = next(rows, [])
        if len(set(names)) < len(names):
            raise DataError(f"{path} names a column twice in its first line: {', '.join(names)}.")
        columns: list[list[str | None]] = [[] for _ in names]
        for row in rows:
            if not row:
                continue
            if len(row) != len(names):
                raise DataError(
                    f"Line {rows.line_num} of {path} has {len(row)} fields, its first line has {len(names)} "
                    f"({', '.join(names)}). Put texts that contain {delimiter!r} in double quotes."
                )
            for column, value in zip(columns, row, strict=True):
                column.append(value or None)
    return pa.table({name: pa.array(column, pa.string()) for name, column in zip(names, columns, strict=True)})


def _read_jsonl(path: Path) -> pa.Table:
    records = []
    with path.open(encoding="utf-8") as file:
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
    """Return a table with one column per key that any record has."""
    names = list(dict.fromkeys(name for record in records for name in record))
    return pa.table({name: pa.array([record.get(name) for record in records]) for name in names})


def read_folder(folder: Path) -> tuple[pa.Table, Path, str]:
    """Return a table, the folder its image paths are relative to, and a sentence about the layout that was found.

    Raises:
        DataError: If there is nothing to read.
    """
    tables = sorted(path for path in folder.iterdir() if path.suffix in TABLE_SUFFIXES)
    tars = sorted(path for path in folder.iterdir() if path.suffix == ".tar")
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if tables and all(path.suffix == ".parquet" for path in tables):
        return pa.concat_tables([read_table(path) for path in tables]), folder, f"{len(tables)} parquet files."
    if len(tables) > 1:
        preferred = [path for path in tables if path.stem in ("metadata", "captions", "labels")]
        if len(preferred) != 1:
            raise DataError(f"{folder} holds several tables ({', '.join(p.name for p in tables)}). Name one of them.")
        tables = preferred
    if tables:
        return read_table(tables[0]), folder, f"Images described by {tables[0].name}."
    if tars:
        return read_tars(tars), folder, f"{len(tars)} tar shards."
    if not images:
        raise DataError(
            f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}), no table ({', '.join(TABLE_SUFFIXES)}) and no .tar shard."
        )
    return _read_image_files(folder, images)


def _read_image_files(folder: Path, images: list[Path]) -> tuple[pa.Table, Path, str]:
    """Return images with the text files of the same name, else with the names of their folders as classes."""
    paths = [str(path.relative_to(folder)) for path in images]
    captions = [_lines(path.with_suffix(".txt")) for path in images]
    if any(captions):
        found = sum(map(bool, captions))
        table = pa.table({"image": paths, "caption": pa.array(captions, pa.list_(pa.string()))})
        return table, folder, f"Images with text files of the same name: {found} of {len(images)} have one."
    labels = [path.parent.name if path.parent != folder else None for path in images]
    if all(labels):
        kinds = len(set(labels))
        return pa.table({"image": paths, "label": labels}), folder, f"One folder per class: {kinds} classes."
    return pa.table({"image": paths}), folder, "Images without any text."


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()] if path.exists() else []
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text. Save it as UTF-8.") from error


def read_tars(paths: Iterable[Path]) -> pa.Table:
    """Return an index of webdataset shards: where each image lies, and its texts. Nothing is unpacked.

    Raises:
        DataError: If a shard is compressed, damaged, or names files outside itself.
    """
    records = []
    for path in paths:
        if path.name.endswith(_TAR_COMPRESSED):
            raise DataError(f"{path} is compressed, so it has no random access. Decompress it to .tar first.")
        try:
            with tarfile.open(path, "r:") as archive:
                records += _index(archive, path)
        except tarfile.TarError as error:
            raise DataError(f"{path} cannot be read as a tar file: {error}. It may be cut short.") from error
    if not records:
        raise DataError("The tar shards hold no images.")
    return from_records(records)


def _index(archive: tarfile.TarFile, path: Path) -> list[dict[str, Any]]:
    """Return one record per key of a shard; members `key.jpg`, `key.txt`, `key.json`, `key.cls` belong together."""
    records: dict[str, dict[str, Any]] = {}
    for member in archive:
        if not member.isfile():
            continue
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts:
            raise DataError(f"{path} holds a file that points outside of it ({member.name!r}). It was made to do harm.")
        stem, _, suffix = name.name.partition(".")
        key = str(name.with_name(stem))
        record = records.setdefault(key, {"key": key, "image": None})
        if f".{suffix.lower()}" in IMAGE_SUFFIXES:
            record["image"] = {"file": str(path), "offset": member.offset_data, "size": member.size}
            continue
        if suffix not in ("txt", "json", "cls"):
            continue
        file = archive.extractfile(member)
        assert file is not None
        try:
            text = file.read().decode()
            _add_text(record, suffix, text)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"{member.name} in {path} cannot be read: {error}") from error
    return [record for record in records.values() if record["image"] is not None]


def _add_text(record: dict[str, Any], suffix: str, text: str) -> None:
    if suffix == "txt":
        record["caption"] = [line for line in text.splitlines() if line.strip()]
    elif suffix == "cls":
        record["label"] = text.strip()
    else:
        values = json.loads(text)
        record |= {name: value for name, value in values.items() if name not in record and isinstance(value, str)}
