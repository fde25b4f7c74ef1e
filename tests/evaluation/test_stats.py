import numpy as np
import pytest

from diptych.errors import EvaluationError
from diptych.evaluation import stats
from diptych.evaluation.stats import bootstrap, bootstrap_means, bootstrap_strata, paired_difference
from diptych.types import Interval


def test_interval_equals_a_naive_bootstrap():
    scores = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    rng = np.random.default_rng(3)
    means = sorted(scores[rng.integers(5, size=5)].mean() for _ in range(2000))
    low, high = np.percentile(means, [2.5, 97.5])
    assert bootstrap(scores, seed=3) == Interval(0.6, low, high)


def test_intervals_cover_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    found = [bootstrap((rng.random(150) < 0.3).astype(float), seed=seed) for seed in range(200)]
    assert 0.91 <= np.mean([interval.low <= 0.3 <= interval.high for interval in found]) <= 0.98


def test_clusters_cover_the_truth_where_single_items_do_not():
    """Five captions of one image are all hits or all misses: the data are worth 60 items, not 300."""
    rng = np.random.default_rng(1)
    cluster = np.repeat(np.arange(60), 5)
    draws = [np.repeat((rng.random(60) < 0.5).astype(float), 5) for _ in range(200)]

    def coverage(**options):
        found = [bootstrap(scores, seed=seed, **options) for seed, scores in enumerate(draws)]
        return np.mean([interval.low <= 0.5 <= interval.high for interval in found])

    assert 0.9 <= coverage(cluster=cluster) <= 0.99
    assert coverage() < 0.75


@pytest.mark.parametrize("count", [1, 5, 400])
def test_all_hits_are_not_certainty(count):
    """The exact bound of Clopper and Pearson: the rate at which as many hits in a row still happen in 2.5 % of all cases."""
    hits, misses = bootstrap(np.ones(count)), bootstrap(np.zeros(count))
    assert (hits.value, hits.high, misses.value, misses.low) == (1.0, 1.0, 0.0, 0.0)
    assert hits.low**count == pytest.approx(0.025) and misses.high == pytest.approx(1 - hits.low)
    assert (
        bootstrap(np.ones(2 * count), cluster=np.repeat(range(count), 2)) == hits
    )  # a cluster is one piece of evidence
    assert bootstrap(np.full(count, 0.5)) == Interval(0.5, 0.5, 0.5)


def test_cluster_ids_may_be_any_numbers_in_any_order():
    scores = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    assert bootstrap(scores, cluster=[70, 7, 7, 70, 9, 9]) == bootstrap(scores, cluster=[2, 0, 0, 2, 1, 1])


def test_memory_chunks_do_not_change_the_interval(monkeypatch):
    scores = np.random.default_rng(0).random(40)
    whole, strata = bootstrap(scores), bootstrap_strata(scores, [0] * 40)
    monkeypatch.setattr(stats, "_CHUNK", 400)
    assert bootstrap(scores) == whole
    assert bootstrap_strata(scores, [0] * 40) == strata


def test_strata_weigh_alike_and_stay_within_the_range_of_the_scores():
    found = bootstrap_strata([1.0] * 8 + [0.0, 1.0], [0] * 8 + [1, 1])
    assert found == Interval(0.75, 0.5, 1.0)  # the second stratum's mean is 0, 1/2 or 1
    assert bootstrap_strata([1.0] * 9, [0] * 8 + [1]) == Interval(
        1.0, 0.025**0.5, 1.0
    )  # twice the one item of the smallest


def test_one_stratum_is_the_plain_bootstrap():
    scores = np.random.default_rng(0).random(30)
    assert bootstrap_strata(scores, [5] * 30) == bootstrap(scores)


def test_pairing_finds_what_two_separate_intervals_do_not():
    rng = np.random.default_rng(0)
    first = (rng.random(400) < 0.5).astype(float)
    second = first.copy()
    second[np.flatnonzero(first == 0)[:15]] = 1.0
    alone, difference = (bootstrap(first), bootstrap(second)), paired_difference(first, second)
    assert alone[0].high > alone[1].low
    assert difference.value == pytest.approx(15 / 400) and difference.low > 0


def test_equal_scores_differ_by_exactly_nothing():
    assert paired_difference([1.0, 0.0, 1.0], [1.0, 0.0, 1.0]) == Interval(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap([]), "at least one item"),
        (lambda: bootstrap([1.0, float("nan")]), "1 of 2 scores are not finite"),
        (lambda: bootstrap([1.0, 0.0], cluster=[1]), "2 scores needs one id; there are 1"),
        (lambda: bootstrap_strata([], []), "at least one item"),
        (lambda: bootstrap_strata([1.0], [0, 1]), "1 scores needs one id; there are 2"),
        (lambda: paired_difference([1.0], [1.0, 0.0]), "there are 1 and 2"),
        (lambda: paired_difference([], []), "at least one item"),
    ],
)
def test_undefined_input_is_refused(call, message):
    with pytest.raises(EvaluationError, match=message):
        call()


def test_a_function_of_means_equals_a_naive_bootstrap():
    rng = np.random.default_rng(3)
    first, second = rng.random((5, 2)), rng.random((4, 1))
    found = bootstrap_means(lambda a, b, c: a * (b - c), first, second, seed=1)
    assert found.value == pytest.approx(first[:, 0].mean() * (first[:, 1].mean() - second.mean()))
    draws = []
    for _ in range(20_000):
        a, b = first[rng.integers(5, size=5)].mean(0)
        draws.append(a * (b - second[rng.integers(4, size=4)].mean()))
    assert (found.low, found.high) == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.02)


def test_the_mean_of_one_sample_has_the_interval_of_the_plain_bootstrap():
    scores = (np.random.default_rng(0).random(200) < 0.3).astype(float)
    plain, found = bootstrap(scores), bootstrap_means(lambda mean: mean, scores[:, None])
    assert found.value == plain.value and (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=0.01)


@pytest.mark.parametrize("sample", [np.zeros((0, 1)), np.array([[np.nan]])])
def test_a_function_of_means_needs_finite_items(sample):
    with pytest.raises(EvaluationError):
        bootstrap_means(lambda mean: mean, sample)
