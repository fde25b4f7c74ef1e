import numpy as np
import pytest

from diptych.errors import EvaluationError
from diptych.evaluation.encoding import (
    ALPHAS,
    Resampled,
    benjamini_hochberg,
    compare,
    contiguous_folds,
    encode,
    encode_resampled,
    pearson,
    ridge_weights,
    shuffled_folds,
    sorted_resamples,
)


def numbers(seed=0, n=80, d=6, t=4, noise=1.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    return x, x @ rng.normal(size=(d, t)) + noise * rng.normal(size=(n, t))


@pytest.fixture
def official(data):
    with np.load(data.parent / "golden" / "brain_encoding.npz") as golden:
        return {name: golden[name] for name in golden.files}


@pytest.mark.data
def test_official_ridge(official):
    x, y, folds = official["ridge/X"], official["ridge/Y"], int(official["ridge/folds"])
    layout = contiguous_folds(len(x), folds)
    role = np.zeros((folds, len(x)), np.int8)
    for number, fold in enumerate(layout):
        role[number, fold.validation], role[number, fold.test] = 1, 2
    assert np.array_equal(role, official["ridge/fold_role"])
    found = encode(x, y, layout)
    assert np.array_equal(found.alpha, official["ridge/alpha"])
    for name, value in (("val_r", found.validation), ("test_r", found.test)):
        np.testing.assert_allclose(value, official[f"ridge/{name}"], atol=1e-5)
    np.testing.assert_allclose(found.validation_by_alpha, official["ridge/val_r_per_alpha"], atol=1e-5)
    np.testing.assert_allclose(found.test_by_alpha, official["ridge/test_r_per_alpha"], atol=1e-5)
    # The official intercept is penalised too: the sum of the targets over n + alpha.
    train = layout[0].train
    standard = (x[train] - x[train].mean(0)) / x[train].std(0)
    np.testing.assert_allclose(
        ridge_weights(standard, y[train], 10.0), official["ridge/ridge_alpha10_weights"][1:], atol=1e-5
    )
    intercept = y[train].sum(0) / (len(train) + 10)
    np.testing.assert_allclose(intercept, official["ridge/ridge_alpha10_weights"][0], atol=1e-5)


@pytest.mark.data
def test_official_bootstrap(official):
    x, y, indices = official["bootstrap/X"], official["bootstrap/Y"], official["bootstrap/indices"].astype(np.int64)
    np.random.seed(int(official["bootstrap/numpy_seed"]))
    assert np.array_equal(indices, [np.sort(np.random.randint(0, len(x), len(x))) for _ in indices])
    found = encode_resampled(x, y, indices, folds=int(official["bootstrap/folds"]))
    np.testing.assert_allclose(found.test, official["bootstrap/test_r"], atol=1e-5)
    np.testing.assert_allclose(found.validation, official["bootstrap/val_r"], atol=1e-5)


@pytest.mark.data
def test_official_false_discovery_rates_and_correlations(official):
    for case in ("bh", "bh_ties"):
        q = benjamini_hochberg(official[f"{case}/p"])
        np.testing.assert_allclose(q, official[f"{case}/q"], atol=1e-12)
        assert np.array_equal(q < 0.05, official[f"{case}/significant"])
    found = pearson(official["pearson/a"], official["pearson/b"])
    np.testing.assert_allclose(found, official["pearson/columnwise_r"], atol=1e-6)


@pytest.mark.parametrize("shape", [(80, 6), (80, 120)], ids=["tall", "wide"])
@pytest.mark.parametrize("alpha", [0.1, 100.0])
def test_it_equals_ridge_of_scikit_learn_fold_by_fold(shape, alpha):
    ridge = pytest.importorskip("sklearn.linear_model").Ridge
    x, y = numbers(n=shape[0], d=shape[1])
    expected = np.zeros((2, 4))
    folds = contiguous_folds(80, 4, gap=2)
    for fold in folds:
        mean, spread = x[fold.train].mean(0), x[fold.train].std(0)
        model = ridge(alpha=alpha).fit((x[fold.train] - mean) / spread, y[fold.train])
        for place, rows in enumerate((fold.validation, fold.test)):
            predicted = model.predict((x[rows] - mean) / spread)
            expected[place] += [np.corrcoef(predicted[:, t], y[rows, t])[0, 1] / len(folds) for t in range(4)]
    found = encode(x, y, folds, alphas=(alpha,))
    np.testing.assert_allclose([found.validation, found.test], expected, atol=1e-9)


def test_weights_in_their_limits():
    x, y = numbers(n=50)
    xc, yc = x - x.mean(0), y - y.mean(0)
    np.testing.assert_allclose(ridge_weights(x, y, 0.0), np.linalg.lstsq(xc, yc, rcond=None)[0], atol=1e-10)
    np.testing.assert_allclose(
        ridge_weights(x, y, 3.0), np.linalg.solve(xc.T @ xc + 3 * np.eye(6), xc.T @ yc), atol=1e-10
    )
    assert np.abs(ridge_weights(x, y, 1e12)).max() < 1e-9
    assert np.isfinite(ridge_weights(np.c_[x, x], y, 0.0)).all()


def test_shifts_and_scales_of_the_targets_change_nothing_and_signs_turn_with_them():
    x, y = numbers(noise=5.0)
    expected = encode(x, y)
    for other in (y + 7, 3 * y, -y):
        found = encode(x, other)
        np.testing.assert_allclose(found.test, expected.test, atol=1e-9)
        assert np.array_equal(found.alpha, expected.alpha)


def test_folds_by_hand():
    folds = contiguous_folds(100, 5)
    assert [fold.test.tolist() for fold in folds] == [list(range(10 + 20 * k, 20 + 20 * k)) for k in range(5)]
    assert [fold.validation.tolist() for fold in folds] == [list(range(20 * k, 10 + 20 * k)) for k in range(5)]
    for fold in folds:
        assert sorted([*fold.train, *fold.validation, *fold.test]) == list(range(100))
    assert contiguous_folds(100, 5, gap=3)[1].train.tolist() == [*range(17), *range(43, 100)]


def test_resamples_are_sorted_draws():
    found = sorted_resamples(500, 200)
    assert (np.diff(found, axis=1) >= 0).all() and found.min() >= 0 and found.max() < 500
    unique = np.mean([len(np.unique(row)) for row in found]) / 500
    assert unique == pytest.approx(0.632, abs=0.01)
    assert np.array_equal(found, sorted_resamples(500, 200)) and not np.array_equal(
        found, sorted_resamples(500, 200, seed=1)
    )
    blocks = sorted_resamples(500, 50, block=10)
    assert blocks.shape == (50, 500) and blocks.max() < 500
    # In blocks an event's right neighbour comes along nine times in ten, else as often as any event: 63 %.
    together = np.mean([np.isin(row + 1, row).mean() for row in blocks])
    assert 0.9 < together < 0.99


def test_smooth_noise_seems_predicted_where_folds_are_shuffled_and_is_not_in_blocks():
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(size=(400, 24)), axis=0)
    x, y = walk[:, :12], walk[:, 12:] - np.linspace(0, 1, 400)[:, None] * walk[-1:, 12:]
    assert encode(x, y, shuffled_folds(400)).test.mean() > 0.8
    assert abs(encode(x, y, contiguous_folds(400)).test.mean()) < 0.25


def test_constant_columns_and_predictions_score_0_and_no_nan_appears():
    x, y = numbers()
    expected = encode(x, y)
    np.testing.assert_allclose(encode(np.c_[x, np.ones(80)], y).test, expected.test, atol=1e-9)
    assert not encode(np.ones((80, 2)), y).test.any()
    y[:40, 0] = 3.0  # constant in the first blocks only
    found = encode(x, y)
    assert np.isfinite(found.test).all() and np.isfinite(found.validation).all()


def test_comparisons_by_hand():
    rng = np.random.default_rng(0)
    better, worse = 0.3 + 0.01 * rng.normal(size=(99, 6)), 0.1 + 0.01 * rng.normal(size=(99, 6))
    better[:, 2:4] = worse[:, 2:4]  # the second of three sites is predicted alike
    silent = np.full((99, 6), 0.2)
    silent[:, 4] = -0.1  # one bin of the third site is not predicted
    found = compare(Resampled(silent, better), Resampled(silent, worse), 3, min_bins=2)
    assert found.p[0] == 0.01 and found.p[1] == 1 and np.isnan(found.p[2])
    assert found.q.tolist()[:2] == [0.02, 1.0]
    assert found.significant().tolist() == [True, False, False]
    assert found.difference[0] == pytest.approx((better - worse)[:, :2].mean())
    np.testing.assert_allclose(benjamini_hochberg(np.array([0.01, 0.04, 0.03, 0.20])), [0.04, 0.16 / 3, 0.16 / 3, 0.2])


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (np.ones((40, 2)), np.ones((41, 2)), "they have 40 and 41"),
        (np.full((40, 2), np.nan), np.ones((40, 2)), "not finite"),
        (np.ones((40, 2)), np.ones((40, 2)), r"2 targets are constant.*columns \[0, 1\]"),
    ],
)
def test_what_cannot_be_encoded(x, y, words):
    with pytest.raises(EvaluationError, match=words):
        encode(x, y)


def test_too_few_events_and_bad_penalties():
    with pytest.raises(EvaluationError, match=r"5 folds need at least 30 events.*there are 20"):
        contiguous_folds(20)
    with pytest.raises(EvaluationError, match="A gap of 40"):
        contiguous_folds(60, gap=40)
    with pytest.raises(EvaluationError, match="above 0"):
        encode(*numbers(), alphas=(0.0, 1.0))
    assert ALPHAS == (0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
