import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Engine
from tokenizers.models import WordLevel
from torch.nn import functional as F

from diptych.claims.reproduce import check
from diptych.data.loader import Loader, LoaderConfig
from diptych.data.tokenizer import TextPolicy, Tokenizer
from diptych.errors import ConfigError
from diptych.losses.distill import soft_cross_entropy
from diptych.methods.vr_lwf import Config, Objective, claim, mini, random_sentences, recipe, spread
from diptych.models.teacher import Frozen
from diptych.types import Batch


def first_batch(source, model, size: int = 6) -> Batch:
    return next(iter(Loader(source, model.image_policy, model.tokenizer, LoaderConfig(batch_size=size))))


def test_the_official_vocabulary(golden):
    numbers = golden("vr_lwf", "vocab")
    settings = json.loads(str(numbers["settings"]))
    engine = Engine(WordLevel({str(token): token for token in range(settings["vocab"])}))
    policy = TextPolicy(length=77, begin=settings["sot"], end=settings["eot"], pad=0, pad_to="length")
    generator = torch.Generator().manual_seed(settings["seed"])
    found = random_sentences(
        Tokenizer(engine, policy), settings["n"], settings["length"], generator, special_tokens=True
    )
    assert torch.equal(found.ids, torch.from_numpy(numbers["tokens"]))


def test_random_sentences(make_model):
    tokenizer = make_model().tokenizer
    found, again = (random_sentences(tokenizer, 4000, 5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(found.ids, again.ids)
    policy = tokenizer.policy
    assert found.ids.shape == (4000, 7) and found.mask.all()
    assert (found.ids[:, 0] == policy.begin).all() and (found.ids[:, -1] == policy.end).all()
    inner = found.ids[:, 1:-1]
    assert not torch.isin(inner, torch.tensor([policy.begin, policy.end, policy.pad])).any()
    counts = torch.bincount(inner.flatten(), minlength=tokenizer.size)
    drawn = counts[counts > 0]
    assert (
        len(drawn) == tokenizer.size - 3
    )  # 20,000 draws of 297 ids: none is missed, and none is drawn twice as often as it should
    assert drawn.max() < 2 * drawn.float().mean()


@pytest.mark.parametrize("length", [0, 15])
def test_sentences_that_do_not_fit_are_refused(make_model, length):
    with pytest.raises(ConfigError, match=f"from 1 to 14 random tokens.*is {length}"):
        random_sentences(make_model().tokenizer, 3, length, torch.Generator())


@pytest.mark.parametrize("case", ["head", "head_equal", "head_same_rows", "head_float32"])
def test_the_official_head(golden, case):
    numbers = {name: torch.from_numpy(v) for name, v in golden("vr_lwf", case).items() if name != "settings"}
    settings = json.loads(str(golden("vr_lwf", case)["settings"]))
    close = {"rtol": 1e-4, "atol": 1e-4} if case.endswith("32") else {"rtol": 1e-8, "atol": 1e-10}
    image = numbers["student_image"].clone().requires_grad_()
    head = F.normalize(numbers["vocabulary_features"], dim=-1)
    student = settings["scale"] * F.normalize(image, dim=-1) @ head.T
    teacher = settings["scale"] * F.normalize(numbers["teacher_image"], dim=-1) @ head.T
    torch.testing.assert_close(student, numbers["student_logits"], **close)
    for side, logits in (("image", (student, teacher)), ("text", (student.T, teacher.T))):
        found = soft_cross_entropy(*logits, settings["T"])
        (gradient,) = torch.autograd.grad(found, image, retain_graph=True)
        torch.testing.assert_close(found, numbers[f"loss_{side}"], **close)
        torch.testing.assert_close(gradient, numbers[f"grad_{side}_loss"], **close)
    assert spread(head).item() == pytest.approx(float(numbers["head_spread"]), abs=1e-6)


@pytest.mark.parametrize("case", ["train_first_task", "train_other_teacher"])
def test_whole_official_runs(golden, toy, tokens, seen, case):
    numbers = golden("vr_lwf", case)
    settings = json.loads(str(numbers["settings"]))
    model, teacher = toy(numbers), toy(numbers, "teacher")
    objective = Objective(model, Config(label_smoothing=settings["label_smoothing"], length=5, count=8))
    objective.supervision.tokens = tokens(numbers["class_tokens"])
    objective.teacher = Frozen(teacher)
    with torch.no_grad():
        objective.head = teacher.encode_text(tokens(numbers["ref_tokens"]))
    named = {"W_img": model.image_head.linear.weight, "table": model.text.table, "W_txt": model.text_head.linear.weight}
    optimizer = torch.optim.AdamW(named.values(), betas=settings["betas"], weight_decay=settings["weight_decay"])
    for step in range(settings["steps_run"]):
        optimizer.param_groups[0]["lr"] = float(numbers["lr"][step])
        which = step % len(numbers["images"])
        labels = numbers["labels"][which]
        optimizer.zero_grad()
        # There the images that are distilled are another batch of the same task.
        task = objective(seen(numbers["images"][which], labels)).parts["task"]
        parts = objective(seen(numbers["ref_images"][step % len(numbers["ref_images"])], labels)).parts
        total = task + parts["distil_image"] + parts["distil_text"]
        total.backward()
        optimizer.step()
        assert total.item() == pytest.approx(float(numbers["loss"][step]), rel=1e-8)
        assert parts["distil_image"].item() == pytest.approx(float(numbers["loss_kd_image"][step]), rel=1e-8)
        assert parts["distil_text"].item() == pytest.approx(float(numbers["loss_kd_text"][step]), rel=1e-8)
        for name, parameter in named.items():
            np.testing.assert_allclose(parameter.detach(), numbers[f"theta_{name}"][step], rtol=1e-6, atol=1e-9)


def test_a_student_that_is_its_teacher_costs_the_entropy(make_model, drawings):
    objective = Objective(make_model(), Config(count=9))
    batch = first_batch(drawings(8), objective.model)
    losses = objective(batch)
    logits = objective.model.scale * objective.model.encode_image(batch.images[0]) @ objective.head.T
    entropy = torch.special.entr((logits / 2).softmax(-1)).sum(-1).mean()
    assert losses.parts["distil_image"].item() == pytest.approx(4 * entropy.item(), rel=1e-5)
    distilled = losses.parts["distil_image"] + losses.parts["distil_text"]
    for gradient in torch.autograd.grad(
        distilled, [p for p in objective.parameters() if p.requires_grad], allow_unused=True
    ):
        assert gradient is None or gradient.abs().max() < 1e-6


def test_sentences_of_ones_own_that_are_all_alike_teach_nothing(make_model, drawings):
    with pytest.warns(UserWarning, match="5 sentences.*almost alike.*mean cosine 1.000"):
        objective = Objective(make_model(), Config(sentences=("a cat",) * 5, text_weight=0.0))
    losses = objective(first_batch(drawings(8), objective.model))
    assert losses.parts["distil_image"].item() == pytest.approx(4 * math.log(5), rel=1e-6)
    trained = [p for p in objective.parameters() if p.requires_grad]
    for gradient in torch.autograd.grad(losses.parts["distil_image"], trained, allow_unused=True):
        assert gradient is None or gradient.abs().max() < 1e-6


def test_the_order_of_sentences_does_not_matter(make_model, drawings):
    objective = Objective(make_model(), Config(count=9))
    with torch.no_grad():
        objective.model.image_head.linear.weight.add_(0.2)
    batch = first_batch(drawings(8), objective.model)
    before = objective(batch).total
    objective.head.copy_(objective.head[torch.randperm(9, generator=torch.Generator().manual_seed(0))])
    torch.testing.assert_close(objective(batch).total, before, rtol=1e-6, atol=0)


def test_one_image_has_nothing_to_be_told_apart_from(make_model, drawings):
    objective = Objective(make_model(), Config(count=9))
    assert objective(first_batch(drawings(3), objective.model, size=1)).parts["distil_text"] == 0


@pytest.mark.parametrize("student_text", [False, True])
def test_the_text_tower_is_taught_where_that_is_asked_for(make_model, drawings, student_text):
    objective = Objective(make_model(), Config(count=9, student_text=student_text))
    model = objective.model
    batch = first_batch(drawings(8), model)
    with torch.no_grad():
        model.image_head.linear.weight.add_(0.2)
    parts = objective(batch).parts
    (parts["distil_image"] + parts["distil_text"]).backward()
    assert (model.text_head.linear.weight.grad is not None) == student_text
    assert model.image_head.linear.weight.grad.abs().sum() > 0


def test_the_teacher_stays_what_the_model_was(make_model, drawings):
    model = make_model()
    objective = Objective(model, Config(count=9))
    batch = first_batch(drawings(8), model)
    with torch.no_grad():
        before = model.encode_image(batch.images[0])
        model.image_head.linear.weight.add_(0.5)
        assert torch.equal(objective.encode(batch).teacher[0], before)
        assert not torch.equal(model.encode_image(batch.images[0]), before)
    assert any(name.startswith("teacher.") for name in objective.state_dict()) and "head" in objective.state_dict()


def test_misplaced_teachers_cost_more(make_model, drawings):
    right, wrong = (Objective(make_model(), Config(count=9, control=it)) for it in (None, "misplaced"))
    batch = first_batch(drawings(8), right.model)
    assert right(batch).parts["distil_text"] < wrong(batch).parts["distil_text"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"count": 1}, "tells no images apart.*give at least two"),
        ({"sentences": ("one",)}, "tells no images apart"),
        ({"image_weight": -1.0}, "weights >= 0"),
        ({"temperature": 0.0}, "temperature > 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Config(**settings)


def test_the_recipe_has_the_values_of_the_re_implementation():
    base = recipe()
    assert (base.objective.count, base.objective.length, base.objective.temperature) == (1000, 10, 2.0)
    assert (base.optimizer.lr, base.optimizer.weight_decay, base.optimizer.mean_every) == (1e-5, 0.0, None)
    assert mini().objective == Config(count=256)


def test_the_claim_is_well_formed_and_its_control_can_fail():
    found = claim()
    assert [one.name for one in found] == ["order_I", "order_II", "looks_I", "looks_II"]
    check(found, "vr_lwf")
    numbers = {"baseline": [0.1, 0.1, 0.1], "method": [0.5, 0.5, 0.5], "control": [0.2, 0.2, 0.2]}
    assert all(one.control.passed(numbers) for one in found)
    assert not any(one.control.passed(numbers | {"control": [0.4, 0.4, 0.4]}) for one in found)


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "vr_lwf.py"))
    example["main"](epochs=1)
    said = capsys.readouterr().out
    assert said.count("of the colours are still named rightly.") == 2
    assert (tmp_path / "runs/names/VR-LwF/trace.json").exists()
