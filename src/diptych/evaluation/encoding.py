"""How well features predict responses: ridge regression with nested cross-validation over blocks of time, and a paired bootstrap.

Nothing in here knows what the responses are: voltages of electrodes, voxels, ratings, or units of another network. Events stand in the order in
which they happened. Neighbours in time are alike, so blocks are held out whole, never events drawn at random.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from diptych.errors import EvaluationError

ALPHAS = tuple(10.0**power for power in range(-1, 6))
"""Penalties: 0.1 to 100,000."""

FEWEST = 3
"""Events from which a correlation means something."""


@dataclass(frozen=True)
class Fold:
    """Which events do what.

    Attributes:
        train: Fit the weights.
        validation: Choose the penalty.
        test: Give the score.
    """

    train: Int64[np.ndarray, " _train"]
    validation: Int64[np.ndarray, " _validation"]
    test: Int64[np.ndarray, " _test"]


def contiguous_folds(events: int, count: int = 5, *, gap: int = 0) -> tuple[Fold, ...]:
    """Return folds that hold out one block of time each: its first half for validation, its second for test.

    Args:
        events: How many there are.
        count: Folds, at least 2.
        gap: Events beside the block that take no part, so that what is alike across its border is not used.

    Raises:
        EvaluationError: If a half would have fewer than three events, or no events were left to train on.

    Source: Subramaniam et al. 2024 (arXiv 2406.14481), released code.
    """
    if count < 2 or events // count < 2 * FEWEST:
        raise EvaluationError(
            f"{count} folds need at least {2 * FEWEST * max(2, count)} events, {FEWEST} in each half block; there are {events}."
        )
    folds, everything = [], np.arange(events)
    for block in np.array_split(everything, count):
        train = everything[(everything < block[0] - gap) | (everything > block[-1] + gap)]
        folds.append(Fold(train, block[: len(block) // 2], block[len(block) // 2 :]))
    if min(len(fold.train) for fold in folds) < FEWEST:
        raise EvaluationError(
            f"A gap of {gap} leaves no events to train on, of {events} in {count} blocks. Make it smaller."
        )
    return tuple(folds)


def shuffled_folds(events: int, count: int = 5, *, seed: int = 0) -> tuple[Fold, ...]:
    """Return folds of events drawn at random. For events in time this leaks: neighbours of test events are trained on. A control."""
    order = np.random.default_rng(seed).permutation(events)
    return tuple(
        Fold(*(order[part] for part in (fold.train, fold.validation, fold.test)))
        for fold in contiguous_folds(events, count)
    )


@dataclass(frozen=True)
class Encoding:
    """How well each target is predicted: Pearson's r, the mean over folds.

    Attributes:
        validation: At the penalty that is best here, so a little too good.
        test: At that penalty.
        alpha: The penalty of each target.
        validation_by_alpha: At every penalty.
        test_by_alpha: At every penalty.
    """

    validation: Float64[np.ndarray, " t"]
    test: Float64[np.ndarray, " t"]
    alpha: Float64[np.ndarray, " t"]
    validation_by_alpha: Float64[np.ndarray, "a t"]
    test_by_alpha: Float64[np.ndarray, "a t"]


def encode(
    features: Float[np.ndarray, "n d"],
    targets: Float[np.ndarray, "m t"],
    folds: Sequence[Fold] | None = None,
    *,
    alphas: Sequence[float] = ALPHAS,
) -> Encoding:
    """Return how well each target is a linear function of the features, in events that the function was not fitted to.

    minimise |y - X w|^2 + alpha |w|^2 on the training events of a fold, X standardised and y centred by them. For each target, alpha has the
    highest mean r on validation events (the lowest of equals), and the mean r on test events counts. One decomposition of X serves all
    targets and penalties. A prediction or target that is constant has r = 0.

    Args:
        features: One row per event, in their order; constant columns predict nothing.
        targets: One column per target.
        folds: Five contiguous ones when absent.
        alphas: Penalties, above 0, ascending.

    Returns:
        Scores in [-1, 1], 0 expected at chance for test events.

    Raises:
        EvaluationError: If rows differ in number, numbers are not finite, a target is constant, or a penalty is not above 0.

    Source: Hoerl and Kennard 1970; Subramaniam et al. 2024, released code.
    """
    _check(features, targets, alphas)
    folds = contiguous_folds(len(features)) if folds is None else folds
    return _encode(features.astype(np.float64), targets.astype(np.float64), folds, np.array(alphas))


def ridge_weights(
    features: Float[np.ndarray, "n d"], targets: Float[np.ndarray, "n t"], alpha: float
) -> Float64[np.ndarray, "d t"]:
    """Return the weights of ridge regression on centred features and targets, by singular values: V diag(s / (s^2 + alpha)) U^T y.

    Args:
        features: One row per event.
        targets: One column per target.
        alpha: Penalty, at least 0; 0 is the shortest least-squares solution.
    """
    x, y = features - features.mean(0), targets - targets.mean(0)
    left, size, right = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    kept = size > size[:1] * max(x.shape) * np.finfo(np.float64).eps
    shrunk = np.divide(size, size**2 + alpha, out=np.zeros_like(size), where=kept)
    weights: np.ndarray = right.T @ (shrunk[:, None] * (left.T @ y))
    return weights


def sorted_resamples(events: int, count: int, *, block: int = 1, seed: int = 0) -> Int64[np.ndarray, "b n"]:
    """Return events drawn with replacement and sorted, one row per resample; about 63 % of the events occur in a row.

    Sorting keeps copies of an event beside each other, so that they are trained and tested on at once at the borders of blocks only. Draw them once
    and use them for all models, so that comparisons are paired.

    Args:
        events: How many there are.
        count: Resamples.
        block: Neighbours that are drawn together; more than 1 where what is left unexplained is alike over time, else intervals are too narrow.
        seed: Of the draws.

    Source: Subramaniam et al. 2024, released code; Kuensch 1989 for blocks.
    """
    runs = -(-events // block)
    starts = np.random.default_rng(seed).integers(events - block + 1, size=(count, runs, 1))
    return np.sort((starts + np.arange(block)).reshape(count, -1)[:, :events])


@dataclass(frozen=True)
class Resampled:
    """Scores on every resample.

    Attributes:
        validation: Pearson's r; chooses which targets are looked at.
        test: Pearson's r.
    """

    validation: Float64[np.ndarray, "b t"]
    test: Float64[np.ndarray, "b t"]


def encode_resampled(
    features: Float[np.ndarray, "n d"],
    targets: Float[np.ndarray, "m t"],
    resamples: Int64[np.ndarray, "b n"],
    *,
    folds: int = 5,
    alphas: Sequence[float] = ALPHAS,
) -> Resampled:
    """Return `encode` of every resample: standardising, fitting and the choice of the penalty are done anew in each.

    Raises:
        EvaluationError: As `encode`.
    """
    _check(features, targets, alphas)
    features, targets, penalties = features.astype(np.float64), targets.astype(np.float64), np.array(alphas)
    layout = contiguous_folds(resamples.shape[1], folds)
    found = [_encode(features[rows], targets[rows], layout, penalties) for rows in resamples]
    return Resampled(np.stack([one.validation for one in found]), np.stack([one.test for one in found]))


@dataclass(frozen=True)
class Comparison:
    """Whether one set of features predicts each site better than another.

    Attributes:
        difference: Mean over bins and resamples of the difference in test r; NaN where a site was not compared.
        p: One-sided, (1 + number of resamples without an advantage) / (1 + resamples); NaN alike.
        q: Adjusted for the number of sites compared.
    """

    difference: Float64[np.ndarray, " s"]
    p: Float64[np.ndarray, " s"]
    q: Float64[np.ndarray, " s"]

    def significant(self, level: float = 0.05) -> Bool[np.ndarray, " s"]:
        """Return where the first set is better, with at most this share of false ones among them expected."""
        return np.nan_to_num(self.q, nan=1.0) < level  # type: ignore[no-any-return]


def surviving(scores: Resampled, sites: int) -> Bool[np.ndarray, "s k"]:
    """Return which bins of which site are predicted at all: the lower end of the 95 % interval of validation r is above 0."""
    kept: np.ndarray = np.percentile(scores.validation, 2.5, axis=0) > 0
    return kept.reshape(sites, -1)


def compare(first: Resampled, second: Resampled, sites: int, *, min_bins: int = 10) -> Comparison:
    """Return whether the first set of features predicts sites better than the second, over the same resamples.

    A site is compared in the bins that the first set predicts, if there are at least `min_bins`. Events are what is resampled, and the bins
    of a site stay together, so it does not matter that bins overlap.

    Args:
        first: Of the features that may be better; targets are bins, those of a site side by side.
        second: Of the others, on the same resamples.
        sites: How many there are.
        min_bins: Bins of a site that must be predicted.

    Raises:
        EvaluationError: If the two have different resamples or targets.

    Source: the test is ours, the published one was not released; false discovery rate by Benjamini and Hochberg 1995.
    """
    if first.test.shape != second.test.shape:
        raise EvaluationError(
            f"A paired comparison needs the same resamples and targets; they are {first.test.shape} and {second.test.shape}."
        )
    kept = surviving(first, sites)
    advantage = (first.test - second.test).reshape(len(first.test), sites, -1)
    weight = kept / np.maximum(kept.sum(1, keepdims=True), 1)
    by_resample = (advantage * weight).sum(2)
    compared = kept.sum(1) >= min_bins
    p = np.where(compared, (1 + (by_resample <= 0).sum(0)) / (1 + len(by_resample)), np.nan)
    q = np.full(sites, np.nan)
    q[compared] = benjamini_hochberg(p[compared])
    return Comparison(np.where(compared, by_resample.mean(0), np.nan), p, q)


def benjamini_hochberg(p: Float[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Return q-values: calling all with q below a level significant makes at most that share of false calls in expectation.

    q_(i) = min over j >= i of p_(j) n / j, at most 1; never below p.

    Source: Benjamini and Hochberg 1995.
    """
    order = np.argsort(p)
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty(len(p))
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    return q


def pearson(first: Float[np.ndarray, "n t"], second: Float[np.ndarray, "n t"]) -> Float64[np.ndarray, " t"]:
    """Return the correlation of each column with its counterpart, in [-1, 1]; 0 where one of them is constant."""
    a, b = first - first.mean(0, dtype=np.float64), second - second.mean(0, dtype=np.float64)
    squares = (a**2).sum(0) * (b**2).sum(0)
    return _ratio((a * b).sum(0), np.where((np.ptp(first, 0) > 0) & (np.ptp(second, 0) > 0), squares, 0))


def _encode(features: np.ndarray, targets: np.ndarray, folds: Sequence[Fold], alphas: np.ndarray) -> Encoding:
    scores = np.mean([_fold_scores(features, targets, fold, alphas) for fold in folds], axis=0)
    best, column = scores[0].argmax(0), np.arange(targets.shape[1])
    return Encoding(scores[0, best, column], scores[1, best, column], alphas[best], scores[0], scores[1])


def _fold_scores(
    features: np.ndarray, targets: np.ndarray, fold: Fold, alphas: np.ndarray
) -> Float64[np.ndarray, "2 a t"]:
    """Return r on validation and test events for every penalty and target.

    Predictions are Z w with Z the held-out features along the right singular vectors and w = c / (s^2 + alpha). Their covariance with y and their
    variance need Z^T y and the triangle of Z only, so that no prediction is written down.
    """
    mean, spread = features[fold.train].mean(0), features[fold.train].std(0)
    scale = np.divide(1, spread, out=np.zeros_like(spread), where=spread > 0)
    left, size, right = np.linalg.svd((features[fold.train] - mean) * scale, full_matrices=False)
    fitted = size[:, None] * (left.T @ (targets[fold.train] - targets[fold.train].mean(0)))
    shrink = 1 / (size**2 + alphas[:, None])
    parts = []
    for rows in (fold.validation, fold.test):
        z, y = ((features[rows] - mean) * scale) @ right.T, targets[rows]
        z, y = z - z.mean(0), y - y.mean(0)
        covariance = shrink @ (fitted * (z.T @ y))
        triangle = np.linalg.qr(z, mode="r")
        variance = np.stack([((triangle * row) @ fitted) ** 2 for row in shrink]).sum(1)
        own = np.where(np.ptp(targets[rows], 0) > 0, (y**2).sum(0), 0)  # rounding may leave more than 0 of a constant
        parts.append(_ratio(covariance, variance * own))
    return np.stack(parts)


def _ratio(covariance: np.ndarray, squares: np.ndarray) -> Float64[np.ndarray, "*shape"]:
    return np.divide(covariance, np.sqrt(squares), out=np.zeros_like(covariance), where=squares > 0)  # type: ignore[no-any-return]


def _check(features: np.ndarray, targets: np.ndarray, alphas: Sequence[float]) -> None:
    if len(features) != len(targets):
        raise EvaluationError(
            f"Features and responses need one row per event; they have {len(features)} and {len(targets)}."
        )
    if not np.isfinite(features).all() or not np.isfinite(targets).all():
        raise EvaluationError("Some features or responses are not finite. Leave those events out, or fill them in.")
    if not alphas or min(alphas) <= 0:
        raise EvaluationError(f"Penalties must be above 0, not {tuple(alphas)}.")
    constant = np.nonzero(np.ptp(targets, 0) == 0)[0]
    if len(constant):
        raise EvaluationError(
            f"{len(constant)} targets are constant, so nothing predicts them: columns {constant[:8].tolist()}. Leave them out."
        )
