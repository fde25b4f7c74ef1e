"""Named tensors in one safetensors file, or cut along dimension 0 over one file per process.

`model.safetensors` holds everything. Where it is missing, `model-00001-of-00002.safetensors` and `model-00002-of-00002.safetensors` do: a
tensor that both hold is cut, and its rows follow each other in the order of the files; one that a single file holds is whole there.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


def shard_name(stem: str, part: tuple[int, int]) -> str:
    """Return the file name of one shard: `part` is which, from 0, and of how many."""
    return f"{stem}-{part[0] + 1:05}-of-{part[1]:05}.safetensors"


def shard_paths(folder: Path, stem: str) -> list[Path]:
    """Return the whole file, or all shards in their order.

    Raises:
        FileNotFoundError: If there is neither, or a shard is missing.
    """
    whole = folder / f"{stem}.safetensors"
    if whole.exists():
        return [whole]
    found = sorted(folder.glob(f"{stem}-?????-of-?????.safetensors"))
    count = int(found[0].stem[-5:]) if found else 1
    paths = [folder / shard_name(stem, (number, count)) for number in range(count)] if found else [whole]
    if missing := [path.name for path in paths if not path.exists()]:
        raise FileNotFoundError(f"{', '.join(missing)} is missing")
    return paths


class Shards:
    """Reads tensors, or some rows of them, without reading the rest.

    Raises:
        FileNotFoundError: If there is no file, or a shard is missing.
        SafetensorError: If a file is damaged.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self._holders: dict[str, list[Any]] = {}
        for path in shard_paths(folder, stem):
            file: Any = safe_open(path, "pt")
            for name in file.keys():
                self._holders.setdefault(name, []).append(file)

    @property
    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._holders)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor as if it had never been cut."""
        shapes = [file.get_slice(name).get_shape() for file in self._holders[name]]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows `start` to `stop` of a tensor, all unless said otherwise."""
        files = self._holders[name]
        if (start, stop) == (0, None) and len(files) == 1:
            return files[0].get_tensor(name)  # type: ignore[no-any-return]
        parts, before = [files[0].get_tensor(name)[:0]], 0
        for file in files:
            piece = file.get_slice(name)
            length = piece.get_shape()[0]
            first, last = max(start - before, 0), length if stop is None else min(stop - before, length)
            if first < last:
                parts.append(piece[first:last])
            before += length
        return torch.cat(parts)

    def whole(self) -> dict[str, Tensor]:
        """Return all tensors, whole."""
        return {name: self.rows(name) for name in self._holders}
