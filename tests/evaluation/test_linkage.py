import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diptych.errors import EvaluationError
from diptych.evaluation.linkage import (
    PairCounts,
    adjusted_rand_index,
    best_cut,
    cut,
    link_scores,
    no_match_accuracy,
    spanning_tree,
    sweep,
    tune_threshold,
)


def points(n: int, d: int = 4, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def by_pairs(cluster, label):
    """Return the adjusted Rand index and pairwise precision, recall and F1, by looking at every pair."""
    pairs = list(itertools.combinations(range(len(label)), 2))
    same = [(cluster[i] == cluster[j], label[i] == label[j]) for i, j in pairs]
    a = sum(c and t for c, t in same)
    b, c = sum(c for c, _ in same), sum(t for _, t in same)
    expected = b * c / len(pairs)
    return (a - expected) / ((b + c) / 2 - expected), a / b, a / c, 2 * a / (b + c)


@pytest.fixture
def official(data):
    with np.load(data.parent / "golden" / "clippings.npz") as golden:
        return {name: golden[name] for name in golden.files}


@pytest.mark.data
def test_official_clusters(official):
    tree = spanning_tree(torch.from_numpy(official["cluster/embeddings"]))
    label = official["cluster/labels"]
    for threshold, clusters, ari in zip(
        official["cluster/thresholds"], official["cluster/clusters"], official["cluster/ari"], strict=True
    ):
        found = cut(tree, threshold)
        assert np.array_equal(found, clusters)
        assert adjusted_rand_index(found, label) == pytest.approx(ari, abs=1e-9)


@pytest.mark.data
def test_official_accuracy_with_no_match(official):
    prediction, truth = official["metrics/prediction"], official["metrics/truth"]
    right, matched = (truth == prediction[:, None]).any(1), (truth >= 0).any(1)
    thresholds = official["metrics/thresholds"]
    found = no_match_accuracy(official["metrics/score"], right, matched, thresholds)
    np.testing.assert_allclose(found, official["metrics/nomatch_accuracy"], atol=1e-12)
    assert thresholds[found.argmax()] == official["metrics/best_threshold"]
    kept = matched & official["metrics/in_test"]
    assert right[kept].mean() == official["metrics/matched_accuracy"]


def test_single_linkage_equals_scipy():
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    x = points(200)
    linked = hierarchy.linkage(x.double().numpy(), "single", "cosine")
    tree = spanning_tree(x)
    np.testing.assert_allclose(tree.distance, linked[:, 2], atol=1e-6)
    for threshold in (0.001, 0.01, 0.03, 0.1):
        expected = hierarchy.fcluster(linked, threshold, "distance")
        assert adjusted_rand_index(cut(tree, threshold), expected) == 1
    assert cut(tree, 0.0).tolist() == list(range(200)) and cut(tree, 2.0).max() == 0


def test_the_sweep_equals_cutting_and_counting_at_every_threshold():
    x, label = points(40, d=2), np.arange(40) % 7
    x[7:14] = x[:7]  # distances of 0 and ties
    tree = spanning_tree(x)
    thresholds, found = sweep(tree, label)
    assert thresholds.tolist() == sorted({0.0, *tree.distance.tolist()})
    for threshold, ari in zip(thresholds, found, strict=True):
        assert ari == pytest.approx(by_pairs(cut(tree, threshold), label)[0], abs=1e-12)
    threshold, best = best_cut(tree, label)
    assert best == found.max() == pytest.approx(adjusted_rand_index(cut(tree, threshold), label))


def test_pairs_are_counted_as_by_hand():
    cluster, label = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 2]
    pairs = PairCounts.of(cluster, label)
    assert (pairs.shared, pairs.clustered, pairs.labelled) == (2, 4, 4)
    found = (adjusted_rand_index(cluster, label), pairs.precision, pairs.recall, pairs.f1)
    assert found == pytest.approx(by_pairs(cluster, label))


def test_equal_partitions_agree_and_shuffled_ones_do_not():
    label = np.arange(300) % 10
    assert adjusted_rand_index((label + 3) % 10, label) == 1
    shuffled = np.random.default_rng(0).permutation(label)
    assert abs(adjusted_rand_index(shuffled, label)) < 0.02
    assert adjusted_rand_index([0, 1], [0, 1]) == 1 and adjusted_rand_index([0], [0]) == 1


def test_links_by_hand():
    score = np.array([0.9, 0.8, 0.7, 0.6])
    right, matched = np.array([True, True, False, True]), np.array([True, True, False, True])
    found = link_scores(score, right, matched, 0.65)
    assert (found.precision.value, found.recall.value, found.top1.value) == (2 / 3, 2 / 3, 1.0)
    assert found.f1.value == pytest.approx(2 / 3) and found.f1.low <= found.f1.value <= found.f1.high
    assert link_scores(score, right, matched, 2.0).precision.value == 0
    assert tune_threshold(score, right, matched) == (pytest.approx(0.55), pytest.approx(6 / 7))


def test_the_threshold_is_the_best_of_all():
    rng = np.random.default_rng(0)
    score = rng.integers(20, size=60) / 20  # with ties
    matched = rng.random(60) < 0.8
    right = matched & (rng.random(60) < score)
    threshold, best = tune_threshold(score, right, matched)
    tried = [link_scores(score, right, matched, t).f1.value for t in np.arange(-0.025, 1, 0.05)]
    assert best == pytest.approx(max(tried)) == pytest.approx(link_scores(score, right, matched, threshold).f1.value)


def test_what_cannot_be_judged():
    nothing = np.zeros(3, bool)
    with pytest.raises(EvaluationError, match="None of the 3 queries"):
        tune_threshold(np.ones(3), nothing, nothing)
    with pytest.raises(EvaluationError, match="they have 2 and 3"):
        adjusted_rand_index([0, 1], [0, 1, 2])
    with pytest.raises(EvaluationError, match="finite"):
        spanning_tree(torch.tensor([[torch.nan]]))
