"""What frozen towers made of one source, so that evaluating again and again while heads train asks them once.

Batches are kept whole, as they were asked: kernels may round otherwise in another batch, and so what is measured with a memory equals what is
measured without one to the last bit.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from diptych import files
from diptych.data.sources import AbstractSource
from diptych.data.store import TensorStore, hash_bytes
from diptych.models.dual import DualEncoder, Images
from diptych.models.modes import is_frozen
from diptych.types import Sample, Tokens, TowerOutput


@dataclass(frozen=True)
class Shown:
    """A batch of a source's readable images, without the images.

    Attributes:
        rows: Of the images, in their source; none in a batch that only says what was skipped.
        samples: Without image and mask.
        skipped: What was left out before and between them, with reasons.
    """

    rows: tuple[int, ...]
    samples: tuple[Sample, ...]
    skipped: tuple[str, ...]


Batches = Iterable[tuple[Shown, Images | None]]
"""Batches of a source with their images, None where there are none."""


class TowerMemory:
    """Outputs of the frozen towers of one model on one source; towers that are trained are asked every time.

    Attributes:
        model: Whose towers; what is frozen must stay as it is.
        source: Whose images; they must stay as they are.
    """

    def __init__(self, model: DualEncoder, source: AbstractSource, folder: Path, *, gigabytes: float = 20.0) -> None:
        """Make an empty memory.

        Args:
            model: See above.
            source: See above.
            folder: Where outputs are kept, memory-mapped; need not exist.
            gigabytes: More is not kept, but asked again.
        """
        self.model, self.source = model, source
        self._store, self._room = TensorStore(folder), gigabytes * 1e9
        self._columns: dict[int, tuple[str, ...]] = {}
        self._shown: dict[int, list[Shown]] = {}

    def images(self, batches: Batches, batch_size: int) -> Iterator[tuple[Shown, Images | None]]:
        """Yield the batches of the source with outputs in place of pixels; those are decoded and encoded the first time only.

        Args:
            batches: All of them, lazily.
            batch_size: Of these batches.
        """
        if not is_frozen(self.model.vision):
            yield from batches
        elif batch_size in self._shown:
            for shown in self._shown[batch_size]:
                yield shown, self._take(_key_of(shown)) if shown.rows else None
        else:
            seen, whole = [], True
            for shown, pixels in batches:
                output = None if pixels is None else self.model.image_output(pixels)
                whole = whole and (output is None or self._keep(_key_of(shown), self.model.image_head, output))
                seen.append(shown)
                yield shown, output
            if whole:
                self._shown[batch_size] = seen

    def texts(self, tokens: Tokens) -> Tokens:
        """Return a batch of texts with the output of the text tower, which is asked if it never was."""
        if not is_frozen(self.model.text):
            return tokens
        key = hash_bytes(tokens.ids.cpu().numpy(), tokens.mask.cpu().numpy())
        if key in self._columns:
            return replace(tokens, output=self._take(key))
        output = self.model.text_output(tokens)
        self._keep(key, self.model.text_head, output)
        return replace(tokens, output=output)

    def _keep(self, key: int, head: nn.Module, output: TowerOutput) -> bool:
        """Keep as much of an output as its head reads; return whether there was room."""
        if self._room <= 0:
            return False
        columns = _columns(_read_by(head, output))
        size = sum(tensor.nbytes for tensor in columns.values())
        if size > self._room:
            return False
        try:
            self._store.add(torch.tensor([key]), {name: tensor.cpu()[None] for name, tensor in columns.items()})
        except OSError:  # no room, or no permission: what cannot be kept is asked again
            self._room = 0.0
            return False
        self._room -= size
        self._columns[key] = tuple(columns)
        return True

    def _take(self, key: int) -> TowerOutput:
        row = self._store.find(torch.tensor([key]))
        found = {name: self._store.take(name, row)[0].to(self.model.device) for name in self._columns[key]}
        grid = found.pop("grid", None)
        return TowerOutput(**found, grid=None if grid is None else tuple(grid.tolist()))  # type: ignore[arg-type]


@contextmanager
def remembered(model: DualEncoder, source: AbstractSource, *, gigabytes: float = 20.0) -> Iterator[TowerMemory]:
    """Open a memory that lasts as long as the context, in the folder for what was computed."""
    with files.passing_folder(files.feature_folder(), "remembered") as folder:
        yield TowerMemory(model, source, folder, gigabytes=gigabytes)


def _key_of(shown: Shown) -> int:
    return hash_bytes(repr(shown.rows).encode())


def _read_by(head: nn.Module, output: TowerOutput) -> TowerOutput:
    """Return the pooled vector alone if the head makes the same of it, else the tokens too."""
    pooled = TowerOutput(output.pooled)
    try:
        if torch.equal(head(pooled), head(output)):
            return pooled
    except Exception:  # whatever comes of looking at tokens that are not there
        pass
    return TowerOutput(output.pooled, output.tokens, output.mask, output.grid)


def _columns(output: TowerOutput) -> dict[str, Tensor]:
    found = {"pooled": output.pooled, "tokens": output.tokens, "mask": output.mask}
    grid = None if output.grid is None else torch.tensor(output.grid)
    return {name: tensor for name, tensor in (found | {"grid": grid}).items() if tensor is not None}
