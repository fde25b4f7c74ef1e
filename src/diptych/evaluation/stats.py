"""Intervals. Items that belong together (captions of one image, repeats of one class) are resampled together."""

from collections.abc import Sequence

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
        The interval; of width 0 when all clusters score alike.

    Raises:
        EvaluationError: If there are no items, or a score is not finite.

    Source: Efron and Tibshirani 1993, chapter 13 (percentile), chapter 8.4 (clusters).
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0:
        raise EvaluationError("An interval needs at least one item; there are none.")
    if not np.isfinite(values).all():
        raise EvaluationError(f"{np.sum(~np.isfinite(values))} of {values.size} scores are not finite.")
    ids = np.arange(values.size) if cluster is None else np.unique(np.asarray(cluster), return_inverse=True)[1]
    sums, sizes = np.bincount(ids, values), np.bincount(ids).astype(np.float64)
    rng, count = np.random.default_rng(seed), sums.size
    means = []
    for start in range(0, RESAMPLES, step := max(1, _CHUNK // count)):
        drawn = rng.integers(count, size=(min(step, RESAMPLES - start), count))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    *,
    cluster: Sequence[int] | np.ndarray | None = None,
    seed: int = 0,
) -> Interval:
    """Return mean(second - first) over the same items with its 95 % interval; it excludes 0 when the two differ.

    Raises:
        EvaluationError: If the two have different numbers of items.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape:
        raise EvaluationError(f"A paired comparison needs the same items; there are {first.size} and {second.size}.")
    return bootstrap(second - first, cluster=cluster, seed=seed)
