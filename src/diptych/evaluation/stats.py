"""Intervals. Items that belong together (captions of one image) are resampled together."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from diptych.errors import EvaluationError
from diptych.types import Interval

RESAMPLES = 2000
_CHUNK = 4_000_000  # bounds memory: resampled indices per chunk


def bootstrap(
    scores: Sequence[float] | Float[np.ndarray, " n"],
    *,
    cluster: Sequence[int] | np.ndarray | None = None,
    seed: int = 0,
) -> Interval:
    """Return the mean of per-item scores with its 95 % percentile bootstrap interval.

    Args:
        scores: One number per item, for example 1 for a hit and 0 for a miss.
        cluster: Items with one id are drawn together; each item by itself when absent.
        seed: Of the 2,000 resamples.

    Returns:
        The interval. Where all scores are 0 or all are 1, resampling shows no spread; there the other bound is the exact one of as many hits or
        misses as there are clusters: 5 of 5 are at least 0.478. Of width 0 where all clusters score alike at some other value.

    Raises:
        EvaluationError: If there are no items, a score is not finite, or there is not one cluster id per score.

    Source: Efron and Tibshirani 1993, chapter 13 (percentile), chapter 8.4 (clusters); Clopper and Pearson 1934 (0 and 1).
    """
    values = _finite(scores)
    found = _resampled(values, cluster, seed)
    return _at_the_edge(found, values, values.size if cluster is None else np.unique(np.asarray(cluster)).size)


def _resampled(values: Float[np.ndarray, " n"], cluster: Sequence[int] | np.ndarray | None, seed: int) -> Interval:
    ids = np.arange(values.size) if cluster is None else _ids(cluster, values)
    sums, sizes = np.bincount(ids, values), np.bincount(ids).astype(np.float64)
    rng, count = np.random.default_rng(seed), sums.size
    means = []
    for start in range(0, RESAMPLES, step := max(1, _CHUNK // count)):
        drawn = rng.integers(count, size=(min(step, RESAMPLES - start), count))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    return _percentiles(float(values.mean()), np.concatenate(means))


def bootstrap_strata(
    scores: Sequence[float] | Float[np.ndarray, " n"], stratum: Sequence[int] | np.ndarray, *, seed: int = 0
) -> Interval:
    """Return the mean over strata of their mean score, with its 95 % percentile bootstrap interval.

    Items are resampled within their stratum, so its size never changes: with classes as strata this is the interval of the mean
    accuracy per class. A stratum of one item adds nothing to the width. Where all scores are 0 or all are 1, the other bound is the exact one of
    as many items as the smallest stratum has, times the strata.

    Args:
        scores: One number per item.
        stratum: One id per item.
        seed: Of the 2,000 resamples.

    Raises:
        EvaluationError: If there are no items, a score is not finite, or there is not one stratum per score.

    Source: Davison and Hinkley 1997, section 3.2 (several samples).
    """
    values = _finite(scores)
    ids = _ids(stratum, values)
    parts = [values[ids == number] for number in range(ids.max() + 1)]
    rng, total = np.random.default_rng(seed), np.zeros(RESAMPLES)
    for part in parts:
        for start in range(0, RESAMPLES, step := max(1, _CHUNK // part.size)):
            rows = min(step, RESAMPLES - start)
            total[start : start + rows] += part[rng.integers(part.size, size=(rows, part.size))].mean(1)
    found = _percentiles(float(np.mean([part.mean() for part in parts])), total / len(parts))
    return _at_the_edge(found, values, len(parts) * min(part.size for part in parts))


def bootstrap_means(
    function: Callable[..., np.ndarray], *samples: Float[np.ndarray, "_n _columns"], seed: int = 0
) -> Interval:
    """Return a function of the means of independent samples, with its 95 % percentile bootstrap interval.

    Args:
        function: Takes the means of all columns, sample by sample, as arrays over resamples; returns one number for each.
        samples: One row per item, one column per number measured on it; items are drawn whole, within their sample.
        seed: Of the 2,000 resamples.

    Raises:
        EvaluationError: If a sample has no items, or a number is not finite.

    Source: Efron and Tibshirani 1993, chapter 8.3 (two samples) and 13.
    """
    rng, values, drawn = np.random.default_rng(seed), list[np.ndarray](), list[np.ndarray]()
    for sample in samples:
        _finite(sample.ravel())
        counts = rng.multinomial(len(sample), np.full(len(sample), 1 / len(sample)), size=RESAMPLES)
        values += list(sample.mean(0)[:, None])
        drawn += list((counts @ sample / len(sample)).T)
    return _percentiles(float(function(*values)[0]), function(*drawn))


def paired_difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    *,
    cluster: Sequence[int] | np.ndarray | None = None,
    seed: int = 0,
) -> Interval:
    """Return mean(second - first) over the same items with its 95 % interval; it excludes 0 when the two differ.

    Raises:
        EvaluationError: If the two have different numbers of items, or as `bootstrap` does.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape:
        raise EvaluationError(f"A paired comparison needs the same items; there are {first.size} and {second.size}.")
    return _resampled(_finite(second - first), cluster, seed)


def _at_the_edge(found: Interval, values: Float[np.ndarray, " n"], count: int) -> Interval:
    """Return the interval; with the exact bound of `count` hits or misses in a row where the scores show nothing else, and so no spread."""
    if values.min() != values.max() or values[0] not in (0, 1):
        return found
    bound = 0.025 ** (1 / count)
    return replace(found, low=bound) if values[0] else replace(found, high=1 - bound)


def _finite(scores: Sequence[float] | np.ndarray) -> Float[np.ndarray, " n"]:
    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0:
        raise EvaluationError("An interval needs at least one item; there are none.")
    if not np.isfinite(values).all():
        raise EvaluationError(f"{np.sum(~np.isfinite(values))} of {values.size} scores are not finite.")
    return values


def _ids(groups: Sequence[int] | np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the ids renumbered from 0 without gaps."""
    if len(groups) != values.size:
        raise EvaluationError(f"Each of the {values.size} scores needs one id; there are {len(groups)} ids.")
    return np.unique(np.asarray(groups), return_inverse=True)[1]


def _percentiles(value: float, means: np.ndarray) -> Interval:
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(value, float(low), float(high))
