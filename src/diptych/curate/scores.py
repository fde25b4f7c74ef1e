"""How well image and caption fit in the eyes of a model, and only the pairs that fit well.

score = cosine of the embeddings of image and caption, in [-1, 1]. Where a model puts pairs that do not fit is its own affair, so a threshold holds
for one model only.

Source: Schuhmann et al. 2021, "LAION-400M" (threshold 0.3 with CLIP ViT-B/32); Gadre et al. 2023, "DataComp", section 4 (the best 30 %).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diptych.curate.normalise import NO_TEXT
from diptych.curate.pictures import embed_rows, images_of_rows, opened
from diptych.curate.reasons import kept
from diptych.curate.verdicts import Verdicts, in_drawn_order
from diptych.errors import ConfigError
from diptych.models.embedding import embed_texts
from diptych.verbs import AbstractSurveyor

LOW_SCORE = "caption does not fit the image"
"""The reason. The column `score` says how well it does, of all pairs that were looked at."""

_NOTHING = pa.table(
    {"key": pa.nulls(0, pa.string()), "reason": pa.nulls(0, pa.string()), "score": pa.nulls(0, pa.float32())}
)


@dataclass(frozen=True)
class ScoreConfig:
    """Which pairs fit well enough. One of fraction and threshold is given; the other is None.

    Attributes:
        on: Whether the step is taken.
        model: Any that `diptych.load` knows.
        fraction: Of the pairs that can be looked at, how many are kept, the best ones, in (0, 1].
        threshold: Least score that is kept.
    """

    on: bool = False
    model: str = "lite0-minilm"
    fraction: float | None = 0.3
    threshold: float | None = None

    def __post_init__(self) -> None:
        alone = (self.fraction is None) != (self.threshold is None)
        if not alone or (self.fraction is not None and not 0 < self.fraction <= 1):
            raise ConfigError(
                "Give either a fraction in (0, 1] or a threshold, and None for the other; they are "
                f"{self.fraction} and {self.threshold}."
            )


class ScoreFilter(AbstractSurveyor):
    """Drops pairs whose image and caption do not fit."""

    reads_images = True

    def __init__(self, config: ScoreConfig = ScoreConfig()) -> None:
        self.config = config

    def survey(self, table: pa.Table) -> pa.Table:
        """Return the key of each pair with its score, or why it has none."""
        chosen = kept(table)
        rows, which = images_of_rows(table, chosen)
        model = opened(self.config.model)
        vectors, faults = embed_rows(model, table, rows)
        pairs = table.select(["key", "caption"]).filter(pa.array(chosen))
        fault = pa.array(faults, pa.string()).take(pa.array(which))
        blank = pc.equal(pc.utf8_trim_whitespace(pairs["caption"].fill_null("")), "")
        fault = pc.if_else(pc.and_(pc.is_null(fault), blank), NO_TEXT, fault)
        good = pc.is_null(fault).to_numpy(zero_copy_only=False)
        place = np.cumsum([fault is None for fault in faults]) - 1
        texts = embed_texts(model, pairs["caption"].filter(pa.array(good)).to_pylist()).numpy()
        scores = np.full(len(good), np.nan, np.float32)
        if good.any():
            scores[good] = np.einsum("nd,nd->n", vectors[place[which[good]]], texts)
        return pa.table({"key": pairs["key"], "score": pa.array(scores, mask=~good), "fault": fault})

    def merge(self, surveys: Iterable[pa.Table]) -> pa.Table:
        """Return the pairs with their scores, and the reason of those that go. Of equal scores at the end of a fraction, keys decide by a hash."""
        pairs = in_drawn_order(surveys)
        if pairs.num_rows == 0:
            return _NOTHING
        scores = pairs["score"].to_numpy()  # nan where there is none
        if self.config.threshold is not None:
            low = scores < self.config.threshold
        else:
            low = ~np.isnan(scores)
            best = np.argsort(-scores, kind="stable")  # nan last
            low[best[: math.ceil(self.config.fraction * low.sum())]] = False
        reason = pc.if_else(pa.array(low), LOW_SCORE, pairs["fault"])
        return pa.table({"key": pairs["key"], "reason": reason, "score": pairs["score"]})

    def informed(self, merged: pa.Table) -> Verdicts:
        """Return the curator that drops those; it reads no images."""
        return Verdicts(merged)
