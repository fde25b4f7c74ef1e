import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diptych.errors import EvaluationError
from diptych.evaluation import probe
from diptych.evaluation.probe import L2_GRID, linear_probe, nearest_neighbours


def blobs(n: int, seed: int, noise: float = 0.7) -> tuple[Tensor, Tensor]:
    """Return features around three fixed centres, and which centre."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    labels = torch.arange(n) % 3
    return normalize(centres[labels] + noise * torch.randn(n, 4, generator=generator), dim=-1), labels


def test_the_fit_is_that_of_scikit_learn():
    """Its objective is C * summed cross-entropy + |W|^2 / 2, ours mean cross-entropy + l2 |W|^2: C = 1 / (2 n l2)."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = blobs(120, 0)
    weight, bias = probe._fit(features, labels, 1e-3)
    theirs = linear_model.LogisticRegression(C=1 / (2 * 120 * 1e-3), tol=1e-10, max_iter=10_000)
    theirs.fit(features.double().numpy(), labels.numpy())
    test = blobs(50, 1)[0].double()
    ours = torch.softmax(test @ weight + bias, 1)
    np.testing.assert_allclose(ours, theirs.predict_proba(test.numpy()), rtol=0, atol=1e-5)


def test_the_probe_reads_what_the_features_hold_and_no_more():
    separable = linear_probe(*blobs(90, 0, noise=0.05), *blobs(60, 1, noise=0.05))
    assert (separable.accuracy.value, separable.accuracy.low) == (1.0, 0.025 ** (1 / 60))
    train, labels = blobs(600, 0)
    shuffled = labels[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    nothing = linear_probe(train, shuffled, *blobs(600, 1))
    assert nothing.accuracy.value < 0.45 and nothing.chance == pytest.approx(1 / 3, abs=1e-3)


def test_l2_is_chosen_without_the_test_samples():
    train = blobs(100, 0, noise=1.5)
    found = {linear_probe(*train, *blobs(50, seed, noise=1.5)).setting for seed in range(1, 4)}
    assert len(found) == 1 and found <= set(L2_GRID)


def test_l2_is_the_one_that_does_best_on_held_out_training_samples():
    """With one sample of ten in the second class, strong l2 names the first class always; weak l2 tells them apart."""
    labels = (torch.arange(200) % 10 == 0).long()
    features = torch.nn.functional.one_hot(labels).float()
    weight, bias = probe._fit(features, labels, L2_GRID[-1])
    assert (features.double() @ weight + bias).argmax(1).sum() == 0
    found = linear_probe(features, labels, features, labels)
    assert found.accuracy.value == 1.0 and found.setting < L2_GRID[-1]
    assert found.chance == 0.9


def test_neighbours_equal_a_naive_vote():
    (train, labels), (test, truth) = blobs(80, 0), blobs(40, 1)
    found = nearest_neighbours(train, labels, test, truth, k=7, temperature=0.1, chunk=16)
    for i in range(40):
        nearest = sorted(range(80), key=lambda j: -float(test[i] @ train[j]))[:7]
        votes = [0.0, 0.0, 0.0]
        for j in nearest:
            votes[labels[j]] += math.exp(float(test[i] @ train[j]) / 0.1)
        assert found.correct[i] == (int(np.argmax(votes)) == truth[i])
    assert found.setting == 7


def test_one_neighbour_equals_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    (train, labels), (test, truth) = blobs(80, 0), blobs(40, 1)
    theirs = neighbors.KNeighborsClassifier(1, metric="cosine").fit(train.numpy(), labels.numpy())
    found = nearest_neighbours(train, labels, test, truth, k=1)
    assert found.correct.tolist() == (theirs.predict(test.numpy()) == truth.numpy()).tolist()


def test_ties_do_not_depend_on_the_order_of_the_training_samples():
    train, labels = torch.eye(2)[[0, 0, 0, 1]], torch.tensor([0, 1, 1, 0])
    test, truth = (
        torch.eye(2)[:1],
        torch.tensor([1]),
    )  # three samples tie for one place: two of class 1 outvote one of class 0
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]):
        assert nearest_neighbours(train[order], labels[order], test, truth, k=1).correct.tolist() == [1.0]


def test_constant_features_name_the_most_frequent_class():
    labels = torch.tensor([0, 1, 1, 2])
    found = nearest_neighbours(torch.ones(4, 3), labels, torch.ones(5, 3), torch.tensor([1, 1, 0, 2, 1]))
    assert found.accuracy.value == found.chance == 0.6
    assert found.setting == 4  # as many neighbours as there are


@pytest.mark.parametrize("measure", [linear_probe, nearest_neighbours])
def test_undefined_input_is_refused(measure):
    features, labels = blobs(9, 0)
    with pytest.raises(EvaluationError, match="at least two classes"):
        measure(features, torch.zeros_like(labels), features, labels)
    with pytest.raises(EvaluationError, match="not finite"):
        measure(features, labels, features * torch.nan, labels)
