import json
import math

import pytest
import torch

from diptych.errors import ConfigError
from diptych.losses.distill import (
    AbstractDistillation,
    check_settings,
    cross_entropy_of_views,
    moved_centre,
    soft_cross_entropy,
    teacher_distribution,
    used_share,
    warmed_up,
)


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_teacher_by_hand():
    found = teacher_distribution(torch.tensor([[1.0, 3.0]]), torch.tensor([0.0, 1.0]), 0.5)
    odds = math.exp((2 - 1) / 0.5)
    torch.testing.assert_close(found, torch.tensor([[1 / (1 + odds), odds / (1 + odds)]]))


def test_distributions_sum_to_one_and_carry_no_gradient():
    raw, centre = logits(3, 2, 7).requires_grad_(), logits(7, seed=1).requires_grad_()
    found = teacher_distribution(raw, centre, 0.04)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 2, dtype=torch.float64))
    assert not found.requires_grad


def test_pairs_of_views_as_in_a_double_loop():
    student, target = logits(3, 5, 6), logits(3, 2, 6, seed=1).softmax(-1)
    terms = []
    for x in range(2):
        for y in range(5):
            if x != y:
                terms.append(-(target[:, x] * (student[:, y] / 0.1).log_softmax(-1)).sum(-1))
    assert len(terms) == 2 * 4  # two global and three local views: 2 (3 + 1) pairs
    torch.testing.assert_close(cross_entropy_of_views(student, target, 0.1), torch.stack(terms).mean(0))


def test_equal_teacher_and_student_cost_the_entropy():
    raw = logits(4, 1, 9).expand(4, 3, 9)
    target = teacher_distribution(raw[:, :2], torch.zeros(9), 0.2)
    entropy = torch.special.entr(target[:, 0]).sum(-1)
    torch.testing.assert_close(cross_entropy_of_views(raw, target, 0.2), entropy)


def test_a_student_that_says_nothing_costs_log_k():
    target = logits(4, 2, 9).softmax(-1)
    found = cross_entropy_of_views(torch.full((4, 3, 9), 2.0, dtype=torch.float64), target, 0.1)
    torch.testing.assert_close(found, torch.full((4,), math.log(9), dtype=torch.float64))


def test_gradients():
    target = logits(2, 2, 5, seed=1).softmax(-1)
    student = logits(2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: cross_entropy_of_views(s, target, 0.3), student)


def test_fp32_inside_autocast():
    student, target = logits(2, 3, 50).float(), logits(2, 2, 50, seed=1).float().softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_entropy_of_views(student, target, 0.1)
        sharp = teacher_distribution(student, torch.zeros(50), 0.04)
    assert torch.equal(found, cross_entropy_of_views(student, target, 0.1))
    assert torch.equal(sharp, teacher_distribution(student, torch.zeros(50), 0.04))


@pytest.mark.parametrize(("momentum", "expected"), [(1.0, [1.0, 2.0]), (0.0, [3.0, 6.0]), (0.75, [1.5, 3.0])])
def test_the_centre_moves(momentum, expected):
    found = moved_centre(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0]), momentum)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_warm_up():
    assert [warmed_up(step, 0.04, 0.08, 4) for step in (0, 1, 4, 9)] == pytest.approx([0.04, 0.05, 0.08, 0.08])
    assert warmed_up(0, 0.04, 0.08, 0) == 0.08


def test_used_share():
    assert used_share(torch.eye(8)).item() == pytest.approx(1)  # each sample its own output
    assert used_share(torch.eye(8)[[3] * 8]).item() == 0
    assert used_share(torch.eye(4)[[0, 1] * 2]).item() == pytest.approx(0.5)


@pytest.mark.parametrize("case", ["distill_T2", "distill_T1", "distill_equal", "distill_f32"])
def test_official_soft_cross_entropy(golden, case):
    numbers = {name: torch.from_numpy(v) for name, v in golden("zscl", case).items() if name != "settings"}
    temperature = json.loads(str(golden("zscl", case)["settings"]))["T"]
    close = {"rtol": 1e-4, "atol": 1e-6} if case.endswith("f32") else {"rtol": 1e-8, "atol": 1e-12}
    for side, turn in (("image", lambda logits: logits), ("text", lambda logits: logits.T)):
        student = numbers["student_logits"].clone().requires_grad_()
        found = soft_cross_entropy(turn(student), turn(numbers["teacher_logits"]), temperature)
        (gradient,) = torch.autograd.grad(found, student)
        torch.testing.assert_close(found, numbers[f"loss_{side}"], **close)
        torch.testing.assert_close(gradient, numbers[f"grad_{side}"], **close)


def test_a_student_that_agrees_costs_the_entropy_and_gets_no_gradient():
    teacher = logits(5, 7)
    student = (teacher + 3.0).requires_grad_()
    found = soft_cross_entropy(student, teacher, 2.0)
    entropy = torch.special.entr((teacher / 2).softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(found, 4 * entropy)
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_a_student_that_says_nothing_costs_log_k_times_the_squared_temperature():
    found = soft_cross_entropy(torch.zeros(5, 7), logits(5, 7).float(), 2.0)
    assert found.item() == pytest.approx(4 * math.log(7), rel=1e-6)


def test_the_least_cost_is_where_the_distributions_agree():
    # The teacher's (0.6, 0.4): roles exchanged, the least would be at a student that is sure of the first output.
    teacher = torch.tensor([[0.6, 0.4]], dtype=torch.float64).log()
    shares = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    costs = torch.stack([soft_cross_entropy(torch.stack([p, 1 - p]).log()[None], teacher, 1.0) for p in shares])
    assert shares[costs.argmin()].item() == pytest.approx(0.6)
    assert costs.min().item() == pytest.approx(0.6730, abs=1e-4)


@pytest.mark.parametrize("wrong", [((1.0, -0.1), 2.0, 0.2), ((1.0, 1.0), 0.0, 0.2), ((1.0, 1.0), 2.0, 1.0)])
def test_settings_out_of_range_are_named(wrong):
    check_settings((0.0, 1.0), 2.0, 0.0)
    with pytest.raises(ConfigError, match="temperature > 0") as error:
        check_settings(*wrong)
    assert str(wrong[0]) in str(error.value)


@pytest.mark.parametrize(("image", "text", "expected"), [(0.0, 0.0, False), (1.0, 0.0, True), (0.0, 1.0, True)])
def test_a_teacher_has_a_say_where_a_weight_is_above_zero(image, text, expected):
    assert AbstractDistillation(image_weight=image, text_weight=text).distils is expected
