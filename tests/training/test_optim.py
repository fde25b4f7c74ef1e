import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from diptych.errors import ConfigError
from diptych.training.optim import (
    OptimizerConfig,
    WeightAverage,
    blend,
    exponential,
    make_average,
    make_optimizer,
    schedule,
    set_learning_rate,
    uniform,
)


def test_schedule_by_hand():
    # 20 steps, 4 of warm-up, then 16 of cosine.
    factors = [schedule(step, 20, 0.2) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[8] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert factors[12] == pytest.approx(0.5)
    assert factors[19] == pytest.approx((1 + math.cos(math.pi * 15 / 16)) / 2)
    assert schedule(20, 20, 0.2) == 0
    assert all(a > b > 0 for a, b in pairwise(factors[4:]))


@pytest.mark.parametrize(
    ("total", "rate", "expected"),
    [(1, 0.05, [1]), (3, 0.0, [1, 1, 0.5]), (2, 1.0, [0.5, 1])],
    ids=["one step", "no warm-up", "nothing but warm-up"],
)
def test_schedule_of_short_runs(total, rate, expected):
    assert [schedule(step, total, rate) for step in range(total)] == pytest.approx(expected)


@pytest.fixture
def model(make_model):
    return make_model()


def rates(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, tuple[float, float]]:
    """Return learning rate and weight decay by name of parameter."""
    names = {id(p): name for name, p in module.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


def test_every_parameter_is_in_one_group_with_its_rate_and_decay(model):
    config = OptimizerConfig(lr=0.01, tower_lr_factor=0.1, weight_decay=0.3, betas=(0.8, 0.7), epsilon=1e-5)
    optimizer = make_optimizer(model, (model.vision, model.text), config)
    assert set_learning_rate(optimizer, 0.5) == pytest.approx(0.005)
    found = rates(optimizer, model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        lr, decay = found[name]
        assert lr == pytest.approx(0.0005 if name.startswith(("vision.", "text.")) else 0.005), name
        assert decay == (0.3 if parameter.ndim > 1 else 0.0), name
    assert {g["betas"] for g in optimizer.param_groups} == {(0.8, 0.7)}
    assert {g["eps"] for g in optimizer.param_groups} == {1e-5}


def test_no_decay_on_temperature_biases_and_norms(model):
    found = rates(make_optimizer(model, (), OptimizerConfig(weight_decay=0.3)), model)
    plain = [name for name, (_, decay) in found.items() if decay == 0]
    assert "log_scale" in plain
    assert {name for name in found if name.endswith(".bias")} <= set(plain)
    assert {name for name in found if "norm" in name} <= set(plain)
    assert [name for name in found if name.endswith("query.weight") and name in plain] == []


def test_frozen_parameters_are_left_out(model):
    model.vision.requires_grad_(False)
    optimizer = make_optimizer(model, (model.vision, model.text), OptimizerConfig(lr=1.0, tower_lr_factor=0.5))
    assert not any(name.startswith("vision.") for name in rates(optimizer, model))
    model.text.requires_grad_(False)
    optimizer = make_optimizer(model, (model.vision, model.text), OptimizerConfig(lr=1.0, tower_lr_factor=0.5))
    assert len(optimizer.param_groups) == 2  # empty groups are dropped
    assert set_learning_rate(optimizer, 1.0) == 1.0


def test_one_step_moves_decayed_weights_by_hand():
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, 2.0)
    nn.init.constant_(layer.bias, 2.0)
    optimizer = make_optimizer(layer, (), OptimizerConfig(lr=0.1, weight_decay=0.5, epsilon=0.0))
    layer.weight.grad, layer.bias.grad = torch.full((1, 1), 3.0), torch.full((1,), 3.0)
    set_learning_rate(optimizer, 1.0)
    optimizer.step()
    # Adam's first step is lr * sign(gradient); decay takes lr * decay * weight before it.
    assert layer.weight.item() == pytest.approx(2 - 0.1 * 0.5 * 2 - 0.1, abs=1e-5)
    assert layer.bias.item() == pytest.approx(2 - 0.1, abs=1e-5)


def moving(steps: int, layer: nn.Module, average: WeightAverage, seed: int = 0) -> list[torch.Tensor]:
    """Let the weights of a layer jump about, the average after them; return where they were."""
    generator = torch.Generator().manual_seed(seed)
    path = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        average.update(layer, step)
        path.append(layer.weight.detach().clone())
    return path


def test_average_equals_a_naive_loop():
    layer = nn.Linear(3, 2)
    expected, average = layer.weight.detach().double(), WeightAverage(layer, exponential(0.6))
    for step, weight in enumerate(moving(12, layer, average), 1):
        decay = min(0.6, (1 + step) / (10 + step))  # 2/11 at first; the cap ends at step 13
        expected = decay * expected + (1 - decay) * weight.double()
    torch.testing.assert_close(average.average["weight"].double(), expected, rtol=1e-6, atol=1e-6)


def test_the_cap_gives_way_to_the_decay():
    layer = nn.Linear(1, 1)
    average = WeightAverage(layer, exponential(0.6))
    for step, decay in ((1, 2 / 11), (12, 13 / 22), (13, 0.6), (1000, 0.6)):
        average.average["weight"].fill_(1.0)
        nn.init.constant_(layer.weight, 0.0)
        average.update(layer, step)
        assert average.average["weight"].item() == pytest.approx(decay, abs=1e-6)


def test_swap_exchanges_and_twice_is_nothing():
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    average = WeightAverage(layer, exponential(0.9))
    assert set(average.average) == {"weight"}
    weight = moving(5, layer, average)[-1]
    mean = average.average["weight"].clone()
    parameter = layer.weight
    average.swap(layer)
    assert torch.equal(layer.weight, mean) and torch.equal(average.average["weight"], weight)
    assert layer.weight is parameter and parameter.requires_grad  # the optimiser holds this very tensor
    average.swap(layer)
    assert torch.equal(layer.weight, weight) and torch.equal(average.average["weight"], mean)


def test_the_plain_mean_by_hand():
    # Snapshots 1, 2, ..., n of a weight that started at 0 have the mean n / 2.
    layer = nn.Linear(1, 1)
    nn.init.zeros_(layer.weight)
    average = WeightAverage(layer, uniform(3))
    for step in range(1, 16):
        nn.init.constant_(layer.weight, step / 3 if step % 3 == 0 else 99.0)
        average.update(layer, step)
        assert average.average["weight"].item() == pytest.approx(step // 3 / 2, abs=1e-6)


def test_the_mean_of_constant_weights_is_that_constant():
    layer = nn.Linear(5, 3)
    average = WeightAverage(layer, uniform(1))
    for step in range(1, 9):
        average.update(layer, step)
    assert torch.equal(average.average["weight"], layer.weight)


@pytest.mark.parametrize(("settings", "kept"), [({}, None), ({"ema_decay": 0.5}, 9 / 11), ({"mean_every": 1}, 1 / 2)])
def test_the_average_that_a_configuration_asks_for(settings, kept):
    average = make_average(nn.Linear(1, 1), OptimizerConfig(**settings))
    assert (None if average is None else average.share(1)) == (None if kept is None else pytest.approx(kept))


@pytest.mark.parametrize("settings", [{"mean_every": 0}, {"mean_every": 10, "ema_decay": 0.9}], ids=str)
def test_two_averages_at_once_are_refused(settings):
    with pytest.raises(ConfigError, match=r"mean_every.*takes the place of ema_decay"):
        OptimizerConfig(**settings)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_blending_two_models_by_hand(share):
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = (1 - share) * first.weight.detach() + share * second.weight.detach()
    theirs = second.weight.detach().clone()
    blend(first, second, share)
    torch.testing.assert_close(first.weight.detach(), expected)
    assert torch.equal(second.weight, theirs)


@pytest.mark.parametrize(
    "changes", [{"lr": -1.0}, {"warmup_rate": 3.0}, {"ema_decay": 2.0}, {"betas": (0.9, 1.5)}, {"epsilon": -1e-8}]
)
def test_settings_that_cannot_work(changes):
    with pytest.raises(ConfigError, match="optimizer needs lr, epsilon and weight_decay >= 0"):
        OptimizerConfig(**changes)
