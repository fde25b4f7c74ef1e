import json
import math
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diptych.claims.claim import Trial
from diptych.claims.reproduce import check
from diptych.claims.train import train_quietly
from diptych.data.loader import Loader, LoaderConfig
from diptych.data.sources import Subset
from diptych.errors import ConfigError
from diptych.methods import clip, load_method
from diptych.methods.mod_x import Config, Objective, TwoModels, claim, divergence, mini, recipe, right_rows
from diptych.models.dual import MAX_LOG_SCALE
from diptych.types import Batch, TowerOutput

CASES = ["mixed", "all_right", "equal", "all_wrong", "float32"]


def unit(x: np.ndarray) -> Tensor:
    return F.normalize(torch.from_numpy(x), dim=-1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("case", CASES)
def test_official_numbers(golden, make_model, seen, case):
    numbers = golden("mod_x", case)
    close = {"rtol": 1e-4, "atol": 1e-6} if case == "float32" else {"rtol": 1e-8, "atol": 1e-12}
    objective = Objective(make_model().double(), Config(alpha=json.loads(str(numbers["settings"]))["alpha"]))
    objective.model.log_scale.data.fill_(float(numbers["log_scale"]))
    image, text = (torch.from_numpy(numbers[name]).clone().requires_grad_() for name in ("image", "text"))
    encoded = TwoModels(
        (F.normalize(image, dim=-1),),
        (F.normalize(text, dim=-1),),
        (unit(numbers["image_old"]), unit(numbers["text_old"])),
    )
    losses = objective.loss(encoded, seen(numbers["image"], range(len(image))))
    losses.total.backward()
    found = {
        "loss": losses.total,
        "loss_nce": losses.parts["contrastive"],
        "loss_cog": losses.parts["alignment"],
        "grad_image": image.grad,
        "grad_text": text.grad,
        "grad_log_scale": objective.model.log_scale.grad,
    }
    for name, value in found.items():
        np.testing.assert_allclose(value.detach(), numbers[name], **close, err_msg=name)
    for side, old in (("image", numbers["sim_old"]), ("text", numbers["sim_text_old"])):
        assert right_rows(torch.from_numpy(old)).tolist() == numbers[f"keep_{side}"].tolist()
        assert losses.parts[f"kept_{side}"].item() == pytest.approx(numbers[f"keep_{side}"].mean())


def test_a_whole_official_run(golden, toy, seen):
    numbers = golden("mod_x", "train")
    settings = json.loads(str(numbers["settings"]))
    model = toy(numbers)
    named = {
        "W_img": model.image_head.linear.weight,
        "W_txt": model.text_head.linear.weight,
        "log_scale": model.log_scale,
    }
    for step in range(settings["phases"] * settings["batches_per_phase"]):
        if step % settings["batches_per_phase"] == 0:
            objective = Objective(model, Config(alpha=settings["alpha"]))
            optimizer = torch.optim.AdamW(
                named.values(), betas=settings["betas"], eps=settings["eps"], weight_decay=settings["weight_decay"]
            )
        optimizer.param_groups[0]["lr"] = float(numbers["lr"][step])
        optimizer.zero_grad()
        losses = objective(with_texts(seen(numbers["images"][step], range(settings["batch"])), numbers["texts"][step]))
        losses.total.backward()
        optimizer.step()
        with torch.no_grad():
            model.log_scale.clamp_(0, 4.6052)
        assert losses.total.item() == pytest.approx(float(numbers["loss"][step]), rel=1e-8)
        assert losses.parts["alignment"].item() == pytest.approx(float(numbers["loss_cog"][step]), rel=1e-7, abs=1e-12)
        for side in ("image", "text"):
            assert losses.parts[f"kept_{side}"].item() == pytest.approx(numbers[f"keep_{side}"][step].mean())
        for name, parameter in named.items():
            np.testing.assert_allclose(parameter.detach(), numbers[f"theta_{name}"][step], rtol=1e-6, atol=1e-9)


def with_texts(batch: Batch, texts: np.ndarray) -> Batch:
    column = replace(batch.texts[0], output=TowerOutput(torch.from_numpy(texts)))
    return replace(batch, texts=(column,))


def test_the_filter_equals_a_loop_with_the_first_of_equals():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        cells = torch.randint(0, 4, (5, 5), generator=generator).float()  # full of ties
        naive = [row.tolist().index(max(row.tolist())) == i for i, row in enumerate(cells)]
        assert right_rows(cells).tolist() == naive


def test_two_pairs_by_hand(make_model, seen):
    sigma = 1 / (1 + math.exp(-1))
    row = sigma * math.log(2 * sigma) + (1 - sigma) * math.log(2 * (1 - sigma))
    assert row == pytest.approx(0.1109, abs=1e-4)
    assert divergence(torch.eye(2), torch.zeros(2, 2)).tolist() == pytest.approx([row, row], rel=1e-5)
    new = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0, 1.0]] * 2)
    encoded = TwoModels((new[0],), (new[1],), (torch.eye(2, 4), torch.eye(2, 4)))
    losses = Objective(make_model(), Config()).loss(encoded, seen(np.zeros((2, 1)), range(2)))
    assert losses.parts["alignment"].item() == pytest.approx(2 * row, rel=1e-5)
    mean = Objective(make_model(), Config(reduction="mean")).loss(encoded, seen(np.zeros((2, 1)), range(2)))
    assert mean.parts["alignment"].item() == pytest.approx(row, rel=1e-5)


def test_divergence_equals_the_library_and_without_the_diagonal_it_is_that_of_the_rest():
    old, new = random(6, 6), random(6, 6, seed=1)

    def naive(target: Tensor, found: Tensor) -> Tensor:
        return F.kl_div(found.log_softmax(1), target.softmax(1), reduction="none").sum(1)

    torch.testing.assert_close(divergence(old, new), naive(old, new))
    off = ~torch.eye(6, dtype=torch.bool)
    rest = naive(old[off].view(6, 5), new[off].view(6, 5))
    torch.testing.assert_close(divergence(old, new, diagonal=False), rest)


def test_turning_both_sides_alike_costs_nothing():
    image, text = random(7, 5), random(7, 5, seed=1)
    turn, _ = torch.linalg.qr(random(5, 5, seed=2))
    same = divergence(image @ text.T, (image @ turn) @ (text @ turn).T)
    assert same.abs().max() < 1e-12
    assert divergence(image @ text.T, (image @ turn) @ text.T).min() > 1e-4


def first_batch(source, model) -> Batch:
    return next(iter(Loader(source, model.image_policy, model.tokenizer, LoaderConfig(batch_size=6))))


@pytest.mark.parametrize("alpha", [0.0, 20.0])
def test_switched_off_it_is_clip_to_the_last_bit(make_model, drawings, alpha):
    ours, theirs = make_model(), make_model()
    objective, base = Objective(ours, Config(alpha=alpha)), clip.Objective(theirs, clip.Config())
    optimizers = [torch.optim.AdamW(o.model.parameters(), lr=1e-3) for o in (objective, base)]
    loader = iter(Loader(drawings(12), ours.image_policy, ours.tokenizer, LoaderConfig(batch_size=6)))
    for _ in range(3):
        batch = next(loader)
        for each, optimizer in zip((objective, base), optimizers, strict=True):
            optimizer.zero_grad()
            each(batch).total.backward()
            optimizer.step()
    equal = [torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True)]
    assert all(equal) == (alpha == 0)
    assert any(name.startswith("old.") for name in objective.state_dict()) == (alpha > 0)


def test_the_old_model_itself_costs_nothing_more_than_clip(make_model, drawings):
    objective = Objective(make_model(), Config())
    losses = objective(first_batch(drawings(12), objective.model))
    assert losses.parts["alignment"].item() == pytest.approx(0, abs=1e-6)
    trained = [p for p in objective.parameters() if p.requires_grad]
    for gradient in torch.autograd.grad(losses.parts["alignment"], trained, allow_unused=True):
        assert gradient is None or gradient.abs().max() < 1e-6


def test_an_old_model_that_is_wrong_everywhere_says_nothing(make_model, drawings):
    objective = Objective(make_model(), Config())
    batch = first_batch(drawings(12), objective.model)
    encoded = objective.encode(batch)
    wrong = TwoModels(encoded.images, encoded.texts, (encoded.texts[0].detach(), -encoded.texts[0].detach()))
    losses = objective.loss(wrong, batch)
    assert losses.parts["kept_image"] == losses.parts["kept_text"] == losses.parts["alignment"] == 0
    assert losses.total == losses.parts["contrastive"]
    kept = Objective(make_model(), Config(filter=False)).loss(wrong, batch)
    assert kept.parts["alignment"] > 0


def test_the_scale_is_trained_and_clamped(make_model, drawings):
    objective = Objective(make_model(), Config())
    batch = first_batch(drawings(12), objective.model)
    objective(batch).total.backward()
    assert objective.model.log_scale.grad is not None
    objective.model.log_scale.data.fill_(9.0)
    high = objective(batch).total
    objective.model.log_scale.data.fill_(MAX_LOG_SCALE)
    assert objective(batch).total == high


def test_misplaced_targets_cost_more(make_model, drawings):
    right, wrong = (Objective(make_model(), Config(filter=False, control=it)) for it in (None, "misplaced"))
    batch = first_batch(drawings(12), right.model)
    assert wrong(batch).parts["alignment"] > right(batch).parts["alignment"]


def test_a_random_old_model_says_other_things(make_model, drawings):
    right, random = (Objective(make_model(), Config(control=it)) for it in (None, "random"))
    batch = first_batch(drawings(12), right.model)
    assert (
        right(batch).parts["alignment"] < 1e-6 < random(batch).parts["alignment"]
        or random(batch).parts["kept_image"] == 0
    )
    assert not torch.allclose(right.encode(batch).old[0], random.encode(batch).old[0])


@pytest.mark.parametrize("settings", [{"alpha": -1.0}, {"scale": 0.0}], ids=str)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=r"alpha must be >= 0 and objective\.scale > 0"):
        Config(**settings)


def test_the_recipe_has_the_values_of_the_script():
    base = recipe()
    assert (base.objective, base.data.batch_size, base.epochs) == (Config(alpha=20.0), 280, 35)
    assert (base.optimizer.weight_decay, base.optimizer.warmup_rate) == (0.1, 0.2)
    assert mini().objective.alpha == pytest.approx(20 * 280 / mini().data.batch_size, rel=0.01)


def test_the_claim_is_well_formed_and_its_control_can_fail():
    found = claim()
    assert [one.name for one in found] == ["photos"]
    check(found, "mod_x")
    numbers = {"baseline": [0.1, 0.1, 0.1], "method": [0.5, 0.5, 0.5], "control": [0.2, 0.2, 0.2]}
    assert all(one.control.passed(numbers) for one in found)
    assert not any(one.control.passed(numbers | {"control": [0.4, 0.4, 0.4]}) for one in found)


@pytest.mark.slow
@pytest.mark.data
def test_every_arm_of_the_claim_runs(data):
    pytest.importorskip("resvg_py")
    trained = []

    def train(settings, source, model):
        small = Subset(source, range(20), source.name)
        settings = replace(settings, epochs=1, data=replace(settings.data, batch_size=10))
        trained.append(settings)
        return train_quietly(settings, small, load_method(settings.method), seed=0, model=model)[0]

    (one,) = claim()
    for arm in one.arms:
        value = arm.run(Trial(0, "test", arm.grid[0], lambda slug: load_method(slug).mini(), train))
        assert 0 <= value <= 1, arm.name
    assert len(trained) == 7 * 5 + 1
    assert len({(s.epochs, s.data, s.optimizer.lr, s.model) for s in trained}) == 1


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("resvg_py")
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "mod_x.py"))
    example["main"](epochs=1)
    said = capsys.readouterr().out
    assert said.count("of the emoji that it found are still found.") == 2
    assert (tmp_path / "runs/slices/Mod-X/trace.json").exists()
