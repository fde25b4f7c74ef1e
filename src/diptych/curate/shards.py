"""What is kept, as shards to train on: parquet with the images inside, or tar as webdataset reads it. Equal rows give equal bytes."""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diptych.curate.pairs import images_of, is_address
from diptych.curate.parts import Layout
from diptych.curate.reasons import kept, with_column, with_reason
from diptych.errors import ConfigError
from diptych.files import atomic_file

NO_IMAGE = "no image"

_GROUP_BYTES = 32 << 20  # of a row group: what a training process reads to see one image
_SUFFIXES = {b"\xff\xd8": "jpg", b"\x89P": "png", b"GI": "gif", b"RI": "webp", b"BM": "bmp", b"II": "tif", b"MM": "tif"}


@dataclass(frozen=True)
class WriteConfig:
    """How shards are written.

    Attributes:
        format: `parquet`, or `tar` with `key.jpg`, `key.txt` and `key.json`.
        shard_rows: Most samples per shard.
        shard_bytes: A shard ends when it has come to this.
    """

    format: Literal["parquet", "tar"] = "parquet"
    shard_rows: int = 10_000
    shard_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        if self.shard_rows < 1 or self.shard_bytes < 1:
            raise ConfigError(f"A shard holds at least one row and one byte; this is {self}.")


def without_images_dropped(
    table: pa.Table, block: pa.Table, first: int, layout: Layout, *, addresses: bool
) -> tuple[pa.Table, dict[int, bytes]]:
    """Return the pairs, those dropped whose image is not there, and the images of the others by row of the block.

    Args:
        table: Pairs.
        block: The rows of the source that they were made of.
        first: Number of the block's first row.
        layout: What its columns mean; without images, nothing is missing.
        addresses: Whether an address on the network will do.
    """
    if layout.image is None:
        return table, {}
    rows = table["row"].to_numpy() - first
    wanted = np.unique(rows[kept(table)])
    images = images_of(block, wanted, layout)
    there = set(images)
    if addresses and layout.image in block.column_names:
        cells = block[layout.image].take(wanted).to_pylist()
        there |= {row for row, cell in zip(wanted.tolist(), cells, strict=True) if is_address(cell)}
    return with_reason(table, ~np.isin(rows, list(there)), NO_IMAGE), images


def samples_of(table: pa.Table, block: pa.Table, first: int, layout: Layout, images: dict[int, bytes]) -> pa.Table:
    """Return the rows of a source that have a caption left, with those captions, their images, and all other columns as they were.

    The key is that of the first caption left. `language` and `chance` are added where steps have found them.
    """
    pairs = table.filter(pa.array(kept(table)))
    row = pairs["row"].to_numpy() - first
    starts = np.flatnonzero(np.diff(row, prepend=-1))
    found, head = block.take(row[starts]), pairs.take(starts)
    texts = pairs["caption"].combine_chunks()
    if layout.text not in block.column_names or pa.types.is_nested(block.schema.field(layout.text).type):
        ends = np.append(starts, len(row))
        texts = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), texts)
    found = with_column(found, layout.text, texts)
    found = with_column(found, layout.key or "key", head["key"])
    if layout.image is not None and images:
        found = with_column(found, layout.image, pa.array([images.get(r) for r in row[starts].tolist()], pa.binary()))
    if pairs["language"].null_count < pairs.num_rows:
        found = with_column(found, layout.language or "language", head["language"])
    return with_column(found, "chance", head["chance"]) if "chance" in head.column_names else found


class ShardWriter:
    """Writes samples as shards `<prefix>-000`, `<prefix>-001`, ...; each is there whole or not at all."""

    def __init__(self, folder: Path, prefix: str, config: WriteConfig, layout: Layout) -> None:
        self.folder, self.prefix, self.config, self.layout = folder, prefix, config, layout
        self.names: list[str] = []
        self._held: list[pa.Table] = []

    def add(self, table: pa.Table) -> None:
        """Add samples; a shard that has become full is written."""
        while table.num_rows:
            space = self.config.shard_rows - sum(held.num_rows for held in self._held)
            self._held.append(table.slice(0, space))
            table = table.slice(space)
            rows, size = sum(held.num_rows for held in self._held), sum(held.nbytes for held in self._held)
            if rows == self.config.shard_rows or size >= self.config.shard_bytes:
                self.flush()

    def flush(self) -> None:
        """Write what is left."""
        if not self._held:
            return
        table, self._held = _joined(self._held), []
        name = f"{self.prefix}-{len(self.names):03}.{self.config.format}"
        with atomic_file(self.folder / name) as file:
            if self.config.format == "parquet":
                rows = max(1, _GROUP_BYTES * table.num_rows // max(1, table.nbytes))
                pq.write_table(table, file, row_group_size=rows)
            else:
                _write_tar(table, file, self.layout)
        self.names.append(name)


def _joined(tables: list[pa.Table]) -> pa.Table:
    """Return tables as one; a column that has types which do not fit together becomes strings."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException:
        kinds: dict[str, set[str]] = {}
        for table in tables:
            for field in table.schema:
                kinds.setdefault(field.name, set()).add(str(field.type))
        mixed = {name for name, seen in kinds.items() if len(seen) > 1}
        return pa.concat_tables([_spelled(table, mixed) for table in tables], promote_options="permissive")


def _spelled(table: pa.Table, names: set[str]) -> pa.Table:
    for name in names & set(table.column_names):
        texts = [v if v is None or isinstance(v, str) else json.dumps(v, default=str) for v in table[name].to_pylist()]
        table = with_column(table, name, pa.array(texts, pa.string()))
    return table


def _write_tar(table: pa.Table, path: Path, layout: Layout) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in _members(table, layout):
            member = tarfile.TarInfo(name)  # time, owner and mode stay what they are for all
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def _members(table: pa.Table, layout: Layout) -> Iterator[tuple[str, bytes]]:
    key = layout.key or "key"
    for row in table.to_pylist():
        stem = quote(row.pop(key), safe=" ").replace(".", "%2E")  # a dot would end the name of the sample
        image, texts = row.pop(layout.image) if layout.image else None, row.pop(layout.text)
        if isinstance(image, bytes):
            yield f"{stem}.{_SUFFIXES.get(image[:2], 'jpg')}", image
        lines = texts if isinstance(texts, list) else [texts]
        yield f"{stem}.txt", "\n".join(" ".join(line.split()) for line in lines).encode()
        if rest := {name: value for name, value in row.items() if value is not None}:
            yield f"{stem}.json", json.dumps(rest, ensure_ascii=False, default=str).encode()


def count_kept(path: Path) -> int:
    """Return how many rows of a file of pairs are kept."""
    return int(pc.sum(pc.is_null(pq.read_table(path, columns=["reason"])["reason"])).as_py() or 0)
