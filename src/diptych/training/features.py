"""Frozen towers are asked once: what they make of texts and of views that are not random is kept on the disk, and heads train on that.

Nothing is taken on trust. Whether an objective may be given a tower's output in place of its input is found out by doing it on a few samples: what
it encodes must stay the same to the last bit. On the disk, a store is found under the hash of all that its rows depend on (weights,
architecture, preprocessing, augmentation, number format, versions of packages), a row under the hash of the image or the text itself.

Outputs equal those of the tower in training up to the rounding of its kernels, which may differ with the size of a batch and the length that its
texts are padded to.
"""

import copy
import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from diptych import files
from diptych.config import fingerprint
from diptych.data.features import Cached, CachedImages, CachedTexts, CachedView
from diptych.data.loader import BatchMaker, Loader, TextColumn, choose_workers
from diptych.data.store import TensorStore, hash_bytes
from diptych.data.text_changes import TextChange
from diptych.errors import DataError, ImageError
from diptych.models.dual import DualEncoder
from diptych.models.modes import is_frozen, train_mode
from diptych.models.precision import autocast
from diptych.training import distributed
from diptych.training.step import to_device
from diptych.types import Batch, Encoded, TowerOutput, tensors_of
from diptych.verbs import AbstractObjective

FORMAT = 1
"""Of the stores; a change of this file that changes their rows must raise it."""

Say = Callable[[str], None]
Precision = Literal["fp32", "bf16"]
Need = Literal["pooled", "tokens"]
"""What an objective reads of a tower's output."""

_TRIED, _AT_ONCE, _SHARD_BYTES = 8, 64, 128 << 20
_PACKAGES = ("diptych", "torch", "timm", "transformers", "tokenizers", "pillow", "numpy")


@dataclass(frozen=True)
class Rows:
    """Some rows on their way to a store.

    Attributes:
        numbers: Which items they are.
        columns: One row per item.
        ragged: One tensor per item.
        constants: Of the whole store.
    """

    numbers: list[int]
    columns: Mapping[str, Tensor]
    ragged: Mapping[str, list[Tensor]] = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)


class _NoRoomError(Exception):
    """A store would become larger than it may, or than the disk."""


def use_cache(
    objective: AbstractObjective[Encoded], loader: Loader, precision: Precision, *, draws: int, say: Say
) -> None:
    """Let a loader look up what need not be computed again, and say with how many processes it computes the rest; see `look_up`."""
    loader.maker.cached = look_up(objective, loader, precision, draws=draws, say=say)
    say(choose_workers(loader.maker)[1])


def look_up(
    objective: AbstractObjective[Encoded], loader: Loader, precision: Precision, *, draws: int, say: Say
) -> Cached:
    """Return what frozen towers make of a loader's views and texts, wherever looking it up changes nothing; encode what is missing.

    Args:
        objective: Its model's towers are asked.
        loader: Not yet iterated over.
        precision: That the towers compute in while training.
        draws: Samples that the run will show, repeats counted: nothing is encoded that costs more than it saves.
        say: Told what is kept, how large it is and where, and what is not kept and why.
    """
    maker, model = loader.maker, objective.model
    config = maker.config
    nothing = maker.cached = Cached((None,) * len(config.views), (None,) * len(config.texts))
    frozen_image, frozen_text = is_frozen(model.vision), is_frozen(model.text)
    if config.cache.mode == "off" or not (frozen_image or frozen_text or config.cache.pixels):
        return nothing
    build = _Builder(model, maker, precision, draws, say)
    try:
        batch = to_device(maker.some(next(loader.requests()).indices[:_TRIED]), model.device)
    except DataError:
        say("Nothing is cached: none of the first samples can be used.")
        return nothing
    trial = _Trial(objective, batch, precision)
    views = tuple(
        build.view(place, _need(trial.view(place)) if frozen_image else None) for place in range(len(config.views))
    )
    texts = tuple(
        build.texts(place, _need(trial.texts(place))) if frozen_text else None for place in range(len(config.texts))
    )
    images = build.images() if config.cache.pixels and not all(views) else None
    return Cached(views, texts, images)


def with_outputs(objective: AbstractObjective[Encoded], batch: Batch, precision: Precision) -> Batch:
    """Return a batch with what frozen towers make of it in place of its views and texts, wherever that changes nothing.

    For many steps on one batch, when nothing is kept for others.
    """
    trial, model = _Trial(objective, batch, precision), objective.model
    images, texts = list(batch.images), list(batch.texts)
    if is_frozen(model.vision):
        images = [view if (output := trial.view(place)) is None else output for place, view in enumerate(images)]
    if is_frozen(model.text):
        texts = [replace(tokens, output=trial.texts(place)) for place, tokens in enumerate(texts)]
    return replace(batch, images=tuple(images), texts=tuple(texts))


class _Trial:
    """Finds out on one batch what an objective reads of the output of a tower."""

    def __init__(self, objective: AbstractObjective[Encoded], batch: Batch, precision: Precision) -> None:
        self._device = objective.model.device
        self._autocast = autocast(precision, self._device)
        # Buffers are copies, since `encode` may move them; parameters are shared, since nothing here does.
        self._objective = copy.deepcopy(objective, memo={id(p): p for p in objective.parameters()})
        train_mode(self._objective)
        self._batch = batch
        self._expected = self._encode(self._batch)

    def view(self, place: int) -> TowerOutput | None:
        """Return what is read of the output for a view; None if the objective wants pixels, or does not want the view."""
        return self._read(
            lambda: self._objective.model.image_output(self._batch.images[place]),
            lambda output: replace(self._batch, images=_put(self._batch.images, place, output)),
        )

    def texts(self, place: int) -> TowerOutput | None:
        """Return what is read of the output for a text column; None if the objective wants the ids, or does not want the column."""
        tokens = self._batch.texts[place]
        return self._read(
            lambda: self._objective.model.text_output(tokens),
            lambda output: replace(self._batch, texts=_put(self._batch.texts, place, replace(tokens, output=output))),
        )

    def _read(self, ask: Callable[[], TowerOutput], put: Callable[[TowerOutput], Batch]) -> TowerOutput | None:
        with torch.no_grad(), self._autocast:
            full = ask()
        nonsense = replace(
            full, pooled=full.pooled * torch.nan, tokens=None if full.tokens is None else full.tokens * torch.nan
        )
        if self._same(put(nonsense)):
            return None  # it goes to the tower by another way, and would not take what is kept
        pooled, tokens = TowerOutput(full.pooled), replace(full, layers=(), attention=())
        if self._same(put(pooled)):
            return pooled
        return tokens if full.tokens is not None and self._same(put(tokens)) else None

    def _same(self, batch: Batch) -> bool:
        try:
            found = self._encode(batch)
        except Exception:  # whatever comes of looking at what is not there: pixels, tokens, layers
            return False
        return len(found) == len(self._expected) and all(map(torch.equal, found, self._expected))

    def _encode(self, batch: Batch) -> list[Tensor]:
        """Return what the objective encodes; equal batches give equal tensors."""
        before = [buffer.clone() for buffer in self._objective.buffers()]
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), self._autocast:
            torch.manual_seed(0)
            found = tensors_of(self._objective.encode(batch))
        for buffer, value in zip(self._objective.buffers(), before, strict=True):
            buffer.copy_(value)
        return found


class _Builder:
    """Makes the stores of one run."""

    def __init__(self, model: DualEncoder, maker: BatchMaker, precision: Precision, draws: int, say: Say) -> None:
        self._model, self._maker, self._precision, self._draws, self._say = model, maker, precision, draws, say
        self._cache = maker.config.cache
        self._hashes: list[int | None] = []
        self._problems: dict[int, str] = {}

    def view(self, place: int, need: Need | None) -> CachedView | None:
        """Return one view of all samples, or None if it is not kept."""
        change = self._maker.config.views[place]
        title = f"View {place + 1} of the images"
        if need is None and not self._cache.pixels:
            if is_frozen(self._model.vision):
                self._say(f"{title} is not cached: the method does not take it through the frozen tower alone.")
            return None
        if change.random and (need is None or self._cache.mode != "approximate"):
            self._say(
                f"{title} is not cached: it is random, so it differs in every epoch. To keep a few versions of it, an "
                "approximation, set data.cache.mode to approximate; without augmentation the cache is exact."
            )
            return None
        versions = self._cache.versions if change.random else 1
        self._read()
        # Random numbers of a view follow those of the views before it, and the seed and place of its sample.
        where = [self._maker.seed, *self._maker.config.views[:place]] if change.random else []
        # The loader's policy makes the pixels, the model's normalises them.
        parts = [
            self._maker.image_policy,
            self._model.image_policy,
            change,
            self._maker.config.decode if change.random else "exact",
            *where,
        ]
        key = (
            _key(parts) if need is None else self._tower_key(self._model.vision, self._model.config.vision, need, parts)
        )
        hashed = [(index, number) for index, number in enumerate(self._hashes) if number is not None]
        items = [(index, epoch) for epoch in range(versions) for index, _ in hashed]
        keys = torch.tensor(
            [
                hash_bytes(f"{number} {index} {epoch}".encode()) if change.random else number
                for epoch in range(versions)
                for index, number in hashed
            ],
            dtype=torch.int64,
        )
        store = self._fill(title, key, keys, lambda numbers: self._images(items, numbers, place, need))
        if store is None:
            return None
        rows = torch.full((versions, len(self._hashes)), -1)
        for (index, epoch), row in zip(items, store.find(keys).tolist(), strict=True):
            rows[epoch, index] = row
        return CachedView(store, rows, dict(self._problems))

    def images(self) -> CachedImages | None:
        """Return all images decoded, or None if they are not kept."""
        self._read()
        config, policy = self._maker.config, self._maker.image_policy
        # Scaled decoding depends on how large the views are.
        parts = [config.decode, *([policy, config.views] if config.decode == "scaled" else [policy.background])]
        hashed = [(index, number) for index, number in enumerate(self._hashes) if number is not None]
        keys = torch.tensor([number for _, number in hashed], dtype=torch.int64)
        items = [(index, 0) for index, _ in hashed]
        store = self._fill("The decoding of images", _key(parts), keys, lambda numbers: self._decoded(items, numbers))
        if store is None:
            return None
        rows = torch.full((len(self._hashes),), -1)
        rows[[index for index, _ in hashed]] = store.find(keys)
        return CachedImages(store, rows, dict(self._problems))

    def texts(self, place: int, need: Need | None) -> CachedTexts | None:
        """Return all texts of one column, or None if they are not kept."""
        column = self._maker.config.texts[place]
        title = f"Text column {place + 1}"
        if need is None:
            self._say(f"{title} is not cached: the method does not take it through the frozen tower alone.")
            return None
        if column.change != TextChange():
            self._say(f"{title} is not cached: its texts are changed at random, so they differ in every epoch.")
            return None
        texts = self._texts_of(column)
        keys = self._maker.tokenizer.keys(texts)
        parts = [self._maker.tokenizer.policy, self._maker.tokenizer.to_json()]
        key = self._tower_key(self._model.text, self._model.config.text, need, parts)
        store = self._fill(title, key, keys, lambda numbers: self._encoded(texts, numbers, need))
        return None if store is None else CachedTexts(store)

    def _fill(
        self, title: str, key: str, keys: Tensor, make: Callable[[list[int]], Iterable[Rows]]
    ) -> TensorStore | None:
        """Return a store that holds all keys that can be made; None, and say why, if it costs more than it saves or does not fit."""
        folder, began = files.feature_folder() / key, time.perf_counter()
        distributed.wait()
        store = TensorStore(folder)
        (rank, world), missing, before, problem = distributed.part(), _missing(store, keys), len(store), None
        if len(missing) >= self._draws * world:
            problem = f"{len(missing):,} outputs would be computed to save {self._draws * world:,}."
        # Each process does its share. What is then still missing, where processes share no disk, it does itself.
        for share in (missing[rank::world], None):
            try:
                if problem is None:
                    self._write(store, keys, make, _missing(store, keys) if share is None else share, len(missing))
            except (_NoRoomError, OSError) as error:
                problem = str(error)
            distributed.wait()
            store = TensorStore(folder)
        if problem is not None or len(store) == 0:
            self._say(f"{title} is not cached: {problem or 'nothing of it can be used.'}")
            return None
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        new = f"{len(store) - before:,} of them now, in {time.perf_counter() - began:.1f} s"
        what = " and ".join(name for name in ("pixels", "pooled", "tokens") if name in store.columns)
        self._say(f"{title} is computed once: {what} of {len(keys):,} ({new}), {size / 1e6:,.1f} MB in {folder}.")
        return store

    def _write(
        self,
        store: TensorStore,
        keys: Tensor,
        make: Callable[[list[int]], Iterable[Rows]],
        numbers: list[int],
        total: int,
    ) -> None:
        waiting: list[Rows] = []
        size = 0
        for rows in make(numbers):
            if not rows.numbers:
                continue
            own = sum(
                tensor.nbytes for tensor in (*rows.columns.values(), *(t for ts in rows.ragged.values() for t in ts))
            )
            if not waiting and size == 0:
                self._check_room(store, round(own / len(rows.numbers) * total))
            waiting.append(rows)
            size += own
            if size >= _SHARD_BYTES:
                _add(store, keys, waiting)
                waiting, size = [], 0
        if waiting:
            _add(store, keys, waiting)

    def _check_room(self, store: TensorStore, needed: int) -> None:
        store.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(store.folder).free
        if needed > self._cache.gigabytes * 1e9:
            raise _NoRoomError(
                f"it would take {needed / 1e9:.1f} GB and data.cache.gigabytes is {self._cache.gigabytes:g}."
            )
        if needed > 0.9 * free:
            raise _NoRoomError(f"it would take {needed / 1e9:.1f} GB, and {store.folder} has {free / 1e9:.1f} GB left.")

    def _read(self) -> None:
        """Hash every image of the source, once per run: another image is another row."""
        if self._hashes:
            return
        for index in range(len(self._maker.source)):
            try:
                image = self._maker.source[index].image
                if image is None:
                    raise ImageError(f"{self._maker.source.without_image(index).key!r} has no image.")
                self._hashes.append(hash_bytes(image))
            except ImageError as error:
                self._hashes.append(None)
                self._problems[index] = str(error)

    def _texts_of(self, column: TextColumn) -> list[str]:
        """Return the distinct texts that a column may hold, short ones first so that little is padded."""
        source, clean = self._maker.source, self._maker.tokenizer.clean
        found = {
            clean(text.text): text.text
            for index in range(len(source))
            for text in source.texts(index)
            if text.role in column.roles
        }
        return sorted((text for cleaned, text in found.items() if cleaned), key=lambda text: (len(text), text))

    def _images(
        self, items: list[tuple[int, int]], numbers: list[int], place: int, need: Need | None
    ) -> Iterator[Rows]:
        for kept, views, problems in self._read_by(_Reader(self._maker, items, place), numbers):
            self._problems |= problems
            if not kept:
                continue
            pixels = torch.stack(views)
            if need is None:
                yield Rows(kept, {"pixels": pixels})
                continue
            output = self._ask(lambda: self._model.image_output(pixels.to(self._model.device)))  # noqa: B023 - called at once
            if need == "pooled":
                yield Rows(kept, {"pooled": output.pooled})
            else:
                assert output.tokens is not None and output.grid is not None
                yield Rows(
                    kept,
                    {"pooled": output.pooled, "tokens": output.tokens},
                    constants={"grid": torch.tensor(output.grid)},
                )

    def _decoded(self, items: list[tuple[int, int]], numbers: list[int]) -> Iterator[Rows]:
        for kept, images, problems in self._read_by(_Reader(self._maker, items, None), numbers):
            self._problems |= problems
            if kept:
                sizes = torch.tensor([image.shape[:2] for image in images])
                yield Rows(kept, {"size": sizes}, {"pixels": [image.flatten(0, 1) for image in images]})

    def _read_by(
        self, reader: "_Reader", numbers: list[int]
    ) -> Iterable[tuple[list[int], list[Tensor], dict[int, str]]]:
        chunks = [numbers[start : start + _AT_ONCE] for start in range(0, len(numbers), _AT_ONCE)]
        return DataLoader(
            reader,
            batch_size=None,
            sampler=chunks,
            num_workers=choose_workers(self._maker)[0] if numbers else 0,
            generator=torch.Generator(),
        )

    def _encoded(self, texts: list[str], numbers: list[int], need: Need) -> Iterator[Rows]:
        for start in range(0, len(numbers), 4 * _AT_ONCE):
            kept = numbers[start : start + 4 * _AT_ONCE]
            tokens = self._maker.tokenizer([texts[number] for number in kept])
            ids, mask = tokens.ids.to(self._model.device), tokens.mask.to(self._model.device)
            output = self._ask(lambda: self._model.text(ids, mask))  # noqa: B023 - called at once
            if need == "pooled":
                yield Rows(kept, {"pooled": output.pooled})
            else:
                assert output.tokens is not None
                states = [row[real] for row, real in zip(output.tokens, tokens.mask, strict=True)]
                yield Rows(kept, {"pooled": output.pooled}, {"tokens": states})

    def _ask(self, tower: Callable[[], TowerOutput]) -> TowerOutput:
        with torch.no_grad(), self._autocast():
            output = tower()
        return replace(
            output,
            pooled=output.pooled.cpu(),
            tokens=None if output.tokens is None else output.tokens.cpu(),
            layers=(),
            attention=(),
        )

    def _autocast(self) -> AbstractContextManager[None]:
        return autocast(self._precision, self._model.device)

    def _tower_key(self, tower: nn.Module, config: object, need: Need, parts: Sequence[object]) -> str:
        """Return the name of a store: the hash of all that its rows depend on but the images or texts themselves."""
        settings = getattr(getattr(tower, "model", None), "config", None)  # of transformers, which ours does not repeat
        digest = hashlib.blake2b(digest_size=16)
        for name, value in sorted(tower.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        kernels = f"{self._precision} {self._model.device.type} {torch.get_float32_matmul_precision()}"
        return _key([digest.hexdigest(), config, str(tower), str(settings), kernels, need, *parts])


class _Reader(Dataset[tuple[list[int], list[Tensor], dict[int, str]]]):
    """Reads one view of some items, or the whole images, in any process; those that cannot be used come back as problems."""

    def __init__(self, maker: BatchMaker, items: list[tuple[int, int]], place: int | None) -> None:
        self._maker, self._items, self._place = maker, items, place

    def __getitem__(self, numbers: list[int]) -> tuple[list[int], list[Tensor], dict[int, str]]:
        kept, found, problems = [], [], {}
        for number in numbers:
            index, epoch = self._items[number]
            try:
                place = self._place
                found.append(self._maker.pixels(index) if place is None else self._maker.view(index, epoch, place))
                kept.append(number)
            except ImageError as error:
                problems[index] = str(error)
        return kept, found, problems


def _need(read: TowerOutput | None) -> Need | None:
    """Return what of a tower's output must be kept, given all that is read of it."""
    return None if read is None else "pooled" if read.tokens is None else "tokens"


def _missing(store: TensorStore, keys: Tensor) -> list[int]:
    """Return the number of the first item of every key that is not in a store."""
    first = {key: number for number, key in reversed(list(enumerate(keys.tolist())))}
    rows = store.find(keys).tolist()
    return [number for number in sorted(first.values()) if rows[number] < 0]


def _add(store: TensorStore, keys: Tensor, parts: list[Rows]) -> None:
    store.add(
        keys[[number for rows in parts for number in rows.numbers]],
        {name: torch.cat([rows.columns[name] for rows in parts]) for name in parts[0].columns},
        ragged={name: [row for rows in parts for row in rows.ragged[name]] for name in parts[0].ragged},
        constants=parts[0].constants,
    )


def _key(parts: Sequence[object]) -> str:
    return fingerprint([FORMAT, [f"{name} {_version(name)}" for name in _PACKAGES], *parts])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _put(values: tuple[object, ...], place: int, value: object) -> tuple:  # type: ignore[type-arg]
    return (*values[:place], value, *values[place + 1 :])
