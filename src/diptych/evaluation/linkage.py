"""How well records were linked and clustered: precision, recall and F1 of links and of pairs, adjusted Rand index, single linkage.

Single linkage at a threshold is the components of the minimum spanning tree without its longer edges. So one tree holds all clusterings, and
walking up its edges gives the adjusted Rand index at every threshold there is.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from diptych.errors import EvaluationError
from diptych.evaluation.stats import bootstrap_means
from diptych.types import Interval

Labels = Sequence[int] | Int[np.ndarray, " n"]


@dataclass(frozen=True)
class LinkScores:
    """How well queries were linked.

    Attributes:
        precision: Share of the links that are right; 0 where there are none.
        recall: Share of the queries with a match that were linked to it.
        f1: Harmonic mean of the two.
        top1: Share of the queries with a match whose nearest candidate is one, whatever the threshold.
    """

    precision: Interval
    recall: Interval
    f1: Interval
    top1: Interval


def link_scores(
    score: Float[np.ndarray, " q"],
    right: Bool[np.ndarray, " q"],
    matched: Bool[np.ndarray, " q"],
    threshold: float,
    *,
    seed: int = 0,
) -> LinkScores:
    """Return how well queries were linked, with 95 % intervals over queries.

    Args:
        score: Of the nearest candidate.
        right: Whether it is a match.
        matched: Whether there is any.
        threshold: Candidates that score above it are links.
        seed: Of the bootstrap.

    Raises:
        EvaluationError: If no query has a match.
    """
    _check(right, matched)
    kept = score > threshold
    columns = np.stack([kept & right, kept, matched, right], 1).astype(np.float64)
    return LinkScores(
        bootstrap_means(lambda hit, kept, matched, top: _ratio(hit, kept), columns, seed=seed),
        bootstrap_means(lambda hit, kept, matched, top: _ratio(hit, matched), columns, seed=seed),
        bootstrap_means(lambda hit, kept, matched, top: _ratio(2 * hit, kept + matched), columns, seed=seed),
        bootstrap_means(lambda hit, kept, matched, top: _ratio(top, matched), columns, seed=seed),
    )


def tune_threshold(
    score: Float[np.ndarray, " q"], right: Bool[np.ndarray, " q"], matched: Bool[np.ndarray, " q"]
) -> tuple[float, float]:
    """Return the threshold with the best F1 of links, and that F1; halfway between two scores, so that neither decides by rounding.

    All thresholds are tried: the score of every query is one. Of equals the highest.

    Raises:
        EvaluationError: If no query has a match.
    """
    _check(right, matched)
    order = np.argsort(-score, kind="stable")
    ordered, hits = score[order], right[order].cumsum()
    last = np.append(ordered[1:] < ordered[:-1], True)  # equal scores are kept together or not at all
    f1 = np.where(last, 2 * hits / (np.arange(1, len(score) + 1) + matched.sum()), -1)
    best = int(f1.argmax())
    below = ordered[best + 1] if best + 1 < len(score) else ordered[best] - 0.1
    return float((ordered[best] + below) / 2), float(f1[best])


def no_match_accuracy(
    score: Float[np.ndarray, " q"],
    right: Bool[np.ndarray, " q"],
    matched: Bool[np.ndarray, " q"],
    thresholds: Float[np.ndarray, " t"],
) -> Float64[np.ndarray, " t"]:
    """Return at each threshold the share of queries that were linked to a match, or rightly to nothing.

    Source: Arora et al. 2023, section 5 (accuracy with no-match).
    """
    kept = score > thresholds[:, None]
    return np.where(kept, right, ~matched).mean(1, dtype=np.float64)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class SpanningTree:
    """A minimum spanning tree by cosine distance, shortest edges first.

    Attributes:
        ends: Rows that each edge joins.
        distance: 1 - cosine of each edge, in [0, 2].
    """

    ends: Int64[np.ndarray, "e 2"]
    distance: Float64[np.ndarray, " e"]


def spanning_tree(embeddings: Float[Tensor, "n d"]) -> SpanningTree:
    """Return a minimum spanning tree of normalised embeddings, without the matrix of all distances: n^2 d operations, n d numbers.

    Raises:
        EvaluationError: If there are none, or a number is not finite.

    Source: Prim 1957.
    """
    if not len(embeddings) or not embeddings.isfinite().all():
        raise EvaluationError(f"Clusters need finite embeddings, at least one; there are {len(embeddings)}.")
    points = embeddings.double()
    nearest, parent = (
        torch.full((len(points),), torch.inf, dtype=torch.float64),
        torch.zeros(len(points), dtype=torch.int64),
    )
    waiting, row, ends, distance = torch.ones(len(points), dtype=torch.bool), 0, [], []
    for _ in range(len(points) - 1):
        waiting[row] = False
        away = (1 - points @ points[row]).clamp(min=0)
        closer = waiting & (away < nearest)
        nearest[closer], parent[closer], nearest[row] = away[closer], row, torch.inf
        row = int(nearest.argmin())
        ends.append((int(parent[row]), row))
        distance.append(float(nearest[row]))
    order = np.argsort(distance, kind="stable")
    return SpanningTree(np.array(ends, np.int64).reshape(-1, 2)[order], np.array(distance)[order])


class _Components:
    """Sets of rows that grow together (union-find)."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def find(self, row: int) -> int:
        while self._parent[row] != row:
            self._parent[row] = row = self._parent[self._parent[row]]
        return row

    def join(self, first: int, second: int) -> None:
        """Put `second`, a root, under `first`."""
        self._parent[second] = first


def cut(tree: SpanningTree, threshold: float) -> Int64[np.ndarray, " n"]:
    """Return single-linkage clusters: the edges up to the threshold join their rows. Numbered in the order of their first rows."""
    count, joined = len(tree.distance) + 1, _Components(len(tree.distance) + 1)
    for first, second in tree.ends[tree.distance <= threshold].tolist():
        joined.join(joined.find(first), joined.find(second))
    number: dict[int, int] = {}
    return np.array([number.setdefault(joined.find(row), len(number)) for row in range(count)], np.int64)


def sweep(tree: SpanningTree, label: Labels) -> tuple[Float64[np.ndarray, " k"], Float64[np.ndarray, " k"]]:
    """Return every threshold at which the clusters change, 0 the first, and the adjusted Rand index at each: exact, in n log n after the tree.

    Joining two clusters adds to the pairs of one cluster the product of their sizes, and to those of one cluster and one label the sum over labels of
    the products of their counts; the smaller cluster is poured into the larger.
    """
    counts = [Counter([one]) for one in np.asarray(label).tolist()]
    sizes, joined = [1] * len(counts), _Components(len(counts))
    of_labels = _pairs(np.unique(label, return_counts=True)[1])
    thresholds, found, clustered, shared = [0.0], [_rand(0, 0, of_labels, len(counts))], 0, 0
    for (first, second), distance in zip(tree.ends.tolist(), tree.distance.tolist(), strict=True):
        large, small = sorted((joined.find(first), joined.find(second)), key=lambda root: -len(counts[root]))
        clustered += sizes[large] * sizes[small]
        shared += sum(number * counts[large][one] for one, number in counts[small].items())
        counts[large].update(counts[small])
        sizes[large] += sizes[small]
        joined.join(large, small)
        if distance > thresholds[-1]:
            thresholds.append(distance)
            found.append(0.0)
        found[-1] = _rand(shared, clustered, of_labels, len(counts))
    return np.array(thresholds), np.array(found)


def best_cut(tree: SpanningTree, label: Labels) -> tuple[float, float]:
    """Return the threshold with the best adjusted Rand index, halfway to the next one, and that index; the lowest of equals."""
    thresholds, found = sweep(tree, label)
    best = int(found.argmax())
    above = thresholds[best + 1] if best + 1 < len(thresholds) else thresholds[best]
    return float((thresholds[best] + above) / 2), float(found[best])


def adjusted_rand_index(cluster: Labels, label: Labels) -> float:
    """Return how well two partitions agree: 1 for the same one, 0 expected by chance, below 0 for worse.

    Source: Hubert and Arabie 1985.
    """
    pairs = PairCounts.of(cluster, label)
    return _rand(pairs.shared, pairs.clustered, pairs.labelled, len(cluster))


@dataclass(frozen=True)
class PairCounts:
    """How many pairs of rows share a cluster, a label, and both.

    Attributes:
        shared: Both.
        clustered: A cluster.
        labelled: A label.
    """

    shared: int
    clustered: int
    labelled: int

    @classmethod
    def of(cls, cluster: Labels, label: Labels) -> "PairCounts":
        """Return the counts of two partitions of the same rows.

        Raises:
            EvaluationError: If they are of different lengths.
        """
        if len(cluster) != len(label):
            raise EvaluationError(
                f"Two partitions of the same rows are needed; they have {len(cluster)} and {len(label)}."
            )
        both = np.stack([np.asarray(cluster), np.asarray(label)])
        return cls(
            _pairs(np.unique(both, axis=1, return_counts=True)[1]),
            *(_pairs(np.unique(part, return_counts=True)[1]) for part in both),
        )

    @property
    def precision(self) -> float:
        """Return the share of the pairs in one cluster that share a label; 0 where there are none."""
        return self.shared / self.clustered if self.clustered else 0.0

    @property
    def recall(self) -> float:
        """Return the share of the pairs with one label that share a cluster; 0 where there are none."""
        return self.shared / self.labelled if self.labelled else 0.0

    @property
    def f1(self) -> float:
        """Return the harmonic mean of precision and recall."""
        pairs = self.clustered + self.labelled
        return 2 * self.shared / pairs if pairs else 0.0


def _rand(shared: int, clustered: int, labelled: int, count: int) -> float:
    expected = clustered * labelled / max(1, count * (count - 1) // 2)
    most = (clustered + labelled) / 2
    return 1.0 if most == expected else (shared - expected) / (most - expected)


def _pairs(sizes: np.ndarray) -> int:
    return int((sizes * (sizes - 1) // 2).sum())


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)  # type: ignore[no-any-return]


def _check(right: np.ndarray, matched: np.ndarray) -> None:
    if not matched.any():
        raise EvaluationError(f"None of the {len(matched)} queries has a match, so links cannot be judged.")
    assert not (right & ~matched).any()
