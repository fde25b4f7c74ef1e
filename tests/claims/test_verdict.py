import numpy as np
import pytest

from diptych.claims.verdict import decide, over_seeds, paired_over_seeds, student_t
from diptych.errors import EvaluationError
from diptych.types import Interval


@pytest.mark.parametrize(
    ("low", "high", "passed", "verdict"),
    [
        (0.01, 0.05, True, "reproduced"),
        (0.01, 0.05, False, "not reproduced"),  # it wins, but so does what must not
        (-0.05, -0.01, True, "not reproduced"),
        (-0.05, -0.01, False, "not reproduced"),
        (-0.01, 0.05, True, "inconclusive"),
        (-0.01, 0.05, False, "inconclusive"),
        (0.0, 0.05, True, "inconclusive"),  # an end at 0 excludes nothing
        (-0.05, 0.0, True, "inconclusive"),
        (0.0, 0.0, True, "inconclusive"),
    ],
)
def test_every_branch_of_the_rule_in_both_directions(low, high, passed, verdict):
    assert decide(Interval((low + high) / 2, low, high), control_passed=passed) == verdict
    turned = Interval(-(low + high) / 2, -high, -low)
    assert decide(turned, control_passed=passed, higher_is_better=False) == verdict


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (30, 2.04227)])
def test_student_t_is_that_of_the_tables(freedom, value):
    assert student_t(freedom) == pytest.approx(value, rel=1e-5)


def test_student_t_agrees_with_scipy_at_other_levels():
    t = pytest.importorskip("scipy.stats").t
    for freedom in (1, 2, 3, 7, 100):
        for level in (0.5, 0.9, 0.99):
            assert student_t(freedom, level) == pytest.approx(t.ppf(0.5 + level / 2, freedom), rel=1e-5)


def test_interval_of_three_numbers_by_hand():
    found = over_seeds([1.0, 2.0, 3.0])  # s = 1, so half of it is 4.30265 / sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((2, 2 - 2.484138, 2 + 2.484138), abs=1e-6)
    assert over_seeds([0.5, 0.5, 0.5]) == Interval(0.5, 0.5, 0.5)


def test_the_interval_holds_the_truth_in_95_of_100_cases():
    rng = np.random.default_rng(0)
    hits = [abs((x := rng.normal(size=3)).mean()) <= over_seeds(x.tolist()).high - x.mean() for _ in range(1000)]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.02)


def test_pairing_takes_out_what_a_seed_does_to_both():
    baseline, method = [0.1, 0.5, 0.9], [0.2, 0.6, 1.0]
    found = paired_over_seeds(baseline, method)
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    turned = paired_over_seeds(method, baseline)
    assert turned.value == pytest.approx(-0.1)


def test_too_few_or_unequal_seeds():
    with pytest.raises(EvaluationError, match="the baseline has 3, the method 2"):
        paired_over_seeds([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(EvaluationError, match="at least two of them; there are 1"):
        over_seeds([1.0])
