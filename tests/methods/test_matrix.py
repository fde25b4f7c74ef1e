"""Every objective with every kind of step and every mode of the towers: one matrix.

A cached step over two batches must give the gradient of one step over both, whatever the objective's loss looks at; frozen towers get
none, adapted ones only where they are adapted.
"""

from contextlib import nullcontext
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from diptych.data.loader import Loader
from diptych.data.sources import Listed
from diptych.data.transforms import ImagePolicy
from diptych.methods import METHODS, load_method
from diptych.models.text import TextConfig
from diptych.models.vision import VisionConfig
from diptych.training.prepare import make_model
from diptych.training.recipe import Recipe
from diptych.training.step import accumulate_gradients, cached_gradients
from diptych.types import Text, concatenate

OBJECTIVES = [slug for slug, method in METHODS.items() if method.verb == "objective" and method.state != "planned"]


@pytest.fixture
def source(drawings) -> Listed:
    roles = ("translation", "rewrite", "synthetic", "label")
    return Listed([replace(s, texts=(*s.texts, *(Text(f"{r} of {s.key}", r) for r in roles))) for s in drawings(12)])


def recipe_of(slug: str, mode: str) -> Recipe:
    mini = load_method(slug).mini()
    architecture = replace(
        mini.model.architecture,
        vision=VisionConfig(image_size=16, width=16, depth=1, heads=2, mlp_width=32),
        text=TextConfig(width=16, depth=1, heads=2, mlp_width=32),
        image_policy=ImagePolicy(size=16),
    )
    model = replace(
        mini.model, start="new", architecture=architecture, vocabulary=300, vision_mode=mode, text_mode=mode
    )
    return replace(mini, model=model, data=replace(mini.data, batch_size=6))


def gradients(objective: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    return found


@pytest.mark.parametrize("mode", ["full", "frozen", "lora"])
@pytest.mark.parametrize("slug", OBJECTIVES)
def test_matrix(slug, mode, source):
    recipe = recipe_of(slug, mode)
    objective = load_method(slug).Objective(make_model(recipe.model, source, seed=0), recipe.objective)
    objective.train()
    loader = Loader(source, objective.model.image_policy, objective.model.tokenizer, recipe.data)
    batches = list(islice(loader, 2))
    state = {name: value.clone() for name, value in objective.state_dict().items()}

    losses = accumulate_gradients(objective, batches, 2, nullcontext())
    accumulated = gradients(objective)
    assert len(losses) == 2 and accumulated and all(g.isfinite().all() for g in accumulated.values())

    def restart() -> None:
        objective.load_state_dict(state)  # running histories and statistics as they were
        torch.manual_seed(5)

    restart()
    encoded = concatenate([objective.encode(batch) for batch in batches])
    whole = objective.loss(encoded, concatenate([replace(batch, images=()) for batch in batches]))
    whole.total.backward()
    expected = gradients(objective)
    restart()
    (cached,) = cached_gradients(objective, batches + batches, 2, nullcontext())
    found = gradients(objective)
    assert cached.total.item() == pytest.approx(whole.total.item(), rel=1e-5)
    assert found.keys() == expected.keys() == accumulated.keys()
    largest = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * largest)

    in_towers = {name for name in found if name.startswith(("model.vision.", "model.text."))}
    if mode == "frozen":
        assert not in_towers
    elif mode == "lora":
        assert in_towers and all("lora_" in name for name in in_towers)
    else:
        assert len(in_towers) > 20
