"""Every objective with every kind of step and every mode of the towers: one matrix.

A cached step over two batches must give the gradient of one step over both, whatever the objective's loss looks at; frozen towers get
none, adapted ones only where they are adapted. Two processes must take the step of one, with whole and with sharded towers.
"""

import pickle
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diptych.config import override
from diptych.data.loader import Loader
from diptych.data.sources import Listed
from diptych.methods import METHODS, load_method
from diptych.training import distributed
from diptych.training.prepare import make_loader, make_model
from diptych.training.recipe import Recipe
from diptych.training.step import STEPS, accumulate_gradients, cached_gradients
from diptych.types import concatenate
from processes import finish, launch
from tiny_run import with_roles, with_tiny_towers

OBJECTIVES = [slug for slug, method in METHODS.items() if method.verb == "objective" and method.state != "planned"]


@pytest.fixture
def source(drawings) -> Listed:
    return with_roles(drawings(12))


def recipe_of(slug: str, mode: str) -> Recipe:
    mini = load_method(slug).mini()
    architecture = with_tiny_towers(mini.model.architecture)
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


# Dropout cannot be the same in two processes as in one: each draws its own numbers. It is switched off here, where a recipe has it.
VARIANTS: dict[str, dict[str, Any]] = {
    **{slug: {} for slug in OBJECTIVES},
    "improved_baselines": {"text_dropout": 0.0},
    "improved_baselines, BYOLIP": {"text_dropout": 0.0, "extra": "byol"},
    "zscl, outputs only": {"l2_weight": 0.0},
}
WEIGHTS_IN_LOSS = {"zscl"}
"""Sharded towers refuse these: see `test_weights_of_sharded_towers_cannot_be_used_by_themselves`."""

KINDS = {"plain": ("accumulated", 1), "accumulated": ("accumulated", 2), "cached": ("cached", 2)}


def cases() -> Iterator[tuple[str, str, str, str]]:
    """Yield variant, mode of the towers, kind of step, sharding."""
    for variant in VARIANTS:
        for kind in KINDS:
            yield variant, "full", kind, "none"
        if variant not in WEIGHTS_IN_LOSS:
            for kind in KINDS:
                yield variant, "full", kind, "full"
            yield variant, "lora", "cached", "full"
            yield variant, "frozen", "plain", "full"


def state_after_a_step(variant: str, mode: str, kind: str, sharding: str, source: Listed) -> dict[str, Tensor]:
    """Return losses, and everything that an objective holds after one step of gradient descent with the samples of all processes."""
    slug = variant.partition(",")[0]
    step, count = KINDS[kind]
    recipe = recipe_of(slug, mode)
    size = 6 // distributed.part()[1]
    recipe = override(recipe, {"data": {"batch_size": size}, "step": step, "accumulate": count})
    recipe = replace(recipe, objective=override(recipe.objective, VARIANTS[variant]))
    objective = load_method(slug).Objective(make_model(recipe.model, source, seed=0), recipe.objective)
    objective.train()
    if sharding == "full":
        distributed.shard(objective)
    losses = STEPS[step](objective, iter(make_loader(recipe, source, objective.model)), count, nullcontext())
    distributed.average_gradients(objective)
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad)
    objective.after_step(1)
    state = {
        name: t.full_tensor() if distributed.is_cut(t) else t.clone() for name, t in objective.state_dict().items()
    }
    return state | {f"losses.{number}": loss.total for number, loss in enumerate(losses)}


def take_part(folder: Path) -> None:
    """Take all steps as one of two processes."""
    source = Listed(pickle.loads((folder / "samples").read_bytes()))
    with distributed.processes(torch.device("cpu")):
        for number, case in enumerate(cases()):
            try:
                state = state_after_a_step(*case, source)
            except Exception as error:
                error.add_note(f"in {case}")
                raise
            save_file(state, folder / f"{number}-{distributed.part()[0]}.safetensors")


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(source, tmp_path):
    (tmp_path / "samples").write_bytes(pickle.dumps(source.samples))
    finish(launch(__file__, str(tmp_path)), seconds=600)
    known: dict[tuple[str, str, str], dict[str, Tensor]] = {}
    for number, (variant, mode, kind, sharding) in enumerate(cases()):
        if (variant, mode, kind) not in known:
            known[variant, mode, kind] = state_after_a_step(variant, mode, kind, "none", source)
        expected = known[variant, mode, kind]
        for rank in range(2):
            found = load_file(tmp_path / f"{number}-{rank}.safetensors")
            assert found.keys() == expected.keys()
            apart = {
                name: largest(found[name].double() - value.double()) / max(1, largest(value))
                for name, value in expected.items()
            }
            worst = max(apart, key=lambda name: apart[name])
            assert apart[worst] < 3e-6, (variant, mode, kind, sharding, rank, worst, apart[worst])


def largest(tensor: Tensor) -> float:
    return tensor.double().abs().max().item()


if __name__ == "__main__":
    take_part(Path(sys.argv[1]))
