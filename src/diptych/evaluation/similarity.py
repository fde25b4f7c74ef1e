"""Whether two systems find the same stimuli alike: representational similarity analysis, with the ceiling that noise sets."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

from diptych.errors import EvaluationError
from diptych.evaluation.encoding import pearson
from diptych.types import Interval

RESAMPLES = 1000


@dataclass(frozen=True)
class Similarity:
    """How alike a model and measured subjects find stimuli.

    Attributes:
        correlation: Spearman's, the mean over subjects, with its interval over stimuli.
        subjects: One number per subject.
        ceiling: What the true model of these subjects could reach lies between: the mean correlation of each subject with the mean of the others, and
            with the mean of all.
    """

    correlation: Interval
    subjects: Float64[np.ndarray, " m"]
    ceiling: tuple[float, float]


def dissimilarities(features: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "n n"]:
    """Return 1 - Pearson's r between the features of stimuli, in [0, 2]; 1 for independent ones, and for constant ones with all others.

    Source: Kriegeskorte et al. 2008, "Representational similarity analysis".
    """
    centred = features - features.mean(1, keepdims=True, dtype=np.float64)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)
    found: np.ndarray = 1 - unit @ unit.T
    np.fill_diagonal(found, 0)
    return found


def compare_dissimilarities(
    model: Float[np.ndarray, "n n"], subjects: Sequence[Float[np.ndarray, "m m"]], *, seed: int = 0
) -> Similarity:
    """Return how alike a model and subjects find stimuli.

    Spearman's correlation of the pairs above the diagonal, for each subject. The interval resamples stimuli, and leaves out pairs of a
    stimulus with itself.

    Args:
        model: Dissimilarities.
        subjects: Dissimilarities of the same stimuli, one matrix per subject; two or more for a ceiling, which is 1 for one.
        seed: Of the 1,000 resamples.

    Raises:
        EvaluationError: If shapes differ, there are fewer than four stimuli, or no subject.

    Source: Nili et al. 2014, "A Toolbox for Representational Similarity Analysis" (noise ceiling); Schuett et al. 2023 (resampling of stimuli).
    """
    count = len(model)
    if not subjects or count < 4 or any(one.shape != model.shape for one in subjects):
        shapes = ", ".join(str(one.shape) for one in subjects) or "none"
        raise EvaluationError(
            f"Subjects' matrices must have the model's shape {model.shape}, at least 4 stimuli; theirs: {shapes}."
        )
    upper = np.triu_indices(count, 1)
    own, theirs = model[upper], np.stack([one[upper] for one in subjects], 1)
    each = spearman(own, theirs)
    rng, means = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        drawn = np.sort(rng.integers(count, size=count))
        rows, columns = drawn[upper[0]], drawn[upper[1]]
        kept = rows != columns
        pairs = rows[kept], columns[kept]
        means.append(spearman(model[pairs], np.stack([one[pairs] for one in subjects], 1)).mean())
    low, high = np.percentile(means, [2.5, 97.5]).tolist()
    return Similarity(Interval(float(each.mean()), low, high), each, noise_ceiling(theirs))


def noise_ceiling(pairs: Float[np.ndarray, "p m"]) -> tuple[float, float]:
    """Return the mean correlation of each subject with the mean rank of the others, and with that of all; (1, 1) for one subject.

    Args:
        pairs: Dissimilarity of each pair of stimuli, one column per subject.

    Source: Nili et al. 2014, section "Estimating the noise ceiling".
    """
    ranked = np.apply_along_axis(ranks, 0, pairs)
    count, total = pairs.shape[1], ranked.sum(1)
    if count == 1:
        return 1.0, 1.0
    others = np.stack([total - ranked[:, subject] for subject in range(count)], 1)
    lower = np.mean([spearman(others[:, subject], pairs[:, [subject]])[0] for subject in range(count)])
    return float(lower), float(spearman(total, pairs).mean())


def spearman(first: Float[np.ndarray, " p"], others: Float[np.ndarray, "p m"]) -> Float64[np.ndarray, " m"]:
    """Return the rank correlation of some numbers with each column, ties at their mean rank; 0 where one of them is constant."""
    return pearson(np.repeat(ranks(first)[:, None], others.shape[1], 1), np.apply_along_axis(ranks, 0, others))


def ranks(numbers: Float[np.ndarray, " p"]) -> Float64[np.ndarray, " p"]:
    """Return the rank of each number from 1 on; equal numbers share the mean of their places."""
    _, place, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    found: np.ndarray = (counts.cumsum() - (counts - 1) / 2)[place]
    return found
