"""What every objective in the table must do. A method that is added later is covered by its row."""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diptych.config import fingerprint, from_json, override, to_json
from diptych.data.loader import Loader
from diptych.data.sources import Listed
from diptych.methods import METHODS, load_method
from diptych.models.checkpoint import load_model, save_model
from diptych.models.pgd import PGDConfig
from diptych.training.hardening import harden
from diptych.training.optim import make_optimizer, set_learning_rate
from diptych.training.prepare import make_model
from diptych.training.recipe import Recipe
from diptych.types import Batch, Encoded, Text, concatenate, map_tensors, rows
from diptych.verbs import AbstractObjective
from tiny_run import with_tiny_towers

OBJECTIVES = [slug for slug, method in METHODS.items() if method.verb == "objective" and method.state != "planned"]

CHANCE: dict[str, Callable[[int], float]] = {
    "clip": math.log,
    "alip": lambda n: 2 * math.log(n),  # two texts; no weights before the first training batch
    "clippings": math.log,
    "fdt": math.log,
    "laclip": math.log,
    "siglip": lambda n: n * math.log(2),
    "improved_baselines": math.log,
    "rs_m_clip": lambda n: math.log(n) + math.log(512),  # its small head has 512 outputs
    "zscl": lambda n: 9 * math.log(n),  # pairs; twice T^2 = 4 for the batch's texts and its images
    "vr_lwf": lambda n: 5 * math.log(n) + 4 * math.log(256),  # its small head has 256 sentences
    "mod_x": math.log,
}
"""The loss of n samples whose logits are all 0. A new method needs a line here."""

SIZE = 8


@pytest.fixture(params=OBJECTIVES)
def slug(request) -> str:
    return request.param


@pytest.fixture
def method(slug) -> ModuleType:
    return load_method(slug)


@pytest.fixture
def source(drawings) -> Listed:
    """Return drawn samples with a text of every role, so that any text column finds its own."""
    roles = ("translation", "rewrite", "synthetic", "hard_negative", "label")
    return Listed(
        [
            replace(s, texts=(*s.texts, *(Text(f"{role} of {s.texts[0].text}", role) for role in roles)))
            for s in drawings(12)
        ]
    )


@pytest.fixture
def recipe(method) -> Recipe:
    """Return the method's small recipe on tiny towers, all of them trained; its heads and temperature are its own."""
    mini = method.mini()
    architecture = with_tiny_towers(mini.model.architecture)
    model = replace(
        mini.model, start="new", architecture=architecture, vocabulary=300, vision_mode="full", text_mode="full"
    )
    return replace(mini, model=model, data=replace(mini.data, batch_size=SIZE))


@pytest.fixture
def objective(method, recipe, source) -> AbstractObjective[Encoded]:
    model = make_model(recipe.model, source, seed=0)
    return method.Objective(model, recipe.objective)


@pytest.fixture
def batch(objective, recipe, source) -> Batch:
    model = objective.model
    return next(iter(Loader(source, model.image_policy, model.tokenizer, recipe.data, seed=0)))


def tensors(record: object) -> list[Tensor]:
    """Return every tensor of a record, in order."""
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, record)
    return found


def test_encode_is_per_sample(objective, batch):
    objective.eval()
    with torch.no_grad():
        whole = objective.encode(batch)
        halves = concatenate([objective.encode(rows(batch, 0, 3)), objective.encode(rows(batch, 3, SIZE))])
    assert tensors(whole) and type(halves) is type(whole)
    for found, expected in zip(tensors(halves), tensors(whole), strict=True):
        assert len(expected) == SIZE
        torch.testing.assert_close(found, expected)


def test_the_loss_does_not_need_the_pixels(objective, batch):
    objective.eval()
    encoded = objective.encode(batch)
    assert objective.loss(encoded, replace(batch, images=())).total == objective.loss(encoded, batch).total


def test_every_objective_can_be_hardened_and_is_as_before(objective, batch):
    state = {name: value.clone() for name, value in objective.state_dict().items()}
    generator = torch.get_rng_state()
    made = harden(objective, batch, PGDConfig(8.0, 1, 1.0), nullcontext(), seed="0")
    for view, clean in zip(made.images, batch.images, strict=True):
        assert ((view - clean / 255).abs() <= 8 / 255 + 1e-6).all() and not torch.equal(view, clean / 255)
    assert all(torch.equal(value, state[name]) for name, value in objective.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in objective.parameters())


def test_the_order_of_samples_does_not_matter(objective, batch):
    objective.eval()
    order = torch.tensor([3, 0, 7, 5, 1, 2, 6, 4])
    with torch.no_grad():
        encoded = objective.encode(batch)
        shuffled = replace(
            map_tensors(lambda tensor: tensor[order], batch), keys=tuple(batch.keys[i] for i in order.tolist())
        )
        found = objective.loss(map_tensors(lambda tensor: tensor[order], encoded), shuffled)
        expected = objective.loss(encoded, batch)
    torch.testing.assert_close(found.total, expected.total)
    for name, part in expected.parts.items():
        torch.testing.assert_close(found.parts[name], part)


def test_pairs_that_do_not_belong_together_cost_more_once_trained(objective, recipe, batch):
    train(objective, recipe, batch, steps=40, factor=10.0)
    objective.eval()
    shifted = replace(batch, texts=tuple(map_tensors(lambda t: t.roll(1, 0), column) for column in batch.texts))
    with torch.no_grad():
        assert objective(batch).total < objective(shifted).total - 1e-3


def train(
    objective: AbstractObjective[Encoded], recipe: Recipe, batch: Batch, steps: int, factor: float = 1.0
) -> list[float]:
    """Take steps on one batch at `factor` times the learning rate; return the losses before each, and after the last."""
    objective.train()
    optimizer = make_optimizer(objective, (objective.model.vision, objective.model.text), recipe.optimizer)
    set_learning_rate(optimizer, factor)
    losses = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        total = objective(batch).total
        total.backward()
        losses.append(total.item())
        for name, parameter in objective.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"{name} gets no gradient"
                assert parameter.grad.isfinite().all(), f"{name} has a gradient that is not finite"
        optimizer.step()
        objective.after_step(step)
    with torch.no_grad():
        return [*losses, objective(batch).total.item()]


def test_three_steps_reach_every_parameter_and_lower_the_loss(objective, recipe, batch):
    before = {name: p.detach().clone() for name, p in objective.named_parameters() if p.requires_grad}
    losses = train(objective, recipe, batch, steps=3)
    assert losses[-1] < losses[0]
    after = dict(objective.named_parameters())
    assert [name for name, value in before.items() if torch.equal(after[name], value)] == []


def test_the_total_is_made_of_parts_that_can_be_logged(objective, batch):
    losses = objective(batch)
    assert losses.parts
    for part in losses.parts.values():
        assert part.ndim == 0 and part.isfinite()


def test_a_saved_model_gives_the_same_embeddings(objective, recipe, batch, tmp_path):
    train(objective, recipe, batch, steps=1)
    objective.eval()
    save_model(objective.model, tmp_path)
    model = load_model(tmp_path)
    assert model.config == objective.model.config
    with torch.no_grad():
        for encode, given in (("encode_image", batch.images[0]), ("encode_text", batch.texts[0])):
            assert torch.equal(getattr(model, encode)(given), getattr(objective.model, encode)(given))


def test_the_loss_is_at_chance_when_logits_say_nothing(slug, objective, batch):
    assert slug in CHANCE, f"say in CHANCE what the loss of {slug} is at chance"
    objective.eval()

    def noise(shape: torch.Size) -> Tensor:  # the same each time, so that teachers say what their students say
        return normalize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), dim=-1)

    with torch.no_grad():
        for name, parameter in objective.named_parameters():  # some have a second scale
            if name.endswith("log_scale"):
                parameter.fill_(-20.0)
            if name.endswith("prototypes"):  # of a loss that `encode` returns per sample
                parameter.fill_(0.0)
        if objective.model.bias is not None:
            objective.model.bias.fill_(0.0)
        encoded = map_tensors(
            lambda t: noise(t.shape) if t.is_floating_point() and t.ndim > 1 else t, objective.encode(batch)
        )
        assert objective.loss(encoded, batch).total.item() == pytest.approx(CHANCE[slug](SIZE), rel=1e-4)


def test_recipes_survive_json(method, slug):
    for recipe in (method.recipe(), method.mini()):
        assert recipe.method == slug
        written = json.loads(json.dumps(to_json(recipe)))
        assert from_json(Recipe, written, of=(method.Config,)) == recipe
        for base in (method.recipe(), method.mini()):
            read = override(base, written)
            assert read == recipe and fingerprint(read) == fingerprint(recipe)


def test_settings_of_the_objective_can_be_overridden(method):
    recipe = method.recipe()
    changed = override(recipe, {"epochs": recipe.epochs + 1, "objective": to_json(method.Config())})
    assert changed.epochs == recipe.epochs + 1
    assert type(changed.objective) is method.Config and changed.objective == method.Config()


def test_a_method_added_later_is_covered():
    assert {"clip", "siglip"} <= set(OBJECTIVES)
    planned = {slug for slug, method in METHODS.items() if method.state == "planned"}
    others = {slug for slug, method in METHODS.items() if method.verb != "objective"}
    assert set(OBJECTIVES) | planned | others == set(METHODS)
