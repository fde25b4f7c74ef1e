"""Tar shards as webdataset writes them, read in place: an index of where each image lies, nothing unpacked to disk."""

import json
import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from diptych.data.tables import IMAGE_SUFFIXES, from_records, text_lines
from diptych.errors import DataError

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_tar(path: Path) -> bool:
    """Return whether a file is named like a tar shard, compressed or not."""
    return path.name.lower().endswith((".tar", *_COMPRESSED))


def read_tars(paths: Iterable[Path]) -> pa.Table:
    """Return an index of webdataset shards with a row per image.

    Members `key.jpg`, `key.txt` (a caption a line), `key.json` (captions and other fields by name) and `key.cls` belong together.
    The column `image` holds {file, offset, size}, so any image is one seek away.

    Raises:
        DataError: If a shard is compressed, damaged, or names files outside itself.
    """
    records = []
    for path in paths:
        if path.name.lower().endswith(_COMPRESSED):
            raise DataError(f"{path} is compressed, so it has no random access. Decompress it to .tar first.")
        try:
            with tarfile.open(path, "r:") as archive:
                records += _index(archive, path.absolute())
        except (tarfile.TarError, OSError) as error:
            raise DataError(f"{path} cannot be read as a tar file: {error}. It may be cut short.") from error
    if not records:
        raise DataError("The tar shards hold no images.")
    return from_records(records)


def _index(archive: tarfile.TarFile, path: Path) -> list[dict[str, Any]]:
    """Return one record per key of a shard."""
    records: dict[str, dict[str, Any]] = {}
    for member in archive:
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts:
            raise DataError(
                f"{path} holds a file that points outside of it ({member.name!r}). Do not trust this shard."
            )
        if not member.isfile() or name.name.startswith("."):
            continue
        stem, _, suffix = name.name.partition(".")
        key = str(name.with_name(stem))
        record = records.setdefault(key, {"key": key, "image": None})
        suffix = suffix.lower()
        if f".{suffix}" in IMAGE_SUFFIXES:
            record["image"] = {"file": str(path), "offset": member.offset_data, "size": member.size}
        elif suffix in ("txt", "json", "cls"):
            file = archive.extractfile(member)
            assert file is not None
            try:
                _add_text(record, suffix, file.read().decode())
            except ValueError as error:
                raise DataError(f"{member.name} in {path} cannot be read: {error}") from error
    return [record for record in records.values() if record["image"] is not None]


def _add_text(record: dict[str, Any], suffix: str, text: str) -> None:
    if suffix == "txt":
        record["caption"] = text_lines(text)
    elif suffix == "cls":
        record["label"] = text.strip()
    else:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise DataError(f"it must be one object of fields, not {type(values).__name__}.")
        record |= {
            name: value for name, value in values.items() if name not in record and isinstance(value, str | list)
        }
