import pytest
import torch
from torch import nn

from diptych.models.teacher import Frozen, Teacher, shuffled


def student() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_it_follows_the_average():
    one = student()
    teacher = Teacher(one)
    before = [p.clone() for p in teacher.module.parameters()]
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(1)
    teacher.follow(one, 0.75)
    for old, now in zip(before, teacher.module.parameters(), strict=True):
        torch.testing.assert_close(now, old + 0.25)


@pytest.mark.parametrize(("momentum", "same_as"), [(1.0, "before"), (0.0, "student")])
def test_limits(momentum, same_as):
    one = student()
    teacher = Teacher(one)
    before = [p.clone() for p in teacher.module.parameters()]
    with torch.no_grad():
        one[0].weight.mul_(3)
    teacher.follow(one, momentum)
    expected = before if same_as == "before" else list(one.parameters())
    for wanted, now in zip(expected, teacher.module.parameters(), strict=True):
        torch.testing.assert_close(now, wanted)


def test_it_is_never_trained_and_shares_no_storage():
    one = student()
    teacher = Teacher(one)
    assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        one[0].weight.zero_()
    assert teacher.module[0].weight.abs().sum() > 0


def test_buffers_are_copied_on_request():
    one = student()
    kept, copied = Teacher(one), Teacher(one)
    one.train()(torch.randn(8, 3))
    kept.follow(one, 0.9, buffers=False)
    copied.follow(one, 0.9)
    assert torch.equal(copied.module[1].running_mean, one[1].running_mean)
    assert torch.equal(kept.module[1].running_mean, torch.zeros(2))


def test_a_frozen_copy_stays_what_it_was():
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    objective = nn.ModuleList([student, copy := Frozen(student)])
    objective.train()
    before = {name: value.clone() for name, value in copy.state_dict().items()}
    assert not any(module.training for module in copy.modules()) and student.training
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    x = torch.randn(8, 3)
    with torch.no_grad():
        student[0].weight.add_(1.0)
        assert torch.equal(copy.module(x), copy.module(x))
    assert all(torch.equal(value, before[name]) for name, value in copy.state_dict().items())
    assert {name for name in objective.state_dict() if name.startswith("1.")} == {f"1.{name}" for name in before}


def test_a_shuffled_copy_has_the_same_numbers_in_other_places():
    one = student()
    before = [parameter.clone() for parameter in one.parameters()]
    other, again = (shuffled(one, torch.Generator().manual_seed(0)) for _ in range(2))
    assert all(torch.equal(old, now) for old, now in zip(before, one.parameters(), strict=True))
    assert not torch.equal(other[0].weight, one[0].weight) and torch.equal(other[0].weight, again[0].weight)
    assert torch.equal(other[0].weight.flatten().sort().values, one[0].weight.flatten().sort().values)
