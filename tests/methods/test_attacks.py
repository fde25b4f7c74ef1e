"""What every attack in the table must do. One that is added later is covered by its row, and a line in `SMALL`."""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from diptych.config import override
from diptych.data.sources import Listed
from diptych.evaluation.attack import measure_attack
from diptych.methods import METHODS, load_method
from diptych.models.build import build
from diptych.models.embedding import embed_images, embed_source_images
from diptych.models.foreign import TimmConfig
from diptych.models.perturbation import AbstractPerturbation
from diptych.models.weights import convert, load
from diptych.types import Text
from diptych.verbs import AbstractAttack

SMALL: Mapping[str, Mapping[str, Any]] = {
    "c_pgc": {"steps": 2, "batch_size": 3, "captions": 2, "filters": [[32], [8]], "z_dim": 4, "scales": [0.5]},
    "gama": {"steps": 2, "batch_size": 3, "width": 2, "blocks": 1, "middle": 0},
}


@pytest.fixture(params=[slug for slug, m in METHODS.items() if m.verb == "attack" and m.state != "planned"])
def slug(request) -> str:
    return request.param


@pytest.fixture
def method(slug) -> ModuleType:
    return load_method(slug)


@pytest.fixture
def settings(slug, method) -> Any:
    return override(method.mini(), {"seed": 3, **SMALL[slug]})


@pytest.fixture
def source(drawings) -> Listed:
    """Return drawn samples whose captions name two things."""
    pairs = ("a cat and a dog", "a dog and a bus", "a bus and a cat")
    samples = [replace(s, texts=(Text(f"{pairs[n % 3]} {n}"),)) for n, s in enumerate(drawings(7))]
    return Listed(samples, "pairs")


def moved(change: AbstractPerturbation, side: int = 16) -> torch.Tensor:
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    return change.apply(pixels) - pixels


def test_what_a_file_of_an_attack_holds(method):
    assert method.__doc__ and "arXiv" in method.__doc__
    assert issubclass(method.Attack, AbstractAttack)
    assert not inspect.isabstract(method.Attack)
    assert method.mini().steps < method.Config().steps
    assert {"eps", "seed"} <= {*vars(method.Config())}


def test_the_change_is_bounded_and_images_stay_images(method, settings, source, make_model):
    change = method.Attack(settings).fit(make_model(), source)
    assert isinstance(change, AbstractPerturbation) and change.eps == settings.eps
    for side in (16, 24):
        pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        changed = change.apply(pixels)
        assert 0 < (changed - pixels).abs().max() <= settings.eps / 255 + 1e-6
        assert 0 <= changed.min() and changed.max() <= 1


def test_eps_0_changes_not_a_bit(method, settings, source, make_model):
    model = make_model()
    nothing = method.Attack(replace(settings, eps=0)).fit(model, source)
    assert torch.equal(embed_source_images(model, source, change=nothing.apply)[1], embed_images(model, source))


def test_seeds_decide_everything(method, settings, source, make_model):
    model = make_model()
    first = moved(method.Attack(settings).fit(model, source))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(first, moved(method.Attack(settings).fit(model, source)))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, moved(method.Attack(replace(settings, seed=4)).fit(model, source)))


def test_the_model_stays_as_it_was(method, settings, source, make_model):
    model = make_model().train()
    model.text.eval()
    before, modes = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
    method.Attack(settings).fit(model, source)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [part.training for part in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_it_learns_from_the_model_and_goes_on_learning(method, settings, source, make_model):
    """Equal random numbers, other weights of the model or one step more: another change."""
    found = moved(method.Attack(settings).fit(make_model(0), source))
    other = moved(method.Attack(settings).fit(make_model(1), source))
    longer = moved(method.Attack(replace(settings, steps=3)).fit(make_model(0), source))
    assert not torch.equal(found, other)
    assert not torch.equal(found, longer)


def test_it_comes_back_from_its_file(method, settings, source, make_model, tmp_path):
    change = method.Attack(settings).fit(make_model(), source)
    change.save(tmp_path / "change.safetensors")
    again = method.read(tmp_path / "change.safetensors")
    assert again.eps == change.eps
    assert torch.equal(moved(again), moved(change))
    smaller = method.read(tmp_path / "change.safetensors", eps=2)
    assert smaller.eps == 2
    assert 0 < moved(smaller).abs().max() <= 2 / 255 + 1e-6


def test_towers_of_timm_are_attacked(method, settings, source, make_model):
    ours = make_model()
    torch.manual_seed(0)
    policy = replace(ours.config.image_policy, size=32)
    theirs = build(replace(ours.config, vision=TimmConfig("test_resnet"), image_policy=policy), ours.tokenizer)
    change = method.Attack(settings).fit(theirs, source)
    assert 0 < moved(change, 32).abs().max() <= settings.eps / 255 + 1e-6
    report = measure_attack(ours, source, change, precision="fp32")  # another tower, another size
    assert report.clean.settings["images"] == 7


def test_models_of_transformers_are_attacked(method, settings, source, make_model, tmp_path):
    """A folder in their format, read from the disk; what was learnt on it is measured on another model."""
    convert(make_model(0), tmp_path / "clip", "hf")
    theirs = load(f"hf:{tmp_path / 'clip'}", offline=True)
    change = method.Attack(settings).fit(theirs, source)
    assert 0 < moved(change).abs().max() <= settings.eps / 255 + 1e-6
    for victim in (theirs, make_model(1)):
        report = measure_attack(victim, source, change, precision="fp32")
        assert report.attacked.embedded.images.shape == report.clean.embedded.images.shape == (7, 8)
