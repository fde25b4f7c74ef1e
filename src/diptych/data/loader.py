"""Batches in an order that is ours: state = (seed, epoch, cursor), the same batches with any number of workers.

Every random choice about a sample comes from a generator seeded with (seed, epoch, index), so nothing depends on which
process reads it or on what was read before; resuming is starting at another cursor.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diptych.data.features import Cached
from diptych.data.images import decode
from diptych.data.order import check_batch, per_group
from diptych.data.sources import AbstractSource
from diptych.data.text_changes import TextChange, change_text
from diptych.data.texts import choose_text
from diptych.data.tokenizer import Tokenizer, hash_strings
from diptych.data.transforms import Augment, ImagePolicy, augment, pass_over, reduction
from diptych.errors import ConfigError, DataError, ImageError, TextError
from diptych.types import Batch, Role, Sample, Text, Tokens

FEW, MOST_WORKERS = 2_000, 8
"""Workers are started for no fewer samples than this, and never more of them, unless asked for."""

REMEMBERED_TEXTS = 200_000
"""Per process; some 100 MB of ids."""


_BITS = 32
"""Chances count in units of 2**-32."""


@dataclass(frozen=True)
class TextColumn:
    """Which of a sample's texts goes into one text column of the batch, drawn anew every epoch.

    Attributes:
        roles: Roles to draw from: first a role, by weight among those the sample has, then one of its texts, uniformly.
        weights: One weight per role, > 0; None for equal weights.
        by: `language` draws a language first instead of a role, uniformly among those that the texts in these roles have; `text` makes
            every text in these roles equally likely. Neither takes weights.
        min_words: A text with fewer words gives way to the first text of the first role that the sample has.
        change: Random changes of the text that was drawn.
    """

    roles: tuple[Role, ...] = ("caption", "rewrite", "synthetic", "label")
    weights: tuple[float, ...] | None = None
    by: Literal["role", "language", "text"] = "role"
    min_words: int = 1
    change: TextChange = TextChange()

    def __post_init__(self) -> None:
        if self.by != "role" and self.weights is not None:
            raise ConfigError(
                f"Weights are for roles; a text column drawn by {self.by} takes none. Set weights to None."
            )
        if self.weights is not None and (len(self.weights) != len(self.roles) or min(self.weights, default=0) <= 0):
            raise ConfigError(
                f"A text column takes one weight above 0 for each of its roles, {', '.join(self.roles)}; the weights are {self.weights}."
            )

    def draw(self, sample: Sample, rng: np.random.Generator) -> str:
        """Return one text.

        Raises:
            TextError: If the sample has no text in any of the roles.
            ConfigError: If the text's language has no list of words that `change` needs.
        """
        usable = [text for text in sample.texts if text.role in self.roles]
        kinds = self.roles if self.by == "role" else list(dict.fromkeys(map(self._kind, usable)))
        found = [[text for text in usable if self._kind(text) == kind] for kind in kinds]
        weights = np.array(self.weights or [1.0] * len(kinds)) * [bool(texts) for texts in found]
        if not weights.any():
            present = sorted({text.role for text in sample.texts})
            raise TextError(
                f"Sample {sample.key!r} has no text with a role in {', '.join(self.roles)}; its roles: "
                f"{', '.join(present) or 'none'}. Drop the row, or name other roles in data.texts."
            )
        texts = found[rng.choice(len(kinds), p=weights / weights.sum())]
        original = min(usable, key=lambda text: self.roles.index(text.role))
        drawn = choose_text([original, texts[rng.integers(len(texts))]], 1, min_words=self.min_words)
        return change_text(drawn.text, self.change, rng, language=drawn.language)

    def _kind(self, text: Text) -> str | None:
        """Return what is drawn first: one of these; then comes one of its texts."""
        return {"role": text.role, "language": text.language, "text": None}[self.by]


@dataclass(frozen=True)
class CacheConfig:
    """What is computed once and kept on the disk (in `DIPTYCH_CACHE`, or ~/.cache/diptych) instead of once per epoch.

    Attributes:
        mode: `exact` keeps what cannot change a result: what frozen towers make of texts and of views that are not random.
            `approximate` keeps `versions` random versions of each random view too: epoch e sees those of epoch e mod `versions`,
            which changes nothing as long as there are no more epochs. `off` keeps nothing.
        versions: Of random views, in mode `approximate`.
        pixels: Keep the pixels of views that no frozen tower was asked about, which then are not decoded: the views themselves if they are not
            random, else the whole images that they are cropped from, three bytes a pixel; exact.
        gigabytes: More than this is not written; what would not fit is computed every epoch.
    """

    mode: Literal["exact", "approximate", "off"] = "exact"
    versions: int = 8
    pixels: bool = False
    gigabytes: float = 20.0

    def __post_init__(self) -> None:
        if self.versions < 1:
            raise ConfigError(f"A cache of random views needs at least one version of each, not {self.versions}.")

    @property
    def limit(self) -> float:
        """Return the gigabytes that may be written; none when the cache is off."""
        return 0.0 if self.mode == "off" else self.gigabytes


@dataclass(frozen=True)
class LoaderConfig:
    """How samples become batches.

    Attributes:
        batch_size: Samples per batch; an incomplete last batch is left out, unless it is the only one. A multiple of what stands together.
        workers: Processes that decode, one thread each; 0 decodes in the training process, None chooses. Changes nothing but speed.
        texts: One entry per text column.
        views: One entry per image view; view 0 is the main one.
        per_group: Samples of one group that stand together in a batch, for losses that need positives; 1 for a plain shuffle.
        bad_samples: `skip` leaves unreadable samples out of their batch and counts them, `strict` stops.
        decode: `scaled` decodes large JPEG files near the size of the view, where all views are random crops; an approximation. Evaluation
            never does.
        cache: What is computed once instead of once per epoch.
    """

    batch_size: int = 128
    workers: int | None = None
    texts: tuple[TextColumn, ...] = (TextColumn(),)
    views: tuple[Augment, ...] = (Augment(),)
    per_group: int = 1
    bad_samples: Literal["skip", "strict"] = "skip"
    decode: Literal["exact", "scaled"] = "exact"
    cache: CacheConfig = CacheConfig()

    def __post_init__(self) -> None:
        if self.per_group < 1:
            raise ConfigError(f"data.per_group is 1, for a plain shuffle, or more; it is {self.per_group}.")


@dataclass(frozen=True)
class Position:
    """Where a loader stands.

    Attributes:
        epoch: Passes completed.
        cursor: Batches taken from the current pass.
    """

    epoch: int = 0
    cursor: int = 0


@dataclass(frozen=True)
class Request:
    """One batch to be made.

    Attributes:
        epoch: Seeds the random choices.
        indices: Which samples, in order.
        after: Where the loader stands once the batch is taken.
        again: Whether the batch was given before and is only repeated.
    """

    epoch: int
    indices: tuple[int, ...]
    after: Position
    again: bool = False


class Loader:
    """Endless batches from a source.

    Attributes:
        position: Where the loader stands: after the last batch taken, not after what workers have fetched ahead.
        given: How many samples the batches taken so far held; repeated batches are counted once.
        skipped: How many were left out of them.
        repeat: How many batches are given a second time before going on; None for none.
        maker: Makes the batches; its `cached` says what it need not compute.
    """

    def __init__(
        self,
        source: AbstractSource,
        image_policy: ImagePolicy,
        tokenizer: Tokenizer,
        config: LoaderConfig,
        *,
        seed: int = 0,
        position: Position | None = None,
        repeat: int | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """Make a loader.

        Args:
            source: Samples.
            image_policy: The model's.
            tokenizer: The model's.
            config: How samples become batches.
            seed: Of the order and of every random choice.
            position: Where to start.
            repeat: Give every so many batches a second time before going on, for cached steps; None for once only.
            part: Which of how many equal parts of each batch this loader makes: (1, 4) for the second of four processes.

        Raises:
            DataError: If there are fewer samples than parts, or fewer runs of samples that belong together.
            ConfigError: If batch size or workers are out of range, or batches would cut such runs.
        """
        if config.batch_size < 1 or (config.workers or 0) < 0:
            raise ConfigError(
                f"batch_size must be >= 1 and workers >= 0, not {config.batch_size} and {config.workers}."
            )
        if config.per_group > 1:
            source = per_group(source, config.per_group)
        check_batch(config.batch_size, source.run_length)
        shown = len(source) if source.chances is None else _parts_of_samples(source.chances).sum() >> _BITS
        if source.order is not None:
            shown = len(source.order(np.random.default_rng(seed)))
        runs = int(shown) // (part[1] * source.run_length)
        if not runs:
            held, each = f"{shown:,}" if shown else "no", source.run_length
            needed = f"{part[1] * each}, {'one' if each == 1 else f'a run of {each}'} per process"
            raise DataError(f"{source.name} has {held} samples per epoch; training needs at least {needed}.")
        self.seed = seed
        self.position = position or Position()
        self.given = self.skipped = 0
        self.batch_size = min(config.batch_size, runs * source.run_length)
        self.batches_per_epoch = int(shown) // (self.batch_size * part[1])
        self.repeat, self._part = repeat, part
        self._order = source.order or partial(draw_order, len(source), source.chances)
        self.maker = BatchMaker(source, image_policy, tokenizer, config, seed)

    def requests(self) -> Iterator[Request]:
        """Yield what to make, without end, from `position` on."""
        once = self._requests()
        if self.repeat is None:
            yield from once
        while group := list(islice(once, self.repeat)):
            yield from group
            yield from (replace(request, again=True) for request in group)

    def _requests(self) -> Iterator[Request]:
        epoch, cursor = self.position.epoch, self.position.cursor
        (part, parts), size = self._part, self.batch_size
        while True:
            order = self._order(np.random.default_rng([self.seed, epoch]))
            for batch in range(cursor, self.batches_per_epoch):
                last = batch + 1 == self.batches_per_epoch
                after = Position(epoch + 1, 0) if last else Position(epoch, batch + 1)
                start = (batch * parts + part) * size
                yield Request(epoch, tuple(order[start : start + size].tolist()), after)
            epoch, cursor = epoch + 1, 0

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end; `position` follows each one, so saving it after a step resumes exactly there."""
        # A DataLoader draws a seed when it starts. From the global generator, that would shift the model's dropout after a resume.
        loader: DataLoader[tuple[Request, Batch]] = DataLoader(
            self.maker,
            batch_size=None,
            sampler=self.requests(),
            num_workers=choose_workers(self.maker)[0],
            worker_init_fn=_one_thread,
            generator=torch.Generator(),
        )
        for request, batch in loader:
            self.position = request.after
            if not request.again:
                self.given += len(batch)
                self.skipped += len(batch.skipped)
            yield batch


def draw_order(
    count: int, chances: Float64[np.ndarray, " n"] | None, rng: np.random.Generator
) -> Int64[np.ndarray, " shown"]:
    """Return the samples of one epoch in random order: all of them, or each as often as its chance says.

    Chances are laid end to end, in an order of their own, under a comb whose teeth are 1 apart and begin at a random place; samples under a tooth
    are drawn. So each is drawn with exactly its chance (to 2**-32), once at most, and their number is the sum of chances, rounded up or down, in
    every epoch.

    Source: Madow 1949, "On the Theory of Systematic Sampling, II".
    """
    order = rng.permutation(count)
    if chances is None:
        return order
    line, drawn = rng.permutation(count), np.zeros(count, np.bool_)
    ends = _parts_of_samples(chances)[line].cumsum() + rng.integers(1 << _BITS)
    drawn[line] = np.diff(ends >> _BITS, prepend=0) > 0
    return order[drawn[order]]


def _parts_of_samples(chances: Float64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Return chances as whole numbers, so that sums are exact and 1 stays certain."""
    whole: Int64[np.ndarray, " n"] = np.rint(chances * (1 << _BITS)).astype(np.int64)
    return whole


def _one_thread(worker: int) -> None:
    """Keep a worker's tokenizer from starting threads, which wait forever after a fork; torch limits its own."""
    del worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def choose_workers(maker: "BatchMaker") -> tuple[int, str]:
    """Return how many processes make batches, and a sentence that says why."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if maker.config.workers is not None:
        return maker.config.workers, f"Workers: {maker.config.workers}, as asked."
    if all(maker.cached.views):
        return 0, "Workers: 0, nothing is decoded."
    if cores <= 2:
        return 0, f"Workers: 0, training itself keeps {cores} cores busy."
    if len(maker.source) < FEW:
        return 0, f"Workers: 0, there are fewer than {FEW:,} samples."
    count = min(cores // 2, MOST_WORKERS)
    return count, f"Workers: {count} of one thread each, half of {cores} cores, at most {MOST_WORKERS}."


class BatchMaker(Dataset[tuple[Request, Batch]]):
    """Makes one batch from one request, in any process: what it remembers saves time and changes nothing.

    Attributes:
        cached: Views and texts that are looked up instead of computed. Set before batches are asked for.
    """

    def __init__(
        self, source: AbstractSource, image_policy: ImagePolicy, tokenizer: Tokenizer, config: LoaderConfig, seed: int
    ) -> None:
        self.source, self.image_policy, self.tokenizer, self.config, self.seed = (
            source,
            image_policy,
            tokenizer,
            config,
            seed,
        )
        self.cached = Cached((None,) * len(config.views), (None,) * len(config.texts))
        self._tokenised: dict[str, tuple[list[int], int]] = {}

    def __getitem__(self, request: Request) -> tuple[Request, Batch]:
        made: dict[int, tuple[Sample, list[Any], list[str]]] = {}
        skipped: dict[int, str] = {}
        for index in sorted(request.indices):  # neighbours in a file are read together
            rng = np.random.default_rng([self.seed, request.epoch, index])
            try:
                looked_up = all(self.cached.views) or self.cached.images is not None
                sample = self.source.without_image(index) if looked_up else self.source[index]
                made[index] = sample, self._views(sample, index, request.epoch, rng), self._texts(sample, rng)
            except (ImageError, TextError) as error:
                if self.config.bad_samples == "strict":
                    raise type(error)(f"Sample {index} of {self.source.name}: {error}") from error
                skipped[index] = f"{index}: {error}"
        if not made:
            first = skipped[request.indices[0]]
            raise DataError(f"None of the {len(request.indices)} samples of a batch could be used. First: {first}")
        samples, views, texts = zip(*(made[index] for index in request.indices if index in made), strict=True)
        batch = Batch(
            keys=tuple(sample.key for sample in samples),
            images=tuple(
                torch.stack(view) if cached is None else cached.take(view)
                for view, cached in zip(zip(*views, strict=True), self.cached.views, strict=True)
            ),
            texts=tuple(
                self._tokens(column) if cached is None else cached.fill(self._tokens(column))
                for column, cached in zip(zip(*texts, strict=True), self.cached.texts, strict=True)
            ),
            group=hash_strings(sample.group for sample in samples),
            skipped=tuple(skipped[index] for index in request.indices if index in skipped),
        )
        return request, batch

    def some(self, indices: Sequence[int]) -> Batch:
        """Return a batch of a few samples as the first epoch shows them, for a look ahead."""
        return self[Request(0, tuple(indices), Position())][1]

    def pixels(self, index: int) -> UInt8[Tensor, "h w 3"]:
        """Return one image, whole, as its views are made from."""
        return torch.from_numpy(np.array(self._decode(self.source[index])))

    def view(self, index: int, epoch: int, place: int) -> Tensor:
        """Return one view of one sample, as the batches of an epoch show it."""
        rng = np.random.default_rng([self.seed, epoch, index])
        image = self._decode(self.source[index])
        for view in self.config.views[:place]:
            pass_over(view, rng)
        return augment(image, self.image_policy, self.config.views[place], rng)

    def _views(self, sample: Sample, index: int, epoch: int, rng: np.random.Generator) -> list[Any]:
        """Return pixels of each view; of a view that is looked up, its place in the store."""
        image = None if all(self.cached.views) else self._image(sample, index)
        found: list[Any] = []
        for view, cached in zip(self.config.views, self.cached.views, strict=True):
            if cached is None:
                assert image is not None
                found.append(augment(image, self.image_policy, view, rng))
            else:
                pass_over(view, rng)  # so that texts, drawn next, are those of a run without a cache
                found.append(cached.row(epoch, index))
        return found

    def _image(self, sample: Sample, index: int) -> Image.Image:
        if self.cached.images is not None:
            return decode(self.cached.images.pixels(index))
        return self._decode(sample)

    def _decode(self, sample: Sample) -> Image.Image:
        if sample.image is None:
            raise ImageError(f"{sample.key!r} has no image.")
        near = partial(reduction, policy=self.image_policy, changes=self.config.views)
        scaled = self.config.decode == "scaled"
        return decode(sample.image, background=self.image_policy.background, reduce=near if scaled else None)

    def _tokens(self, texts: Sequence[str]) -> Tokens:
        """Return the tokens of a column; each distinct text is tokenised once."""
        if new := [text for text in dict.fromkeys(texts) if text not in self._tokenised]:
            if len(self._tokenised) + len(new) > REMEMBERED_TEXTS:
                self._tokenised.clear()
                new = list(dict.fromkeys(texts))
            sequences, keys = self.tokenizer.sequences(new), self.tokenizer.keys(new).tolist()
            self._tokenised.update(zip(new, zip(sequences, keys, strict=True), strict=True))
        known = [self._tokenised[text] for text in texts]
        return self.tokenizer.pad([ids for ids, _ in known], torch.tensor([key for _, key in known]))

    def _texts(self, sample: Sample, rng: np.random.Generator) -> list[str]:
        drawn = [column.draw(sample, rng) for column in self.config.texts]
        for text in drawn:
            if not self.tokenizer.clean(text):
                raise TextError(f"Sample {sample.key!r} has an empty text ({text!r}). Give it a word, or drop the row.")
        return drawn
