"""Tensors on disk, found by the hash of what they were made from: memory-mapped, written whole or not at all, never changed.

A store is a folder of shards, and a shard is one safetensors file: `keys`, and columns with one row per key. In a ragged column, such as the
tokens of texts, the rows follow one another and `<column>.ends` says where each ends. Adding rows adds a shard, so a killed process
loses the shard it was writing and nothing else, and two processes may fill one store at once: at worst a row is there twice.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.files import atomic_file
from diptych.types import fill_up

SUFFIX = ".safetensors"


class TensorStore:
    """Rows of tensors by 64-bit key.

    Attributes:
        folder: Where the shards are; need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: dict[str, Mapping[str, Tensor]] = {}
        self._names = [path.name for path in sorted(folder.glob(f"[!.]*{SUFFIX}"))]
        self._open()

    def __len__(self) -> int:
        return len(self._keys)

    def __getstate__(self) -> tuple[Path, list[str]]:
        # Another process maps the same files, and in the same order: rows keep their numbers though shards were added since.
        return self.folder, self._names

    def __setstate__(self, state: tuple[Path, list[str]]) -> None:
        self.folder, self._names = state
        self._opened = {}
        self._open()

    @property
    def columns(self) -> set[str]:
        """Return the names of the columns; none while the store is empty."""
        return set(self._shards[0]) if self._shards else set()

    def find(self, keys: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
        """Return the row of each key, -1 for those that are not there."""
        if len(self) == 0:
            return torch.full_like(keys, -1)
        place = torch.searchsorted(self._keys, keys).clamp(max=len(self) - 1)
        return torch.where(self._keys[place] == keys, self._rows[place], -1)

    def take(self, column: str, rows: Int64[Tensor, " b"]) -> Tensor:
        """Return rows of a column."""
        parts = self._split(rows)
        if len(parts) == 1:
            ((shard, own, _),) = parts
            return shard[column][own]
        first = parts[0][0][column]
        found = first.new_empty(len(rows), *first.shape[1:])
        for shard, own, places in parts:
            found[places] = shard[column][own]
        return found

    def take_ragged(self, column: str, rows: Int64[Tensor, " b"], length: int) -> Tensor:
        """Return rows of a ragged column as [b, length, ...], filled up with zeros.

        Args:
            column: Its name.
            rows: Which ones.
            length: At least that of the longest.
        """
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for shard, own, places in self._split(rows):
            ends = shard[f"{column}.ends"]
            starts = torch.where(own > 0, ends[own - 1], 0)
            for place, start, end in zip(places.tolist(), starts.tolist(), ends[own].tolist(), strict=True):
                found[place] = shard[column][start:end]
        return torch.cat([fill_up(row[None], [length, *row.shape[1:]]) for row in found])

    def constant(self, name: str) -> Tensor:
        """Return a tensor that belongs to the store as a whole."""
        return self._shards[0][f"constant.{name}"]

    def add(
        self,
        keys: Int64[Tensor, " n"],
        columns: Mapping[str, Tensor],
        *,
        ragged: Mapping[str, Sequence[Tensor]] = {},
        constants: Mapping[str, Tensor] = {},
    ) -> None:
        """Write one shard; it is on disk, and can be found, when this returns.

        Args:
            keys: Hashes.
            columns: One row per key.
            ragged: One tensor per key, of any length.
            constants: The same in every shard.

        Raises:
            OSError: If there is no room; nothing is left behind then.
        """
        tensors = {"keys": keys, **columns, **{f"constant.{name}": value for name, value in constants.items()}}
        for name, parts in ragged.items():
            tensors |= {
                name: torch.cat(list(parts)),
                f"{name}.ends": torch.tensor([len(part) for part in parts]).cumsum(0),
            }
        name = f"{hashlib.blake2b(keys.numpy().tobytes(), digest_size=8).hexdigest()}{SUFFIX}"
        try:
            with atomic_file(self.folder / name) as path:
                save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(str(error)) from error
        if name not in self._names:
            self._names.append(name)
        self._opened.pop(name, None)
        self._open()

    def _open(self) -> None:
        # A damaged shard counts as absent: what was in it is made again, under the same name.
        found = {name: self._opened.get(name) or _map(self.folder / name) for name in self._names}
        self._opened = {name: shard for name, shard in found.items() if shard is not None}
        self._names, self._shards = list(self._opened), list(self._opened.values())
        self._ends = torch.tensor([len(shard["keys"]) for shard in self._shards], dtype=torch.int64).cumsum(0)
        keys = torch.cat([shard["keys"] for shard in self._shards] or [torch.empty(0, dtype=torch.int64)])
        self._keys, self._rows = keys.sort(stable=True)

    def _split(self, rows: Int64[Tensor, " b"]) -> list[tuple[Mapping[str, Tensor], Tensor, Tensor]]:
        """Return, per shard that holds some of the rows: the shard, their rows in it, their places in `rows`."""
        number = torch.searchsorted(self._ends, rows, right=True)
        parts = []
        for shard in number.unique().tolist():
            places = (number == shard).nonzero()[:, 0]
            start = int(self._ends[shard - 1]) if shard else 0
            parts.append((self._shards[shard], rows[places] - start, places))
        return parts


def hash_bytes(*parts: bytes | np.ndarray) -> int:
    """Return a 64-bit key of bytes or of pixels with their shape."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else f"{part.shape}{part.dtype}".encode())
        if not isinstance(part, bytes):
            digest.update(np.ascontiguousarray(part).data)
    return int.from_bytes(digest.digest(), "little", signed=True)


def _map(path: Path) -> Mapping[str, Tensor] | None:
    """Return the tensors of a file, read from the disk only where they are looked at; None if it is damaged or gone."""
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError):
        return None
