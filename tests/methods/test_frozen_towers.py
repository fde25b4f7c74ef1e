"""Methods on frozen towers: each tower sees a sample once, and loss and gradients stay what they were."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diptych import files
from diptych.config import override
from diptych.data.loader import CacheConfig, Loader
from diptych.data.sources import Listed
from diptych.data.text_changes import TextChange
from diptych.data.transforms import Augment
from diptych.methods import load_method
from diptych.models.modes import train_mode
from diptych.models.text import AbstractTextTower
from diptych.models.vision import AbstractVisionTower
from diptych.training.features import use_cache
from diptych.training.prepare import make_model
from diptych.training.recipe import Recipe
from diptych.types import Batch
from diptych.verbs import AbstractObjective
from tiny_run import with_roles, with_tiny_towers

CASES = {
    "clip": ("clip", {}),
    "siglip": ("siglip", {}),
    "fdt": ("fdt", {}),
    "alip": ("alip", {}),
    "laclip": ("laclip", {}),
    "rs_m_clip": ("rs_m_clip", {}),
    "rs_m_clip without distillation": ("rs_m_clip", {"distillation_weight": 0.0}),
    "zscl": ("zscl", {}),
    "vr_lwf": ("vr_lwf", {}),
    "mod_x": ("mod_x", {}),
    "improved_baselines": ("improved_baselines", {}),
    "improved_baselines with a teacher": ("improved_baselines", {"extra": "byol"}),
}


@pytest.fixture
def source(drawings) -> Listed:
    return with_roles(drawings(12))


def recipe_of(slug: str, changes: dict) -> Recipe:
    """Return a method's small recipe with frozen towers, and with nothing random in its views and texts."""
    mini = override(load_method(slug).mini(), {"objective": changes})
    architecture = with_tiny_towers(mini.model.architecture)
    modes = {"vision_mode": "frozen", "text_mode": "frozen"}
    model = replace(mini.model, start="new", architecture=architecture, vocabulary=300, **modes)
    seen = mini.data.views[:2] if changes.get("distillation_weight") == 0 else mini.data.views
    views = tuple(Augment(size=None if place < 2 else 8) for place in range(len(seen)))
    texts = tuple(replace(column, change=TextChange()) for column in mini.data.texts)
    return replace(mini, model=model, data=replace(mini.data, batch_size=6, views=views, texts=texts))


def one_step(objective: AbstractObjective, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    state = {name: value.clone() for name, value in objective.state_dict().items()}
    torch.manual_seed(5)
    total = objective(batch).total
    total.backward()
    found = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    objective.load_state_dict(state)
    return total.detach(), found


@pytest.mark.parametrize("case", CASES)
def test_a_frozen_tower_sees_a_sample_once(case, source, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "feature_folder", lambda: tmp_path)
    slug, changes = CASES[case]
    recipe = recipe_of(slug, changes)
    objective = load_method(slug).Objective(make_model(recipe.model, source, seed=0), recipe.objective)
    train_mode(objective)
    model = objective.model
    off = replace(recipe.data, cache=CacheConfig(mode="off"))
    plain, loader = (Loader(source, model.image_policy, model.tokenizer, data) for data in (off, recipe.data))
    use_cache(objective, loader, "fp32", draws=10_000, say=lambda sentence: None)
    assert all(loader.maker.cached.views) and all(loader.maker.cached.texts)

    calls: list[str] = []
    for name, module in objective.named_modules():
        if isinstance(module, AbstractVisionTower | AbstractTextTower):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    for _, cached, batch in zip(range(5), loader, plain, strict=False):
        calls.clear()
        total, gradients = one_step(objective, cached)
        assert calls == []  # nor is the tower of a teacher, which is the same
        expected, expected_gradients = one_step(objective, batch)
        assert {"model.vision", "model.text"} <= set(calls)
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
        assert gradients.keys() == expected_gradients.keys() and gradients
        largest = max(value.abs().max().item() for value in expected_gradients.values())
        for name, value in expected_gradients.items():
            torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-5 * largest, msg=name)
