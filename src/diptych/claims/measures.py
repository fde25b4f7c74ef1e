"""What several claims measure, on what, and how their controls are judged."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from statistics import fmean

from jaxtyping import Bool, Float
from torch import Tensor

from diptych.claims.claim import Part
from diptych.data.scenes import scenes
from diptych.data.sources import AbstractSource, Listed
from diptych.evaluation.run import measure_retrieval
from diptych.models.dual import DualEncoder
from diptych.models.embedding import embed_source


@lru_cache(maxsize=4)
def drawn_scenes(split: str, count: int) -> Listed:
    """Return composed scenes, drawn once per process, each with its full caption alone and without its mask."""
    source = scenes(split, count=count)
    return Listed([replace(sample, texts=sample.texts[:1], mask=None) for sample in source], source.name)


def mean_recall(model: DualEncoder, source: AbstractSource, *, k: int = 1) -> float:
    """Return recall at k, the mean of both directions, in [0, 1]."""
    found = measure_retrieval(embed_source(model, source))
    return (found.image_to_text.recall[k].value + found.text_to_image.recall[k].value) / 2


def auroc(scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> float:
    """Return how often a positive scores above a negative, ties counted half; in [0, 1], 0.5 at chance."""
    above = scores[positive][:, None] - scores[~positive]
    return float(((above > 0).double() + (above == 0).double() / 2).mean())


def gains_less_than_half(values: Mapping[Part, Sequence[float]]) -> bool:
    """Return whether the control gains less over the baseline than half of what the method does, by the means over seeds."""
    means = {part: fmean(numbers) for part, numbers in values.items()}
    return means["control"] - means["baseline"] < (means["method"] - means["baseline"]) / 2
