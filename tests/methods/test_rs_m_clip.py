import json
import math
import runpy
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from rich.console import Console

from diptych.claims.claim import Trial
from diptych.claims.reproduce import check
from diptych.data.loader import Loader, LoaderConfig
from diptych.data.sources import Listed
from diptych.data.transforms import Augment
from diptych.errors import ConfigError
from diptych.losses.distill import cross_entropy_of_views, moved_centre, teacher_distribution
from diptych.methods import load_method
from diptych.methods.rs_m_clip import (
    SETTLED,
    Config,
    DistillationHead,
    Distilled,
    Objective,
    ViewEmbeddings,
    claim,
    mini,
    warn_of_collapse,
    with_wrong_translations,
)
from diptych.models.modes import set_mode
from diptych.models.teacher import Teacher
from diptych.training.loop import fit
from diptych.training.optim import OptimizerConfig
from diptych.training.recipe import Recipe
from diptych.training.step import accumulate_gradients, cached_gradients
from diptych.types import Batch, Text, Tokens, concatenate, rows, tensors_of

SMALL = Config(prototypes=12, hidden=16, bottleneck=8, teacher_momentum=0.9)
VIEWS = (Augment(crop_scale=(0.4, 1.0)),) * 2 + (Augment(crop_scale=(0.1, 0.4), size=8),) * 3


@pytest.fixture
def batch_of(drawings):
    """Return a function that makes a batch of drawings for a model, with global and local views."""

    def make(model, views: tuple[Augment, ...] = VIEWS, count: int = 6) -> Batch:
        config = LoaderConfig(batch_size=count, views=views)
        return next(iter(Loader(drawings(count), model.image_policy, model.tokenizer, config, seed=0)))

    return make


def gradients(objective: Objective) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


# --- the numbers of the equations, from an implementation of their own (no official code was released) ---


@pytest.mark.parametrize("case", ["base", "wide_temps"])
def test_golden_distillation(golden, case):
    fields = golden("rs_m_clip", case)
    settings = json.loads(str(fields["settings"]))
    for step in range(len(fields["loss"])):
        student, teacher, centre = (
            torch.from_numpy(fields[name][step]) for name in ("student_logits", "teacher_logits", "center_before")
        )
        student = student.transpose(0, 1).contiguous().requires_grad_()
        teacher = teacher.transpose(0, 1)
        target = teacher_distribution(teacher, centre, settings["teacher_temp"])
        assert_allclose(target.transpose(0, 1), fields["teacher_prob"][step], rtol=1e-9, atol=1e-12)
        loss = cross_entropy_of_views(student, target, settings["student_temp"]).mean()
        assert_allclose(loss.item(), fields["loss_sd"][step], rtol=1e-9)
        loss.backward()  # the stored gradient is that of the distillation alone, without its weight
        assert_allclose(student.grad.transpose(0, 1), fields["grad_student_logits"][step], rtol=1e-9, atol=1e-12)
        found = moved_centre(centre, teacher.mean((0, 1)), settings["center_momentum"])
        assert_allclose(found, fields["center_after"][step], rtol=1e-9, atol=1e-12)
        assert teacher.shape[1] * (student.shape[1] - 1) == fields["num_pairs"][step]


@pytest.mark.parametrize("case", ["base", "wide_temps"])
@pytest.mark.parametrize("duplicates", ["none", "mask"])
def test_golden_total(golden, make_model, case, duplicates):
    fields = golden("rs_m_clip", case)
    settings = json.loads(str(fields["settings"]))
    config = replace(SMALL, distillation_weight=settings["weight_sd"], duplicates=duplicates)
    objective = Objective(make_model().double(), config).eval()
    for step in range(len(fields["loss"])):
        image, text, key = (torch.from_numpy(fields[name][step]) for name in ("image", "text", "caption_key"))
        n = len(image)
        with torch.no_grad():
            objective.model.log_scale.fill_(math.log(fields["logit_scale"][step]))
        unused = torch.full((n, 3), 1 / 3, dtype=torch.float64)
        distilled = Distilled(torch.full((n,), fields["loss_sd"][step], dtype=torch.float64), unused, unused)
        tokens = Tokens(torch.zeros(n, 1, dtype=torch.int64), torch.ones(n, 1, dtype=torch.bool), key)
        batch = Batch(tuple(map(str, range(n))), (), (tokens,), torch.arange(n))
        found = objective.loss(ViewEmbeddings((image,), text, distilled), batch)
        expected = fields["loss_con" if duplicates == "none" else "loss_con_dedup"][step]
        assert_allclose(found.parts["contrastive"].item(), expected, rtol=1e-9)
        if duplicates == "none":
            assert_allclose(found.total.item(), fields["loss"][step], rtol=1e-9)


@pytest.mark.parametrize("case", ["base", "wide_temps"])
def test_golden_teacher(golden, case):
    fields = golden("rs_m_clip", case)
    momentum = json.loads(str(fields["settings"]))["teacher_momentum"]
    for before, student, after in zip(
        fields["teacher_param_before"], fields["student_param"], fields["teacher_param_after"], strict=True
    ):
        module = torch.nn.Linear(4, 3, bias=False).double()
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(before))
            teacher = Teacher(module)
            module.weight.copy_(torch.from_numpy(student))
        teacher.follow(module, momentum)
        assert_allclose(teacher.module.weight, after, rtol=1e-9, atol=1e-12)


# --- switched off ---


def test_without_distillation_it_is_clip_to_the_bit(make_model, batch_of):
    model, clip = make_model(), load_method("clip")
    batch = batch_of(model, VIEWS[:1])
    ours = Objective(model, Config(distillation_weight=0.0, num_global=1))
    theirs = clip.Objective(make_model(), clip.Config())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    found, expected = ours(batch), theirs(batch)
    found.total.backward()
    expected.total.backward()
    assert found.total == expected.total
    for name, gradient in gradients(theirs).items():
        assert torch.equal(gradients(ours)[name], gradient), name


def test_without_distillation_two_global_views_are_the_mean_of_clip_on_each(make_model, batch_of):
    model, clip = make_model(), load_method("clip")
    batch = batch_of(model)
    found = Objective(model, Config(distillation_weight=0.0))(batch).total
    one = clip.Objective(model, clip.Config())
    each = [one(replace(batch, images=(view,))).total for view in batch.images[:2]]
    torch.testing.assert_close(found, (each[0] + each[1]) / 2)


# --- the parts ---


def test_the_total_is_the_weighted_sum(make_model, batch_of):
    objective = Objective(make_model(), replace(SMALL, distillation_weight=0.3))
    losses = objective(batch_of(objective.model))
    expected = losses.parts["contrastive"] + 0.3 * losses.parts["distillation"]
    torch.testing.assert_close(losses.total, expected)


def test_a_fresh_student_is_its_teacher_s_equal(make_model, batch_of):
    """One view seen twice, equal temperatures and no centre: the cost is the entropy of the distribution."""
    config = replace(SMALL, student_temperature=0.1, teacher_temperature=0.1)
    objective = Objective(make_model(), config)
    batch = batch_of(objective.model)
    distilled = objective.encode(replace(batch, images=batch.images[:1] * 2)).distilled
    torch.testing.assert_close(distilled.loss, torch.special.entr(distilled.target).sum(-1))


def test_a_head_that_says_nothing_costs_log_k(make_model, batch_of):
    objective = Objective(make_model(), SMALL)
    for tower in (objective.head, objective.teacher.module[1]):
        torch.nn.init.zeros_(tower.mlp[-1].weight)
    encoded = objective.encode(batch_of(objective.model))
    torch.testing.assert_close(encoded.distilled.loss, torch.full((6,), math.log(12)))


def test_no_gradient_reaches_the_teacher_or_the_text_through_distillation(make_model, batch_of):
    objective = Objective(make_model(), SMALL)
    objective.encode(batch_of(objective.model)).distilled.loss.mean().backward()
    reached = set(gradients(objective))
    assert not any(name.startswith(("teacher", "model.text")) or "head.linear" in name for name in reached)
    assert {name for name, _ in objective.head.named_parameters(prefix="head")} <= reached
    assert any(name.startswith("model.vision") for name in reached)


def test_cosines_stay_exact_under_autocast():
    torch.manual_seed(0)
    head = DistillationHead(16, SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(torch.randn(4, 16))
    assert found.dtype == torch.float32 and found.abs().max() <= 1 + 1e-6


# --- what moves after a step ---


def step(objective: Objective, batch: Batch, number: int = 1) -> None:
    objective.zero_grad()
    objective(batch).total.backward()
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    objective.after_step(number)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_limits_of_the_teacher(make_model, batch_of, momentum):
    objective = Objective(make_model(), replace(SMALL, teacher_momentum=momentum))
    before = [p.clone() for p in objective.teacher.parameters()]
    step(objective, batch_of(objective.model))
    student = [*objective.model.vision.parameters(), *objective.head.parameters()]
    expected = before if momentum else student
    for found, wanted in zip(objective.teacher.parameters(), expected, strict=True):
        assert torch.equal(found, wanted) if momentum else torch.allclose(found, wanted, atol=1e-7)
    assert any(not torch.equal(a, b) for a, b in zip(before, student, strict=True))


def test_the_centre_is_that_of_all_batches_of_a_step_and_waits_for_its_end(make_model, batch_of):
    objective = Objective(make_model(), SMALL)
    batch = batch_of(objective.model)
    halves = [rows(batch, 0, 3), rows(batch, 3, 6)]
    with torch.no_grad():
        logits = objective.encode(batch).distilled.teacher_logits
        for half in halves:
            objective(half)
    assert not objective.centre.any()
    objective.after_step(1)
    torch.testing.assert_close(objective.centre, 0.1 * logits.mean(0))
    objective.after_step(2)  # nothing new was seen
    torch.testing.assert_close(objective.centre, 0.1 * logits.mean(0))


def test_evaluation_moves_nothing(make_model, batch_of):
    objective = Objective(make_model(), SMALL).eval()
    with torch.no_grad():
        objective(batch_of(objective.model))
    objective.after_step(1)
    assert not objective.centre.any()


def test_the_teacher_s_temperature_warms_up(make_model):
    config = replace(SMALL, warmup_temperature=0.02, teacher_temperature=0.06, warmup_steps=4)
    objective = Objective(make_model(), config)
    seen = [objective.temperature.item()]
    for number in range(1, 7):
        objective.after_step(number)
        seen.append(objective.temperature.item())
    assert seen == pytest.approx([0.02, 0.03, 0.04, 0.05, 0.06, 0.06, 0.06])


def test_everything_that_moves_is_in_the_state(make_model, batch_of):
    one = Objective(make_model(), replace(SMALL, warmup_temperature=0.02, warmup_steps=9))
    batch = batch_of(one.model)
    step(one, batch)
    other = Objective(make_model(seed=5), one.config)
    other.load_state_dict(one.state_dict())
    for number in (2, 3):
        step(one, batch, number)
        step(other, batch, number)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert one(batch).total == other(batch).total


# --- with the rest of the toolkit ---


def test_chunks_encode_like_the_whole(make_model, batch_of):
    objective = Objective(make_model(), SMALL).eval()
    batch = batch_of(objective.model)
    with torch.no_grad():
        whole = objective.encode(batch)
        parts = concatenate([objective.encode(rows(batch, 0, 2)), objective.encode(rows(batch, 2, 6))])
    for found, expected in zip(tensors_of(parts), tensors_of(whole), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", ["frozen", "full", "lora"])
def test_modes_of_the_image_tower(make_model, batch_of, mode):
    if mode == "lora":
        pytest.importorskip("peft")
    model = make_model()
    set_mode(model.vision, mode)
    objective = Objective(model, SMALL)
    accumulate_gradients(objective, [batch_of(model)] * 2, 2, torch.autocast("cpu", torch.bfloat16))
    objective.after_step(1)
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert not any(p.requires_grad for p in objective.teacher.parameters())


def test_a_cached_step_is_that_of_the_whole_batch(make_model, batch_of):
    whole, cached = Objective(make_model(), SMALL), Objective(make_model(), SMALL)
    batch = batch_of(whole.model)
    parts = [rows(batch, 0, 2), rows(batch, 2, 6)]
    total = whole(batch).total
    total.backward()
    found = cached_gradients(cached, parts * 2, 2, nullcontext())[0].total
    torch.testing.assert_close(found, total.detach())
    for name, expected in gradients(whole).items():
        torch.testing.assert_close(gradients(cached)[name], expected, rtol=1e-4, atol=1e-6)
    for objective in (whole, cached):
        objective.after_step(1)
    torch.testing.assert_close(cached.centre, whole.centre)


def test_a_killed_run_goes_on_to_the_same_weights(make_model, drawings, tmp_path, monkeypatch):
    recipe = Recipe(
        "rs_m_clip",
        replace(SMALL, warmup_temperature=0.08, warmup_steps=5),
        data=LoaderConfig(batch_size=4, views=VIEWS),
        optimizer=OptimizerConfig(lr=0.01, ema_decay=0.8),
        epochs=2,
        save_every=2,
        precision="fp32",
    )

    def run(folder: str, *, seed: int = 0, resume: bool = False) -> Objective:
        objective = Objective(make_model(seed), recipe.objective)
        loader = Loader(drawings(12), objective.model.image_policy, objective.model.tokenizer, recipe.data, seed=0)
        (tmp_path / folder).mkdir(exist_ok=True)
        console = Console(quiet=True, force_terminal=False)
        fit(objective, loader, recipe, tmp_path / folder, console=console, resume=resume)
        return objective

    whole, move = run("whole"), Objective.after_step

    def die(self, step: int) -> None:
        move(self, step)
        if step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Objective, "after_step", die)
        run("killed")
    resumed = run("killed", seed=1, resume=True)
    assert whole.centre.any() and whole.temperature.item() == pytest.approx(0.04)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_the_saved_model_knows_nothing_of_teacher_and_head(make_model):
    objective = Objective(make_model(), SMALL)
    assert set(objective.model.state_dict()) == set(make_model().state_dict())


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_global": 0}, "num_global must be at least 1, not 0"),
        ({"prototypes": 1}, "prototypes must be at least 2"),
        ({"teacher_temperature": 0.0}, "teacher_temperature must be above 0"),
        ({"centre_momentum": 1.5}, r"centre_momentum must be in \[0, 1\], not 1.5"),
        ({"distillation_weight": -1.0}, "distillation_weight must be at least 0"),
        ({"student_temperature": math.nan, "hidden": 0}, "hidden must be at least 1, not 0; student_temperature"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        Config(**changes)


def test_too_few_views(make_model, batch_of):
    model = make_model()
    with pytest.raises(ConfigError, match=r"2 global views and at least two in all are needed; data.views makes 1"):
        Objective(model, SMALL)(batch_of(model, VIEWS[:1]))
    with pytest.raises(ConfigError, match="1 global views and at least two"):
        Objective(model, replace(SMALL, num_global=1))(batch_of(model, VIEWS[:1]))
    with pytest.raises(ConfigError, match=r"2 global views are needed; data.views makes 1"):
        Objective(model, replace(SMALL, distillation_weight=0.0))(batch_of(model, VIEWS[:1]))


def test_a_collapse_is_announced_once_the_centre_has_settled(make_model, batch_of):
    objective = Objective(make_model(), replace(SMALL, teacher_temperature=1e-3))
    batch = batch_of(objective.model)
    alike = replace(batch, images=tuple(view[:1].expand_as(view) for view in batch.images))
    for number, images, message in ((SETTLED, alike, ""), (SETTLED + 1, batch, ""), (SETTLED + 1, alike, "collapses")):
        with torch.no_grad():
            objective(images)
            objective.centre.copy_(objective._seen[0][0])  # as if it had settled here
            objective._seen.clear()
            objective(images)
        if message:
            with pytest.warns(UserWarning, match=message):
                objective.after_step(number)
        else:
            objective.after_step(number)


@pytest.mark.parametrize(("used", "spread"), [(0.05, 0.1), (0.5, 1e-4)])
def test_either_sign_of_a_collapse_counts(used, spread):
    with pytest.warns(UserWarning, match=r"entropy is (5|50).0% of its maximum, .* Lower optimizer.lr"):
        warn_of_collapse(used, spread)


# --- languages ---


def test_every_language_of_a_drawing_has_its_turn(drawings):
    texts = (Text("a", "caption", "en"), Text("b", "translation", "de"), Text("c", "translation", "fr"))
    sample, rng = replace(drawings(1)[0], texts=texts), np.random.default_rng(0)
    found = Counter(mini().data.texts[0].draw(sample, rng) for _ in range(3000))
    assert all(found[text.text] == pytest.approx(1000, abs=78) for text in texts)  # three standard deviations


def test_wrong_translations_are_nobody_s_own(drawings):
    source = Listed(
        [replace(s, texts=(s.texts[0], Text(f"Bild {i}", "translation", "de"))) for i, s in enumerate(drawings(7))]
    )
    mixed = with_wrong_translations(source, seed=0)
    own = {sample.key: [text.text for text in sample.texts] for sample in source}
    for sample in mixed:
        assert sample.texts[0].text == own[sample.key][0] and sample.texts[1].text != own[sample.key][1]
    assert sorted(s.texts[1].text for s in mixed) == sorted(texts[1] for texts in own.values())


# --- claim and example ---


def test_the_claims_are_well_formed():
    claims = claim()
    check(claims, "rs_m_clip")
    better = {"baseline": (0.1, 0.2), "method": (0.3, 0.4), "control": (0.15, 0.2)}
    for one in claims:
        assert one.control.passed(better)
        assert not one.control.passed({**better, "control": (0.3, 0.35)})


def test_arms_differ_in_what_they_say_only(monkeypatch, make_model, drawings):
    """Each arm is taken to the point of training, where its recipe and data are looked at."""
    taken = []

    def train(recipe, source):
        taken.append((recipe, source))
        return make_model()

    samples = Listed(
        [
            replace(s, texts=(replace(s.texts[0], language="en"), Text(f"ein Bild {s.key}", "translation", "de")))
            for s in drawings(12)
        ]
    )
    monkeypatch.setattr("diptych.methods.rs_m_clip.openmoji", lambda split: samples)
    for one in claim():
        for arm in one.arms:
            value = arm.run(Trial(0, "validation", {}, lambda slug: mini(), train))
            assert 0 <= value <= 1
    weights = [recipe.objective.distillation_weight for recipe, _ in taken]
    assert weights == [0, 1, 1, 0, 0, 0, 0, 0]
    assert [len(recipe.data.views) for recipe, _ in taken] == [6 if weight else 2 for weight in weights]
    assert [recipe.objective.teacher_momentum == 1 for recipe, _ in taken] == [False, False, True] + [False] * 5
    assert [recipe.data.texts[0].roles == ("caption",) for recipe, _ in taken] == [i in (3, 5) for i in range(8)]
    assert [isinstance(source, Listed) for _, source in taken] == [i in (4, 7) for i in range(8)]
    assert {(r.epochs, r.model, r.optimizer, r.data.batch_size) for r, _ in taken} == {
        (5, mini().model, mini().optimizer, 64)
    }


@pytest.mark.slow
def test_example():
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "rs_m_clip.py"), run_name="__main__")
