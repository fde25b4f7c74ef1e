import math

import numpy as np
import pytest
import torch
from torch.nn.functional import batch_norm, normalize

from diptych.losses.selfsup import cosine_regression, redundancy_reduction, sinkhorn, soft_cross_entropy


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cosine_regression_is_the_squared_distance_of_unit_vectors():
    prediction, target = normal(5, 3), normal(5, 3, seed=1)
    squared = (normalize(prediction, dim=-1) - normalize(target, dim=-1)).square().sum(1).mean()
    assert cosine_regression(prediction, target).item() == pytest.approx(squared.item(), rel=1e-12)
    assert cosine_regression(target * 7, target).item() == pytest.approx(0, abs=1e-12)
    assert cosine_regression(-target, target).item() == pytest.approx(4)


def test_targets_of_the_cosine_get_no_gradient():
    prediction, target = normal(5, 3).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    cosine_regression(prediction, target).backward()
    assert target.grad is None
    assert prediction.grad.abs().sum() > 0
    torch.testing.assert_close((prediction.grad * prediction).sum(1), torch.zeros(5).double())  # length has no effect


def test_redundancy_reduction_equals_a_double_loop():
    first, second = normal(4, 3), normal(4, 3, seed=1)
    expected = 0.0
    for i in range(3):
        for j in range(3):
            r = sum(float(first[n, i] * second[n, j]) for n in range(4)) / 4
            expected += (r - 1) ** 2 if i == j else 0.3 * r**2
    assert redundancy_reduction(first, second, off_diagonal_weight=0.3).item() == pytest.approx(expected, rel=1e-12)


def test_redundancy_reduction_of_decorrelated_equal_features_is_zero():
    basis, _ = torch.linalg.qr(normal(8, 4))
    features = basis * 8**0.5
    assert redundancy_reduction(features, features).item() == pytest.approx(0, abs=1e-12)


def test_redundancy_reduction_of_independent_features_is_as_expected():
    n, d = 64, 16
    found = []
    for seed in range(200):
        first, second = (batch_norm(normal(n, d, seed=2 * seed + i), None, None, training=True) for i in range(2))
        found.append(redundancy_reduction(first, second).item())
    # E R_ij^2 = 1 / (n - 1) once means are taken off, up to the epsilon of the norm.
    expected = d * (1 + 1 / (n - 1)) + 5e-3 * d * (d - 1) / (n - 1)
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / 200**0.5)


def test_redundancy_reduction_has_exact_gradients():
    inputs = normal(5, 3).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(redundancy_reduction, inputs)


def test_sinkhorn_equals_scaling_rows_and_columns_in_turn():
    scores = normal(5, 7) / 3
    q = (scores / 0.05).exp().numpy()
    for _ in range(3):
        q = q / q.sum(0, keepdims=True) / 7
        q = q / q.sum(1, keepdims=True) / 5
    torch.testing.assert_close(sinkhorn(scores), torch.tensor(q * 5), rtol=1e-10, atol=1e-14)


def test_sinkhorn_ends_with_even_columns():
    found = sinkhorn(normal(6, 4) / 3, epsilon=0.2, iterations=200)
    torch.testing.assert_close(found.sum(1), torch.ones(6).double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.sum(0), torch.full((4,), 6 / 4).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(sinkhorn(torch.full((3, 4), 0.7)), torch.full((3, 4), 0.25))


def test_sinkhorn_neither_overflows_nor_learns():
    scores = (100 * normal(4, 4)).float().requires_grad_()
    found = sinkhorn(scores, epsilon=1e-3)
    assert found.isfinite().all() and not found.requires_grad
    torch.testing.assert_close(found.sum(1), torch.ones(4))


def test_soft_cross_entropy():
    logits, target = normal(5, 3), normal(5, 3, seed=1).softmax(-1)
    expected = -(target * logits.log_softmax(-1)).sum(-1).mean()
    assert soft_cross_entropy(logits, target).item() == pytest.approx(expected.item(), rel=1e-12)
    assert soft_cross_entropy(torch.zeros(5, 3), target.float()).item() == pytest.approx(math.log(3))


def test_all_of_them_are_fp32_under_autocast():
    first, second = normal(8, 16).float(), normal(8, 16, seed=1).float()
    losses = (
        cosine_regression,
        redundancy_reduction,
        lambda a, b: sinkhorn(a).sum(1).mean() + sinkhorn(b)[0, 0],
        lambda a, b: soft_cross_entropy(a, b.softmax(-1)),
    )
    for loss in losses:
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(first, second)
        assert found.dtype == torch.float32 and torch.equal(found, loss(first, second))
