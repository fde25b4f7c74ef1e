"""A source of any size in parts: each is read on its own, in order, batch by batch, and what cannot be read is a row that says so.

Files are parquet, jsonl, csv and tar shards, one of them, a folder of them, what a pattern stands for, or the output of img2dataset in any of its
formats. Large parquet and jsonl files are several parts. A name such as `flickr8k-1k:train` is read through `open_source`.
"""

import csv
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from glob import glob
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from diptych.curate.source_table import encoded
from diptych.data.columns import Columns, role_of, sniff
from diptych.data.parquet import holds_bytes
from diptych.data.rows import image_folder, without_categories
from diptych.data.sources import AbstractSource, expand_braces, open_source
from diptych.data.tables import IMAGE_SUFFIXES, from_records, text_lines
from diptych.data.tar import is_tar
from diptych.errors import ColumnError, DataError, DiptychError

Kind = Literal["parquet", "jsonl", "csv", "tar", "folder", "source"]

BATCH_ROWS, BATCH_BYTES = 8192, 32 << 20
"""Whichever is reached first ends a batch."""
NOT_UTF8, NOT_JSON, NOT_FETCHED = "text is not UTF-8", "line is not a JSON object", "not downloaded"
BAD_ROW, BAD_SHARD = "row cannot be read", "rest of the shard cannot be read"
"""Reasons of rows that could not be read. A damaged shard gives one row for all that is behind the damage, unless their number is known."""

_KINDS: dict[str, Kind] = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv"}
_SAMPLES = 1024  # of a named source, or of a folder, per batch without images
csv.field_size_limit(2**31 - 1)


@dataclass(frozen=True)
class Part:
    """A piece of a source.

    Attributes:
        kind: How it is read.
        path: File or folder; the name of a source.
        start: First row group, byte or sample.
        stop: Behind the last; None for the end.
        sidecar: Parquet file in which img2dataset says what was not downloaded.
    """

    kind: Kind
    path: str
    start: int = 0
    stop: int | None = None
    sidecar: str | None = None

    @property
    def name(self) -> str:
        """Return what its rows are called by where they have no key of their own: the same wherever the source lies."""
        return f"{PurePosixPath(self.path).name}@{self.start}"


@dataclass(frozen=True)
class Block:
    """Some rows as they stand in the source.

    Attributes:
        table: All columns; without their images where none were asked for.
        faults: By number of the row within the block, why it could not be read.
    """

    table: pa.Table
    faults: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """What the columns of all parts mean.

    Attributes:
        text: Captions, a string or a list of strings per row.
        image: Images; None where there are none.
        key: Names of rows; None where they have none.
        language: Of the captions, if the source says.
        folder: What image paths are relative to.
    """

    text: str
    image: str | None = None
    key: str | None = None
    language: str | None = None
    folder: str = "."


def find_parts(spec: str, *, part_bytes: int = 256 << 20) -> list[Part]:
    """Return the parts of a source, in an order that follows from names alone.

    Args:
        spec: A file, a folder, a pattern, or a name that `open_source` knows.
        part_bytes: Larger parquet and jsonl files are cut.

    Raises:
        DataError: If there is nothing to read.
    """
    paths = sorted({Path(path) for name in expand_braces(spec) for path in glob(name)})
    if not paths:
        size = len(open_source(spec))
        return [Part("source", spec, start, min(start + 10_000, size)) for start in range(0, size, 10_000)]
    found = [part for path in paths for part in (_in_folder(path) if path.is_dir() else _of_file(path))]
    if not found:
        raise DataError(
            f"{spec} holds no parquet, jsonl, csv or tar file, and no images with text files. Name one, or a folder of them."
        )
    return [piece for part in found for piece in _cut(part, part_bytes)]


def _of_file(path: Path) -> list[Part]:
    if is_tar(path):
        sidecar = path.with_suffix(".parquet")
        return [Part("tar", str(path), sidecar=str(sidecar) if sidecar.exists() else None)]
    if path.suffix.lower() not in _KINDS:
        raise DataError(f"{path} ends in {path.suffix!r}. Known: a folder, .tar, {', '.join(_KINDS)}.")
    return [Part(_KINDS[path.suffix.lower()], str(path))]


def _in_folder(folder: Path) -> list[Part]:
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    tars = [path for path in inside if is_tar(path)]
    if tars:
        return [part for path in tars for part in _of_file(path)]
    tables = [path for path in inside if path.suffix.lower() in _KINDS]
    shards = {path.stem: path for path in tables if path.suffix == ".parquet"}
    files = [path for path in inside if path.is_dir() and path.name in shards]
    if files:  # img2dataset's `files`: 00000.parquet describes the images in 00000
        return [Part("folder", str(path), sidecar=str(shards[path.name])) for path in files]
    if tables:
        return [part for path in tables for part in _of_file(path)]
    holds_images = any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.rglob("*"))
    return [Part("folder", str(folder))] if holds_images else []


def _cut(part: Part, size: int) -> Iterator[Part]:
    """Yield a large file in pieces: runs of row groups, or of bytes, of which a line belongs to the piece that it begins in."""
    starts = [0]
    with suppress(OSError, pa.ArrowException):  # a damaged file is one part, whose reader says what is wrong
        if part.kind == "jsonl":
            starts = list(range(0, Path(part.path).stat().st_size, size)) or [0]
        elif part.kind == "parquet":
            metadata, held = pq.read_metadata(part.path), 0
            for group in range(metadata.num_row_groups):
                held += metadata.row_group(group).total_byte_size
                if held > size and group > starts[-1]:
                    starts.append(group)
                    held = metadata.row_group(group).total_byte_size
    for start, stop in zip(starts, [*starts[1:], None], strict=True):
        yield Part(part.kind, part.path, start, stop, part.sidecar)


def find_layout(parts: Sequence[Part], columns: Columns | None = None) -> Layout:
    """Return what the columns mean: as the user says, else as those of the first rows tell.

    Raises:
        ColumnError: If no column holds captions, or a named one is missing.
        DataError: If not one row can be read.
    """
    given = columns or Columns()
    block = next((b for part in parts for b in read(part) if len(b.faults) < b.table.num_rows), None)
    if block is None:
        raise DataError(f"Not one row of {len(parts):,} parts can be read; the first is {parts[0].path}.")
    found = sniff(block.table, given)
    text = next((name for name in found.texts if given.texts or role_of(name)[0] == "caption"), None)
    if text is None:
        raise ColumnError(
            f"No column holds captions. Name it with columns.texts. Known: {', '.join(block.table.column_names)}."
        )
    path = Path(parts[0].path)
    base = path if parts[0].kind == "folder" else path.parent
    folder = image_folder(block.table, found.image, base.absolute())
    return Layout(text, found.image, found.key, found.language, str(folder))


def read(part: Part, *, images: bool = False) -> Iterator[Block]:
    """Yield all rows of a part in order, the same whenever it is read.

    Args:
        part: Where.
        images: Whether encoded images are read too; their column is null without.
    """
    readers = {"parquet": _parquet, "jsonl": _jsonl, "csv": _csv, "tar": _tar, "folder": _folder, "source": _source}
    for block in readers[part.kind](part, images):
        yield _checked(block)


def _checked(block: Block) -> Block:
    """Return a block whose strings are all UTF-8 but for those of rows with a fault."""
    table, faults = without_categories(block.table), dict(block.faults)
    for column in table.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            for row in range(len(column)):
                try:
                    pa.chunked_array([pa.concat_arrays(column.slice(row, 1).chunks)]).validate(full=True)
                except pa.ArrowInvalid:
                    faults.setdefault(row, NOT_UTF8)
    return Block(table, faults)


def _unread(count: int, reason: str) -> Block:
    """Return rows of which nothing is known."""
    return Block(pa.table({"key": pa.nulls(count, pa.string())}), dict.fromkeys(range(count), reason))


def _parquet(part: Part, images: bool) -> Iterator[Block]:
    try:
        file = pq.ParquetFile(part.path)
    except (pa.ArrowException, OSError):
        yield _unread(1, BAD_SHARD)
        return
    with file:
        fields = [f for f in file.schema_arrow if images or not holds_bytes(f.type)]
        absent = [f for f in file.schema_arrow if not images and holds_bytes(f.type)]
        for group in range(part.start, file.num_row_groups if part.stop is None else part.stop):
            found = file.metadata.row_group(group)
            rows = min(BATCH_ROWS, max(1, found.num_rows * BATCH_BYTES // max(1, found.total_byte_size)))
            done = 0
            try:
                for batch in file.iter_batches(rows, row_groups=[group], columns=[f.name for f in fields]):
                    table = pa.table(batch)
                    for one in absent:
                        table = table.append_column(one, pa.nulls(table.num_rows, one.type))
                    done += table.num_rows
                    yield Block(table)
            except (pa.ArrowException, OSError):
                yield _unread(found.num_rows - done, BAD_ROW)


def _jsonl(part: Part, images: bool) -> Iterator[Block]:
    del images
    with Path(part.path).open("rb") as file:
        if part.start:
            file.seek(part.start - 1)
            file.readline()  # the line that began before belongs to the part before
        while lines := list(_lines(file, part.stop)):
            records, faults = [], {}
            for number, line in enumerate(lines):
                record, fault = _record(line.removeprefix(b"\xef\xbb\xbf"))
                records.append(record)
                if fault:
                    faults[number] = fault
            yield Block(_as_table(records), faults)


def _lines(file: Any, stop: int | None) -> Iterator[bytes]:
    """Yield lines of one batch that are not blank and begin before `stop`."""
    count = size = 0
    while count < BATCH_ROWS and size < BATCH_BYTES and (stop is None or file.tell() < stop):
        if not (line := file.readline()):
            return
        size += len(line)
        if line.strip():
            count += 1
            yield line


def _record(text: bytes) -> tuple[dict[str, Any], str | None]:
    """Return a JSON object and None, or nothing and what is wrong with it."""
    try:
        record = json.loads(text.decode())
        if b"\\u" in text:
            json.dumps(record, ensure_ascii=False).encode()  # half of an emoji, as "\ud83d"
    except UnicodeError:
        return {}, NOT_UTF8
    except (ValueError, RecursionError):
        return {}, NOT_JSON
    return (record, None) if isinstance(record, dict) else ({}, NOT_JSON)


def _as_table(records: Sequence[dict[str, Any]]) -> pa.Table:
    found = from_records(list(records))
    return found if found.num_columns else pa.table({"key": pa.nulls(len(records), pa.string())})


def _csv(part: Part, images: bool) -> Iterator[Block]:
    """Yield rows of strings; an empty field is null. Bytes that are not UTF-8 spoil their row only."""
    del images
    with Path(part.path).open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        first = file.readline()
        delimiter = "\t" if part.path.lower().endswith(".tsv") else max(",;\t|", key=first.count)
        file.seek(0)
        rows = csv.reader(file, delimiter=delimiter)
        names = next(rows, [])
        while batch := list(_csv_batch(rows)):
            records, faults = [], {}
            for number, row in enumerate(batch):
                whole = len(row) == len(names)
                fault = None if whole and _is_utf8(row) else NOT_UTF8 if whole else BAD_ROW
                if fault:
                    faults[number] = fault
                records.append({} if fault else {n: v or None for n, v in zip(names, row, strict=True)})
            columns = {name: pa.array([r.get(name) for r in records], pa.string()) for name in names}
            yield Block(pa.table(columns), faults)


def _csv_batch(rows: Iterator[list[str]]) -> Iterator[list[str]]:
    count = size = 0
    while count < BATCH_ROWS and size < BATCH_BYTES:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:
            row = [""]
        if row:
            count, size = count + 1, size + sum(map(len, row))
            yield row


def _is_utf8(row: Iterable[str]) -> bool:
    return all(text.isprintable() or not any("\ud800" <= c <= "\udfff" for c in text) for text in row)


def _tar(part: Part, images: bool) -> Iterator[Block]:
    """Yield the samples of a tar shard, compressed or not: members `key.jpg`, `key.txt`, `key.json` that stand together."""
    yield from _samples(_tar_members(Path(part.path), images))
    yield from _not_fetched(part)


@dataclass(frozen=True)
class _Member:
    """A file of a sample. `data` is None where it was not read because it is an image; `broken` ends a shard."""

    name: str
    data: bytes | None
    broken: bool = False


def _tar_members(path: Path, images: bool) -> Iterator[_Member]:
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                if member.isfile() and not PurePosixPath(member.name).name.startswith("."):
                    picture = PurePosixPath(member.name).suffix.lower() in IMAGE_SUFFIXES
                    file = archive.extractfile(member)
                    assert file is not None
                    whole = images or not picture
                    yield _Member(member.name, file.read() if whole else None)
                    archive.members = []  # type: ignore[attr-defined] # it would remember all of them
    except (tarfile.TarError, OSError, EOFError):
        yield _Member("", None, broken=True)


def _folder(part: Part, images: bool) -> Iterator[Block]:
    """Yield the images below a folder with the text files of the same name."""
    yield from _samples(_folder_members(Path(part.path), images))
    yield from _not_fetched(part)


def _folder_members(folder: Path, images: bool) -> Iterator[_Member]:
    known = (*IMAGE_SUFFIXES, ".txt", ".json")
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in known)
    for name in sorted((name for name in names if not any(p.startswith(".") for p in name.parts)), key=_stem_first):
        picture = name.suffix.lower() in IMAGE_SUFFIXES
        try:
            yield _Member(name.as_posix(), (folder / name).read_bytes() if images or not picture else None)
        except OSError:
            yield _Member(name.as_posix(), b"")


def _stem_first(name: Path) -> tuple[str, str]:
    return _stem(name.as_posix()), name.suffix


def _stem(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(path.name.partition(".")[0] or path.name))


def _samples(members: Iterable[_Member]) -> Iterator[Block]:
    """Yield members grouped by their names up to the first dot; texts that cannot be read spoil their sample only."""
    records: list[dict[str, Any]] = []
    faults: dict[int, str] = {}
    size = 0
    for member in members:
        if member.broken:
            records.append({})
            faults[len(records) - 1] = BAD_SHARD
            continue
        stem = _stem(member.name)
        if not records or records[-1].get("key") != stem:
            if len(records) >= BATCH_ROWS or size >= BATCH_BYTES:
                yield _sample_block(records, faults)
                records, faults, size = [], {}, 0
            records.append({"key": stem, "image": None})
        size += len(member.data or b"")
        if fault := _add(records[-1], PurePosixPath(member.name).suffix.lower(), member.data):
            faults[len(records) - 1] = fault
    if records:
        yield _sample_block(records, faults)


def _add(record: dict[str, Any], suffix: str, data: bytes | None) -> str | None:
    """Add a member to its sample; return what is wrong with it."""
    if suffix in IMAGE_SUFFIXES:
        record["image"] = data
    elif suffix == ".txt":
        try:
            record["caption"] = text_lines((data or b"").decode("utf-8-sig"))
        except UnicodeError:
            return NOT_UTF8
    elif suffix == ".json":
        values, fault = _record(data or b"")
        if fault:
            return fault
        record |= {name: value for name, value in values.items() if name not in record}
    return None


def _sample_block(records: list[dict[str, Any]], faults: dict[int, str]) -> Block:
    images = pa.array([record.pop("image", None) for record in records], pa.binary())
    return Block(_as_table(records).append_column("image", images), faults)


def _not_fetched(part: Part) -> Iterator[Block]:
    """Yield what img2dataset could not download, with its caption."""
    if part.sidecar is None:
        return
    for block in _parquet(Part("parquet", part.sidecar), False):
        if "status" not in block.table.column_names:
            return
        said = block.table["status"].to_pylist()
        failed = [row for row, status in enumerate(said) if status != "success"]
        yield Block(block.table.take(failed), dict.fromkeys(range(len(failed)), NOT_FETCHED))


def _source(part: Part, images: bool) -> Iterator[Block]:
    """Yield the samples of a named source; an image that cannot be read is none."""
    source = open_source(part.path)
    numbers = iter(range(part.start, len(source) if part.stop is None else part.stop))
    while some := list(islice(numbers, _SAMPLES if not images else _SAMPLES // 8)):
        samples = [source.without_image(index) for index in some]
        captions = [[text.text for text in sample.texts if text.role in ("caption", "label")] for sample in samples]
        cells = [_image_of(source, index) if images else None for index in some]
        yield Block(
            pa.table(
                {
                    "key": [sample.key for sample in samples],
                    "image": pa.array(cells, pa.binary()),
                    "caption": pa.array(captions, pa.list_(pa.string())),
                }
            )
        )


def _image_of(source: AbstractSource, index: int) -> bytes | None:
    try:
        image = source[index].image
        return None if image is None else encoded(image)
    except DiptychError:
        return None
