import numpy as np
import pytest

from diptych.errors import EvaluationError
from diptych.evaluation.similarity import compare_dissimilarities, dissimilarities, noise_ceiling, ranks, spearman


def test_dissimilarities_are_one_minus_the_correlation():
    x = np.random.default_rng(0).normal(size=(6, 9))
    np.testing.assert_allclose(dissimilarities(x), 1 - np.corrcoef(x), atol=1e-12)
    x[2] = 4.0
    assert dissimilarities(x)[2].tolist() == [1, 1, 0, 1, 1, 1]


def test_rank_correlation_equals_scipy_with_ties():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    first, others = rng.integers(6, size=40).astype(float), rng.integers(6, size=(40, 3)).astype(float)
    expected = [stats.spearmanr(first, others[:, k]).statistic for k in range(3)]
    np.testing.assert_allclose(spearman(first, others), expected, atol=1e-12)
    assert ranks(np.array([3.0, 1.0, 3.0, 0.0])).tolist() == [3.5, 2, 3.5, 1]
    assert spearman(first, np.ones((40, 1))).tolist() == [0]


def subjects(noise: float, count: int = 8):
    rng = np.random.default_rng(0)
    true = rng.normal(size=(30, 5))
    return dissimilarities(true), [dissimilarities(true + noise * rng.normal(size=true.shape)) for _ in range(count)]


def test_the_true_model_lies_between_the_ends_of_the_ceiling():
    model, measured = subjects(0.7)
    found = compare_dissimilarities(model, measured)
    low, high = found.ceiling
    assert 0.3 < low < high < 1 and low - 0.03 < found.correlation.value < high + 0.03
    assert found.correlation.low < found.correlation.value < found.correlation.high
    assert found.correlation.value == pytest.approx(found.subjects.mean())
    order = np.random.default_rng(1).permutation(30)
    other = compare_dissimilarities(model[np.ix_(order, order)], measured)
    assert abs(other.correlation.value) < 0.15 and other.correlation.low < 0 < other.correlation.high


def test_subjects_without_noise_have_a_ceiling_of_1():
    model, measured = subjects(0.0, 3)
    assert compare_dissimilarities(model, measured).ceiling == pytest.approx((1, 1))
    assert noise_ceiling(np.arange(6.0)[:, None]) == (1, 1)


def test_shapes_that_do_not_fit():
    with pytest.raises(EvaluationError, match=r"model's shape \(30, 30\).*theirs: \(29, 29\)"):
        compare_dissimilarities(subjects(0)[0], [np.zeros((29, 29))])
