import json
import math
import runpy
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import normalize

from diptych.claims.claim import Trial
from diptych.claims.reproduce import check
from diptych.data.loader import Loader, TextColumn
from diptych.data.text_changes import TextChange
from diptych.data.transforms import Augment, ImagePolicy
from diptych.errors import ConfigError
from diptych.losses.selfsup import sinkhorn
from diptych.methods import clip
from diptych.methods import improved_baselines as module
from diptych.methods.improved_baselines import (
    WEIGHTS,
    BothSides,
    Config,
    MultiView,
    Objective,
    PrototypeHeads,
    SiamHeads,
    Views,
    bar_loss,
    claim,
    mini,
    multi_view_data,
    multi_view_loss,
    prototype_loss,
    siam_loss,
    swapped_loss,
)
from diptych.models.heads import normed_mlp
from diptych.models.modes import set_mode, train_mode
from diptych.training.loop import fit
from diptych.training.optim import make_optimizer
from diptych.training.recipe import Recipe
from diptych.training.step import cached_gradients
from diptych.types import Batch, concatenate, map_tensors

EXTRAS = ("none", "siam", "byol", "bar", "swal", "prototypes")
SMALL = Config(local_hidden=16, head_hidden=16, head_dim=8, num_prototypes=12)


# Official numbers


def tensors(case: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Return the float arrays of a case as leaves."""
    return {
        name: torch.tensor(value).requires_grad_(not name.startswith(("grad_", "out_")))
        for name, value in case.items()
        if value.dtype.kind == "f"
    }


def views(case: dict[str, Tensor], letter: str, ending: str = "") -> Views:
    """Return the vectors of one kind of all views."""
    image, text = case[f"{letter}_image{ending}"], case[f"{letter}_text{ending}"]
    strong_images, strong_texts = case[f"{letter}_image_local{ending}"], case[f"{letter}_text_local{ending}"]
    return Views((image, *strong_images), (text, *strong_texts))


def contrastive(case: dict[str, Tensor], settings: dict):
    z_image, z_text = normalize(case["z_image"], dim=-1), normalize(case["z_text"], dim=-1)
    empty = z_image.new_zeros(0, *z_image.shape)
    h_image, h_text = (normalize(case.get(f"h_{side}", empty), dim=-1) for side in ("image", "text"))
    return multi_view_loss(
        Views((z_image, *h_image), (z_text, *h_text)),
        case["logit_scale"],
        case.get("h_logit_scale", case["logit_scale"]),
        reduction=settings.get("reduction", "avg"),
        label_smoothing=settings.get("label_smoothing", 0.0),
    )


def check_gradients(case: dict[str, Tensor], total: Tensor, single: bool = False) -> None:
    """Compare every gradient that the case holds."""
    total.backward()
    names = [name.removeprefix("grad_") for name in case if name.startswith("grad_")]
    assert names
    for name in names:
        rtol, atol = (1e-4, 1e-5) if single else (1e-9, 1e-12)
        torch.testing.assert_close(case[name].grad, case[f"grad_{name}"], rtol=rtol, atol=atol, msg=name)


def settings_of(case: dict[str, np.ndarray]) -> dict:
    return json.loads(str(case["settings"])) if "settings" in case else {}


@pytest.mark.data
@pytest.mark.parametrize("name", ["clip", "cl2l_avg", "cl2l_sum", "cl2l_nosmooth", "cl2l_noaug", "cl2l_f32"])
def test_multi_view_loss_is_the_official_one(golden, name):
    raw = golden("improved_baselines", name)
    case, single = tensors(raw), name.endswith("f32")
    losses = contrastive(case, settings_of(raw))
    rtol = 1e-4 if single else 1e-9
    assert losses.total.item() == pytest.approx(case["out_loss"].item(), rel=rtol)
    for part in ("global", "local"):
        if f"out_clip_loss_image_{part}" in case:
            both = case[f"out_clip_loss_image_{part}"] + case[f"out_clip_loss_text_{part}"]
            assert losses.parts[part].item() == pytest.approx(both.item() / 2, rel=rtol)
    check_gradients(case, losses.total, single)


@pytest.mark.data
def test_barlip_is_the_official_one(golden):
    raw = golden("improved_baselines", "barlip")
    case = tensors(raw)
    extra = WEIGHTS["bar"] * bar_loss(views(case, "v"))
    assert extra.item() == pytest.approx(case["out_barlip_loss"].item(), rel=1e-9)
    total = contrastive(case, settings_of(raw)).total + extra
    assert total.item() == pytest.approx(case["out_loss"].item(), rel=1e-9)
    check_gradients(case, total)


@pytest.mark.data
@pytest.mark.parametrize(("name", "ending"), [("siamlip", ""), ("byolip", "_momentum")])
def test_siamlip_and_byolip_are_the_official_ones(golden, name, ending):
    raw = golden("improved_baselines", name)
    case = tensors(raw)
    extra = siam_loss(views(case, "p"), views(case, "v", ending))
    assert extra.item() == pytest.approx(case["out_siamlip_loss"].item(), rel=1e-9)
    total = contrastive(case, settings_of(raw)).total + extra
    assert total.item() == pytest.approx(case["out_loss"].item(), rel=1e-9)
    check_gradients(case, total)
    assert case[f"v_image{ending}"].grad is None and case[f"v_text_local{ending}"].grad is None


@pytest.mark.data
def test_swalip_is_the_official_one(golden):
    raw = golden("improved_baselines", "swalip")
    case = tensors(raw)
    images, texts = normalize(case["h_image"], dim=-1), normalize(case["h_text"], dim=-1)
    for a in range(2):
        for b in range(2):
            torch.testing.assert_close(
                sinkhorn(images[a] @ texts[b].T), case["targets_image"][a, b], rtol=1e-9, atol=1e-12
            )
    extra = swapped_loss(Views(tuple(images), tuple(texts)), case["h_logit_scale"])
    assert extra.item() == pytest.approx(case["out_swalip_loss"].item(), rel=1e-9)
    total = contrastive(case, settings_of(raw)).total + WEIGHTS["swal"] * extra
    assert total.item() == pytest.approx(case["out_loss"].item(), rel=1e-9)
    check_gradients(case, total)


@pytest.mark.data
def test_the_first_swalip_is_the_official_one(golden):
    raw = golden("improved_baselines", "swalip_v1")
    case = tensors(raw)
    image, text = (normalize(case[f"h_{side}"], dim=-1) @ case["prototypes"].T for side in ("image", "text"))
    for side, cosines in (("image", image), ("text", text)):
        torch.testing.assert_close(cosines, case[f"p_{side}"], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(sinkhorn(cosines), case[f"assign_{side}"], rtol=1e-9, atol=1e-12)
    extra = prototype_loss(image, text)
    assert extra.item() == pytest.approx(case["out_swalip_loss"].item(), rel=1e-9)
    plain = contrastive({name: case[name] for name in ("z_image", "z_text", "logit_scale")}, {}).total
    assert plain.item() == pytest.approx(case["out_clip_loss"].item(), rel=1e-9)
    check_gradients(case, plain + WEIGHTS["prototypes"] * extra)


def fill(module: torch.nn.Module, raw: dict[str, np.ndarray], prefix: str) -> None:
    """Load parameters and buffers of an official module, which end in the names that ours have."""
    state = {name.removeprefix(prefix): torch.tensor(value) for name, value in raw.items() if name.startswith(prefix)}
    found = module.load_state_dict(state, strict=False)
    assert state and not found.unexpected_keys and all("num_batches" in key for key in found.missing_keys)


@pytest.mark.data
def test_heads_of_siamlip_are_the_official_ones(golden):
    raw = golden("improved_baselines", "heads_siamlip")
    heads = SiamHeads((7, 6), 9, 8).double()
    for side, other in (("image", "text"), ("text", "image")):
        official = f"param_siamlip_{side}_projector_global."
        fill(getattr(heads.projectors, side), raw, f"{official}0.")
        fill(getattr(heads.weak_norms, side), raw, f"{official}1.")
        fill(getattr(heads.predictors, side), raw, f"param_{side}_{other}_predictor_global.")
    projections = heads.project(views(tensors(raw), "feats"))
    predictions = heads.predictors(projections)
    for letter, found in (("v", projections), ("p", predictions)):
        for side, ours in (("image", found.images), ("text", found.texts)):
            official = np.concatenate([raw[f"out_{letter}_{side}"][None], raw[f"out_{letter}_{side}_local"]])
            torch.testing.assert_close(torch.stack(ours), torch.tensor(official), rtol=1e-9, atol=1e-12)
    for path, norms in (("global", heads.weak_norms), ("local", heads.strong_norms)):
        for side in ("image", "text"):
            for buffer in ("running_mean", "running_var"):
                official = raw[f"after_siamlip_{side}_projector_{path}.1.{buffer}"]
                ours = getattr(getattr(norms, side), buffer)
                torch.testing.assert_close(ours, torch.tensor(official), rtol=1e-9, atol=1e-12)


@pytest.mark.data
def test_heads_of_barlip_are_the_official_ones(golden, make_model):
    raw = golden("improved_baselines", "heads_barlip")
    config = replace(SMALL, extra="bar", head_hidden=9)
    heads = Objective(make_model(), config).heads
    assert isinstance(heads, BothSides)
    for side, width in (("image", 7), ("text", 6)):
        own = getattr(heads, side)
        own[0] = torch.nn.Linear(width, 9)
        fill(own.double(), raw, f"param_barlip_{side}_projector_global.")
    found = heads(views(tensors(raw), "feats"))
    for side, ours in (("image", found.images), ("text", found.texts)):
        official = np.concatenate([raw[f"out_v_{side}"][None], raw[f"out_v_{side}_local"]])
        torch.testing.assert_close(torch.stack(ours), torch.tensor(official), rtol=1e-9, atol=1e-12)


@pytest.mark.data
def test_without_candidate_gradients_two_official_processes_are_one(golden):
    raw = golden("improved_baselines", "ranks2_cl2l")
    names = ("z_image", "z_text", "h_image", "h_text")
    joined = {name: np.concatenate([raw[f"rank{rank}_{name}"] for rank in (0, 1)], axis=-2) for name in names}
    case = tensors(joined)
    scale, local_scale = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (14.2857, 10.0))
    unit = {name: normalize(value, dim=-1) for name, value in case.items()}
    joint = Views((unit["z_image"], *unit["h_image"]), (unit["z_text"], *unit["h_text"]))
    losses = multi_view_loss(joint, scale, local_scale, gather_grad=False)
    both = [raw[f"rank{rank}_out_loss"].item() for rank in (0, 1)]
    assert losses.total.item() == pytest.approx(sum(both) / 2, rel=1e-9)
    losses.total.backward()
    for rank in (0, 1):
        for name in ("z_image", "z_text", "h_image"):
            ours = case[name].grad[..., 3 * rank : 3 * rank + 3, :]  # a process takes the mean over its own half
            official = torch.tensor(raw[f"rank{rank}_grad_{name}"])
            torch.testing.assert_close(2 * ours, official, rtol=1e-9, atol=1e-12)
    official = sum(raw[f"rank{rank}_grad_logit_scale"].item() for rank in (0, 1)) / 2
    assert scale.grad.item() == pytest.approx(official, rel=1e-9)


@pytest.mark.data
def test_barlip_of_two_official_processes_is_that_of_the_joined_batch(golden):
    raw = golden("improved_baselines", "ranks2_barlip")
    names = ("v_image", "v_text", "v_image_local", "v_text_local")
    case = tensors({name: np.concatenate([raw[f"rank{rank}_{name}"] for rank in (0, 1)], axis=-2) for name in names})
    extra = WEIGHTS["bar"] * bar_loss(views(case, "v"))
    extra.backward()
    for rank in (0, 1):
        assert extra.item() == pytest.approx(raw[f"rank{rank}_out_barlip_loss"].item(), rel=1e-9)
        for name in ("v_image", "v_text"):
            official = torch.tensor(raw[f"rank{rank}_grad_{name}"])
            torch.testing.assert_close(case[name].grad[4 * rank : 4 * rank + 4], official, rtol=1e-9, atol=1e-12)


# Closed forms


def unit(*shape: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def test_identical_views_give_the_loss_of_one():
    image, text = unit(6, 5), unit(6, 5, seed=1)
    plain = multi_view_loss(Views((image,), (text,)), 9.0, 9.0).total
    same = multi_view_loss(Views((image,) * 4, (text,) * 4), 9.0, 9.0, label_smoothing=0.0)
    assert same.parts["local"].item() == pytest.approx(plain.item(), rel=1e-12)
    assert same.total.item() == pytest.approx(plain.item(), rel=1e-12)
    doubled = multi_view_loss(Views((image,), (text,)), 9.0, 9.0, reduction="sum").total
    assert doubled.item() == pytest.approx(2 * plain.item(), rel=1e-12)


def test_every_strong_image_meets_every_strong_text():
    images, texts = [unit(5, 4, seed=i) for i in range(3)], [unit(5, 4, seed=10 + i) for i in range(3)]
    rows = torch.arange(5)
    expected = 0.0
    for image in images:
        for text in texts:
            log_p = (7 * image @ text.T).log_softmax(1), (7 * text @ image.T).log_softmax(1)
            for p in log_p:  # smoothing: 0.9 of the target on the diagonal, 0.1 spread over all five
                expected += (-0.9 * p[rows, rows] - 0.1 * p.mean(1)).mean().item() / 18
    found = multi_view_loss(Views((images[0], *images), (texts[0], *texts)), 3.0, 7.0)
    assert found.parts["local"].item() == pytest.approx(expected, rel=1e-12)
    weak = found.parts["global"].item()
    assert found.total.item() == pytest.approx((weak + 3 * expected) / 4, rel=1e-12)


def test_terms_at_chance_and_at_their_ends():
    same = unit(1, 4).expand(6, 4)
    assert multi_view_loss(Views((same,) * 3, (same,) * 3), 5.0, 9.0).total.item() == pytest.approx(math.log(6))
    assert swapped_loss(Views((same,) * 2, (same,) * 2), 9.0).item() == pytest.approx(math.log(6))
    assert prototype_loss(torch.zeros(6, 7), torch.zeros(6, 7)).item() == pytest.approx(math.log(7), rel=1e-6)
    targets = Views((unit(6, 4, seed=1),) * 3, (unit(6, 4, seed=2),) * 3)
    right = Views(targets.texts, targets.images)  # what an image predicts is its text, at any length
    assert siam_loss(map_tensors(lambda p: 3 * p, right), targets).item() == pytest.approx(0, abs=1e-12)
    assert siam_loss(map_tensors(torch.neg, right), targets).item() == pytest.approx(4)
    with pytest.raises(ConfigError, match="as many texts as images; there are 1 and 2"):
        multi_view_loss(Views((same, same), (same,)), 1.0, 1.0)


# The objective


def data(num_strong: int = 2, batch_size: int = 8):
    strong = Augment(crop_scale=(0.5, 1.0), jitter=0.4, blur_rate=0.5)
    return multi_view_data(num_strong, strong=strong, batch_size=batch_size)


RECIPE = replace(mini(), data=data(batch_size=4), save_every=3, log_every=1, evaluate_every=0, precision="fp32")
"""Three steps per epoch on twelve samples."""


def batch_of(objective: Objective, source, *, batch_size: int = 8, num_strong: int | None = None) -> Batch:
    model = objective.model
    count = objective.config.num_strong if num_strong is None else num_strong
    return next(iter(Loader(source, model.image_policy, model.tokenizer, data(count, batch_size))))


def with_extra(extra: str, **changes) -> Config:
    return replace(SMALL, extra=extra, **({"label_smoothing": 0.0} if extra == "swal" else {}), **changes)


def test_without_strong_views_and_extra_term_it_is_clip(make_model, drawings):
    source = drawings(12)
    ours = Objective(make_model(), replace(SMALL, num_strong=0))
    theirs = clip.Objective(make_model(), clip.Config())
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    batch = batch_of(ours, source)
    batch = replace(batch, group=batch.group[torch.tensor([0, 0, 2, 3, 4, 5, 6, 7])])  # two samples of one group
    losses = []
    for objective in (ours, theirs):
        objective.train()
        with torch.autocast("cpu", torch.bfloat16):
            encoded = objective.encode(batch)
        loss = objective.loss(encoded, batch).total
        loss.backward()
        losses.append(loss)
    assert torch.equal(losses[0], losses[1])
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_an_extra_term_of_weight_zero_is_none(make_model, drawings):
    source = drawings(12)
    for extra in EXTRAS[1:]:
        off = Objective(make_model(), with_extra(extra, extra_weight=0.0, text_dropout=0.0, separate_projectors=False))
        without = replace(off.config, extra="none")
        plain = Objective(make_model(), without)
        batch = batch_of(off, source)
        assert torch.equal(off(batch).total, plain(batch).total)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("separate", [True, False])
def test_every_extra_term_trains(make_model, drawings, extra, separate):
    objective = Objective(
        make_model(), with_extra(extra, separate_projectors=separate, frozen_steps=1, text_dropout=0.0)
    )
    batch = batch_of(objective, drawings(12))
    train_mode(objective)
    optimizer = make_optimizer(objective, (), mini().optimizer)
    seen = []
    for step in range(1, 7):
        optimizer.zero_grad()
        losses = objective(batch)
        losses.total.backward()
        for name, parameter in objective.named_parameters():
            held = not parameter.requires_grad or (name == "heads.prototypes" and step == 1)
            assert (parameter.grad is None) == held, name
            assert held or parameter.grad.isfinite().all(), name
        optimizer.step()
        objective.after_step(step)
        seen.append(losses.total.item())
    assert seen[-1] < seen[0]
    assert set(losses.parts) == {"global", "local"} | ({extra} if extra != "none" else set())
    found = losses.parts["global"] / 3 + 2 / 3 * losses.parts["local"]
    weighted = WEIGHTS[extra] * losses.parts[extra] if extra != "none" else 0.0
    torch.testing.assert_close(losses.total, found + weighted)


def test_only_strong_texts_are_dropped_and_only_in_training(make_model, drawings):
    objective = Objective(make_model(), replace(SMALL, text_dropout=0.5, text_drop_path=0.5))
    batch = batch_of(objective, drawings(12))
    batch = replace(batch, texts=(batch.texts[0],) * 3, images=(batch.images[0],) * 3)

    def features() -> MultiView:
        with torch.no_grad():
            return objective.encode(batch)

    train_mode(objective)
    first, again = features(), features()
    weak, *strong = first.features.texts
    assert torch.equal(weak, again.features.texts[0])
    assert all(not torch.equal(weak, text) for text in strong) and not torch.equal(*strong)
    assert all(torch.equal(first.features.images[0], image) for image in first.features.images)
    objective.eval()
    assert all(torch.equal(weak, text) for text in features().features.texts)


def test_the_teacher_follows_everything_and_is_part_of_the_state(make_model, drawings):
    objective = Objective(make_model(), with_extra("byol", teacher_momentum=0.75))
    teachers = ((objective.teacher, objective.model), (objective.teacher_heads, objective.heads))
    before = [p.clone() for teacher, _ in teachers for p in teacher.module.parameters()]
    with torch.no_grad():
        for parameter in (*objective.model.parameters(), *objective.heads.parameters()):
            parameter += 1
    objective.after_step(1)
    after = [p for teacher, _ in teachers for p in teacher.module.parameters()]
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old + 0.25)
    assert any(name.startswith("teacher.module.vision") for name in objective.state_dict())
    assert any(name.startswith("teacher_heads.module.projectors") for name in objective.state_dict())
    assert not any(parameter.requires_grad for parameter in objective.teacher.parameters())


def test_targets_of_byolip_come_from_the_teacher(make_model, drawings):
    objective = Objective(make_model(), with_extra("byol", text_dropout=0.0))
    batch = batch_of(objective, drawings(12))
    train_mode(objective)
    encoded = objective.encode(batch)
    equal = zip(encoded.features.images, encoded.targets.images, strict=True)
    assert all(torch.equal(one, other) for one, other in equal)  # teacher and student are still the same
    assert not encoded.targets.texts[0].requires_grad
    with torch.no_grad():
        objective.teacher.module.vision.patch_embedding.weight.zero_()
    moved = objective.encode(batch)
    assert torch.equal(moved.features.images[1], encoded.features.images[1])
    assert not torch.equal(moved.targets.images[1], encoded.targets.images[1])
    parts = [objective.loss(record, batch).parts["byol"] for record in (encoded, moved)]
    assert not torch.equal(*parts)


def test_prototypes_stay_for_a_while(make_model, drawings):
    objective = Objective(make_model(), with_extra("prototypes", frozen_steps=2))
    heads, batch = objective.heads, batch_of(objective, drawings(12))
    assert isinstance(heads, PrototypeHeads)
    for step, moves in ((1, False), (2, False), (3, True)):
        objective.zero_grad()
        objective(batch).total.backward()
        assert (heads.prototypes.grad is not None) == moves, step
        objective.after_step(step)
    copy = Objective(make_model(), objective.config)
    copy.load_state_dict(objective.state_dict())
    assert copy.heads.steps == 3  # a resumed run goes on counting


@pytest.mark.parametrize("mode", ["frozen", "lora"])
@pytest.mark.parametrize("extra", ["byol", "bar"])
def test_towers_may_be_frozen_or_adapted(make_model, drawings, mode, extra):
    if mode == "lora":
        pytest.importorskip("peft")
    model = make_model()
    for tower in (model.vision, model.text):
        set_mode(tower, mode)
    objective = Objective(model, with_extra(extra))
    train_mode(objective)
    batch = batch_of(objective, drawings(12))
    objective(batch).total.backward()
    objective.after_step(1)
    for name, parameter in objective.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert any(p.requires_grad for p in model.vision.parameters()) == (mode == "lora")


def test_bad_settings_are_named(make_model, drawings):
    for changes, message in (
        ({"extra": "swal"}, "num_strong to 2 and label_smoothing to 0, not 2 and 0.1"),
        ({"extra": "swal", "label_smoothing": 0.0, "num_strong": 1}, "not 1 and 0.0"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), not 1.0"),
        ({"text_dropout": -0.1}, "text_dropout must be"),
        ({"num_strong": -1}, "num_strong must be at least 0"),
        ({"teacher_momentum": 1.5}, "teacher_momentum must be in"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            Config(**changes)
    objective = Objective(make_model(), SMALL)
    with pytest.raises(ConfigError, match="need 3 entries each, the weak one first; there are 2 and 2"):
        objective(batch_of(objective, drawings(12), num_strong=1))
    single = batch_of(objective, drawings(12), batch_size=1)
    with pytest.raises(ConfigError, match="at least 2 samples; this batch has 1"):
        objective(single)
    objective.eval()
    assert objective(single).total.isfinite()


def test_a_foreign_text_tower_cannot_drop(make_model):
    model = make_model()
    model.text.transformer = torch.nn.Identity()
    with pytest.raises(ConfigError, match="cannot drop parts of strong texts only"):
        Objective(model, SMALL)
    assert Objective(model, replace(SMALL, text_dropout=0.0)).local is not None


def test_the_loader_gives_weak_and_strong_texts(make_model, drawings):
    model, source = make_model(), drawings(12)
    config = multi_view_data(
        1, weak=Augment(), weak_text=TextChange(), strong_text=TextChange(stop_word_rate=1.0), batch_size=12
    )
    batch = next(islice(Loader(source, ImagePolicy(16), model.tokenizer, config), 1))
    decode = model.tokenizer.engine.decode
    weak, strong = ([decode(row.tolist()).strip() for row in column.ids] for column in batch.texts)
    for sample in source:
        text = sample.texts[0].text
        place = weak.index(text)
        assert strong[place] == text.removeprefix("a ")


def test_local_projectors_are_the_paper_s(make_model):
    objective = Objective(make_model(), Config())
    kinds = [type(layer).__name__ for layer in objective.local.image]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert objective.local.image[0].out_features == 4096 and objective.local.text[-1].out_features == 8
    assert objective.local_log_scale.exp().item() == pytest.approx(10)
    assert sum(p.numel() for p in normed_mlp(3, 5, 2, hidden_bias=False).parameters()) == 15 + 10 + 10 + 2


@pytest.mark.parametrize("extra", ["byol", "prototypes", "swal"])
def test_a_resumed_run_ends_as_if_it_had_not_stopped(make_model, drawings, tmp_path, monkeypatch, extra):
    config = with_extra(extra, frozen_steps=2)
    recipe = replace(RECIPE, objective=config, epochs=2)

    def run(name: str, *, dies_after: int | None = None, resume: bool = False) -> dict[str, Tensor]:
        objective = Objective(make_model(), config)
        after_step = objective.after_step

        def watched(step: int) -> None:
            after_step(step)
            if step == dies_after:
                raise KeyboardInterrupt

        monkeypatch.setattr(objective, "after_step", watched)
        model = objective.model
        loader = Loader(drawings(12), model.image_policy, model.tokenizer, recipe.data)
        torch.manual_seed(1)
        (tmp_path / name).mkdir(exist_ok=True)
        fit(objective, loader, recipe, tmp_path / name, console=Console(quiet=True), resume=resume)
        return objective.state_dict()

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", dies_after=4)  # a step after the checkpoint
    parts = run("parts", resume=True)
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_cached_step_is_one_large_batch(make_model, drawings, extra):
    found = []
    for cached in (False, True):
        objective = Objective(make_model(), with_extra(extra, frozen_steps=0, text_dropout=0.0))
        train_mode(objective)
        model = objective.model
        loader = Loader(
            drawings(12), model.image_policy, model.tokenizer, data(batch_size=4), repeat=3 if cached else None
        )
        if cached:
            cached_gradients(objective, loader, 3, nullcontext())
        else:
            objective(concatenate(list(islice(loader, 3)))).total.backward()
        found.append({name: p.grad for name, p in objective.named_parameters() if p.grad is not None})
        found[-1] |= {name: buffer for name, buffer in objective.named_buffers() if "running" in name}
    assert found[0].keys() == found[1].keys()
    largest = max(value.abs().max() for value in found[0].values())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5 * float(largest), msg=name)


# Claim and example


def test_the_claims_are_well_formed():
    check(claim(), "improved_baselines")
    for one in claim():
        assert one.control.passed({"baseline": (0.1, 0.2), "method": (0.3, 0.4), "control": (0.15, 0.2)})
        assert not one.control.passed({"baseline": (0.1, 0.2), "method": (0.3, 0.4), "control": (0.3, 0.35)})


def test_arms_differ_in_what_they_say_only(monkeypatch, make_model, drawings):
    seen: dict[str, Recipe] = {}

    def trial(name: str) -> Trial:
        def train(recipe, source):
            seen[name] = recipe
            return make_model(texts=[text.text for sample in source for text in sample.texts])

        return Trial(0, "validation", {}, lambda slug: {"clip": clip, "improved_baselines": module}[slug].mini(), train)

    monkeypatch.setattr(module, "_scenes", lambda trial: (drawings(6), drawings(6), 4))
    for arm in module.claim()[0].arms:
        assert 0 <= arm.run(trial(arm.name)) <= 1
    method, basic = seen["CLIP with the recipe"], seen["basic CLIP"]
    assert method == replace(mini(), epochs=4)
    assert basic == replace(mini(), method="clip", objective=clip.Config(), data=basic.data, epochs=4)
    assert basic.data.views == (module.WEAK,) and basic.data.texts == (TextColumn(),)
    assert seen["basic CLIP, epochs x 3"] == replace(basic, epochs=12)
    control = seen["recipe, strength 0"]
    assert control == replace(method, data=control.data, objective=replace(method.objective, text_dropout=0.0))
    assert control.data == replace(method.data, views=basic.data.views * 3, texts=basic.data.texts * 3)
    siam = replace(method.objective, extra="siam")
    assert seen["SiamLIP with the recipe"] == replace(method, objective=siam)
    expected = replace(siam, num_strong=0, text_dropout=0.0)
    assert seen["basic SiamLIP"] == replace(basic, method="improved_baselines", objective=expected)


@pytest.mark.slow
def test_example():
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "improved_baselines.py"), run_name="__main__")
