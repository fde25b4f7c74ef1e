"""Tar shards as webdataset writes them, read in place: an index of where each image lies, nothing unpacked to disk."""

import hashlib
import json
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from diptych import files
from diptych.data.tables import IMAGE_SUFFIXES, from_records, text_lines
from diptych.errors import DataError

FORMAT = 1
"""Of the kept index; a change of this file that changes the records must raise it."""

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_tar(path: Path) -> bool:
    """Return whether a file is named like a tar shard, compressed or not."""
    return path.name.lower().endswith((".tar", *_COMPRESSED))


def read_tars(paths: Iterable[Path]) -> pa.Table:
    """Return an index of webdataset shards with a row per image.

    Members `key.jpg`, `key.txt` (a caption a line), `key.json` (captions and other fields by name) and `key.cls` belong together.
    The column `image` holds {file, offset, size}, so any image is one seek away. A shard is scanned once: what was found is kept on the
    disk until the shard's size or time of change is another.

    Raises:
        DataError: If a shard is compressed, damaged, or names files outside itself.
    """
    records = []
    for path in paths:
        if path.name.lower().endswith(_COMPRESSED):
            raise DataError(f"{path} is compressed, so it has no random access. Decompress it to .tar first.")
        try:
            records += _kept_index(path.absolute())
        except (tarfile.TarError, OSError) as error:
            raise DataError(f"{path} cannot be read as a tar file: {error}. It may be cut short.") from error
    if not records:
        raise DataError("The tar shards hold no images.")
    return from_records(records)


def _kept_index(path: Path) -> list[dict[str, Any]]:
    """Return the records of a shard, found before or now."""
    state = path.stat()
    key = f"{FORMAT} {path} {state.st_size} {state.st_mtime_ns}"
    kept = files.feature_folder() / "tar" / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.json"
    with suppress(OSError, ValueError):  # absent or damaged: scan
        records: list[dict[str, Any]] = json.loads(kept.read_text())
        return records
    with tarfile.open(path, "r:") as archive:
        records = _index(archive, path)
    with suppress(OSError), files.atomic_file(kept) as file:  # a full disk costs time and nothing else
        file.write_text(json.dumps(records))
    return records


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
