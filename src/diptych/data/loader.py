"""Batches in an order that is ours: state = (seed, epoch, cursor), the same batches with any number of workers.

Every random choice about a sample comes from a generator seeded with (seed, epoch, index), so nothing depends on which
process reads it or on what was read before; resuming is starting at another cursor.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diptych.data.images import decode
from diptych.data.sources import AbstractSource
from diptych.data.text_changes import TextChange, change_text
from diptych.data.texts import choose_text
from diptych.data.tokenizer import Tokenizer, hash_strings
from diptych.data.transforms import Augment, ImagePolicy, augment
from diptych.errors import ConfigError, DataError, ImageError, TextError
from diptych.types import Batch, Role, Sample, Text


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
class LoaderConfig:
    """How samples become batches.

    Attributes:
        batch_size: Samples per batch; an incomplete last batch is left out, unless it is the only one.
        workers: Processes that decode; 0 decodes in the training process. Changes nothing but speed.
        texts: One entry per text column.
        views: One entry per image view; view 0 is the main one.
        bad_samples: `skip` leaves unreadable samples out of their batch and counts them, `strict` stops.
    """

    batch_size: int = 128
    workers: int = 0
    texts: tuple[TextColumn, ...] = (TextColumn(),)
    views: tuple[Augment, ...] = (Augment(),)
    bad_samples: Literal["skip", "strict"] = "skip"


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
            DataError: If there are fewer samples than parts.
            ConfigError: If batch size or workers are out of range.
        """
        if len(source) < part[1]:
            held = f"{len(source):,}" if len(source) else "no"
            raise DataError(f"{source.name} has {held} samples; training needs at least {part[1]}, one per process.")
        if config.batch_size < 1 or config.workers < 0:
            raise ConfigError(
                f"batch_size must be >= 1 and workers >= 0, not {config.batch_size} and {config.workers}."
            )
        self.seed = seed
        self.position = position or Position()
        self.given = self.skipped = 0
        self.batch_size = min(config.batch_size, len(source) // part[1])
        self.batches_per_epoch = len(source) // (self.batch_size * part[1])
        self.repeat, self._part = repeat, part
        self._samples = len(source)
        self._workers = config.workers
        self._maker = BatchMaker(source, image_policy, tokenizer, config, seed)

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
            order = np.random.default_rng([self.seed, epoch]).permutation(self._samples).tolist()
            for batch in range(cursor, self.batches_per_epoch):
                last = batch + 1 == self.batches_per_epoch
                after = Position(epoch + 1, 0) if last else Position(epoch, batch + 1)
                start = (batch * parts + part) * size
                yield Request(epoch, tuple(order[start : start + size]), after)
            epoch, cursor = epoch + 1, 0

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end; `position` follows each one, so saving it after a step resumes exactly there."""
        # A DataLoader draws a seed when it starts. From the global generator, that would shift the model's dropout after a resume.
        loader: DataLoader[tuple[Request, Batch]] = DataLoader(
            self._maker,
            batch_size=None,
            sampler=self.requests(),
            num_workers=self._workers,
            generator=torch.Generator(),
        )
        for request, batch in loader:
            self.position = request.after
            if not request.again:
                self.given += len(batch)
                self.skipped += len(batch.skipped)
            yield batch


class BatchMaker(Dataset[tuple[Request, Batch]]):
    """Makes one batch from one request; all of its state is read-only, so it can live in any process."""

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

    def __getitem__(self, request: Request) -> tuple[Request, Batch]:
        samples, views, texts, skipped = [], [], [], []
        for index in request.indices:
            rng = np.random.default_rng([self.seed, request.epoch, index])
            try:
                sample = self.source[index]
                views.append(self._views(sample, rng))
                texts.append(self._texts(sample, rng))
                samples.append(sample)
            except (ImageError, TextError) as error:
                if self.config.bad_samples == "strict":
                    raise type(error)(f"Sample {index} of {self.source.name}: {error}") from error
                del views[len(samples) :]
                skipped.append(f"{index}: {error}")
        if not samples:
            raise DataError(f"None of the {len(request.indices)} samples of a batch could be used. First: {skipped[0]}")
        batch = Batch(
            keys=tuple(sample.key for sample in samples),
            images=tuple(torch.stack(view) for view in zip(*views, strict=True)),
            texts=tuple(self.tokenizer(column) for column in zip(*texts, strict=True)),
            group=hash_strings(sample.group for sample in samples),
            skipped=tuple(skipped),
        )
        return request, batch

    def _views(self, sample: Sample, rng: np.random.Generator) -> list[Tensor]:
        if sample.image is None:
            raise ImageError(f"{sample.key!r} has no image.")
        image = decode(sample.image, background=self.image_policy.background)
        return [augment(image, self.image_policy, view, rng) for view in self.config.views]

    def _texts(self, sample: Sample, rng: np.random.Generator) -> list[str]:
        drawn = [column.draw(sample, rng) for column in self.config.texts]
        for text in drawn:
            if not self.tokenizer.clean(text):
                raise TextError(f"Sample {sample.key!r} has an empty text ({text!r}). Give it a word, or drop the row.")
        return drawn
