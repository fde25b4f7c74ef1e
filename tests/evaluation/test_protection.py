import numpy as np
import pytest
import torch

from diptych.data.sources import Listed
from diptych.errors import ConfigError, EvaluationError
from diptych.evaluation.protection import (
    Correct,
    measure_domains,
    measure_ownership,
    measure_protection,
    ownership,
    protection,
)
from diptych.models.seen import Labelled, Seen
from diptych.models.statistics import LayerStatistics
from diptych.types import Sample


def test_the_numbers_of_the_definition():
    found = protection(0.9, 0.9, 0.9, 0.1)
    assert (found.authorised_drop, found.unauthorised_drop, found.weighted) == pytest.approx((0.0, 0.8, 0.72))
    assert protection(0.9, 0.8, 0.6, 0.5).weighted == pytest.approx(0)  # both drop alike
    assert protection(0.7, 0.6, 0.7, 0.6).weighted == 0  # the plain model itself
    assert ownership(1.0, 0.8, 0.1) == pytest.approx(0.7)


def test_relative_drops_are_shares_of_the_plain_model():
    found = protection(0.8, 0.5, 0.6, 0.1, relative=True)
    assert (found.authorised_drop, found.unauthorised_drop) == pytest.approx((0.25, 0.8))
    assert found.weighted == pytest.approx(0.6 * 0.55)


@pytest.mark.parametrize("values", [(90.0, 0.5, 0.5, 0.5), (0.9, -0.1, 0.5, 0.5), (0.9, 0.9, float("nan"), 0.5)])
def test_accuracies_are_shares(values):
    with pytest.raises(EvaluationError, match="shares between 0 and 1, not percent"):
        protection(*values)


def test_a_relative_drop_from_nothing_is_refused():
    with pytest.raises(EvaluationError, match="right sometimes"):
        protection(0.5, 0.0, 0.5, 0.0, relative=True)


def correct(plain: float, protected: float, count: int, seed: int) -> Correct:
    rng = np.random.default_rng(seed)
    return Correct((rng.random(count) < plain).astype(float), (rng.random(count) < protected).astype(float))


def test_measured_values_are_those_of_the_accuracies():
    own, others = correct(0.9, 0.85, 80, 0), {"b": correct(0.8, 0.2, 60, 1), "c": correct(0.7, 0.3, 50, 2)}
    metrics = measure_protection(own, others).metrics
    pairs = {
        name: protection(own.plain.mean(), other.plain.mean(), own.protected.mean(), other.protected.mean())
        for name, other in others.items()
    }
    assert metrics["D_a"].value == pytest.approx(pairs["b"].authorised_drop)
    for name, pair in pairs.items():
        assert metrics[f"D_u/{name}"].value == pytest.approx(pair.unauthorised_drop)
        assert metrics[f"W_ua/{name}"].value == pytest.approx(pair.weighted)
    assert metrics["W_ua"].value == pytest.approx(np.mean([pair.weighted for pair in pairs.values()]))
    assert metrics["A_a/plain"].value == pytest.approx(own.plain.mean())
    assert all(interval.low <= interval.value <= interval.high for interval in metrics.values())
    assert measure_ownership(own, others["b"]).value == pytest.approx(
        ownership(others["b"].plain.mean(), own.protected.mean(), others["b"].protected.mean())
    )


def test_intervals_cover_the_truth_about_95_times_in_100():
    truth = protection(0.9, 0.8, 0.85, 0.3).weighted
    found = [
        measure_protection(correct(0.9, 0.85, 100, 2 * seed), {"u": correct(0.8, 0.3, 100, 2 * seed + 1)}).metrics[
            "W_ua"
        ]
        for seed in range(100)
    ]
    assert 0.88 <= np.mean([interval.low <= truth <= interval.high for interval in found]) <= 1


def test_a_measurement_needs_images_and_another_domain():
    one, empty = correct(1, 1, 4, 0), Correct(np.zeros(0), np.zeros(0))
    with pytest.raises(EvaluationError, match="no unauthorised one"):
        measure_protection(one, {})
    with pytest.raises(EvaluationError, match="at least one; there are 0 and 0"):
        measure_protection(one, {"u": empty})
    with pytest.raises(EvaluationError, match=r"same images.*4 and 3"):
        measure_protection(one, {"u": Correct(one.plain, one.plain[:3])})


class Judge:
    """Is right in these domains, and looks at images once."""

    def __init__(self, *domains: str) -> None:
        self.domains, self.looked = domains, []

    def exam(self, source) -> Labelled:
        self.looked.append(source.name)
        place = float("abc".index(source.without_image(0).domain))
        embedding = torch.full((len(source), 1), place)
        return Labelled(Seen(embedding, LayerStatistics((), ())), torch.zeros(len(source), dtype=torch.int64))

    def correct(self, data: Labelled) -> np.ndarray:
        return np.full(len(data), float("abc"[int(data.seen.embedding[0, 0])] in self.domains))


def test_two_classifiers_are_measured_on_the_same_images_of_every_domain():
    samples = [Sample(f"{name}{row}", None, (), name, "x", name) for name in "abc" for row in range(4)]
    source, plain, protected = Listed(samples, "all"), Judge("a", "b"), Judge("a")
    found = measure_domains(plain, protected, source, "a")
    right = {name: (np.full(4, float(name in "ab")), np.full(4, float(name == "a"))) for name in "abc"}
    expected = measure_protection(Correct(*right["a"]), {name: Correct(*right[name]) for name in "bc"})
    assert found.metrics == expected.metrics and found.metrics["W_ua/b"].value == 1
    assert (plain.looked, protected.looked) == ([], ["all:a", "all:b", "all:c"])
    with pytest.raises(ConfigError, match=r"no domain 'd'.*Known: a, b, c"):
        measure_domains(plain, protected, source, "d")
    with pytest.raises(EvaluationError, match="no unauthorised one"):
        measure_domains(plain, protected, Listed(samples[:4], "one"), "a")
