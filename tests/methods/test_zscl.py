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
from torch import Tensor
from torch.nn import functional as F

from diptych.claims.reproduce import check
from diptych.data.loader import Loader, LoaderConfig
from diptych.data.sources import Listed
from diptych.errors import ConfigError, DataError
from diptych.methods import clip, vr_lwf
from diptych.methods.zscl import Config, Objective, Reference, claim, mini, recipe, squared_distance
from diptych.models.checkpoint import save_model
from diptych.models.modes import set_mode
from diptych.training.optim import WeightAverage, uniform
from diptych.training.step import cached_gradients
from diptych.types import Batch, Text, TowerOutput

OFF = {"image_weight": 0.0, "text_weight": 0.0, "l2_weight": 0.0}
PROMPTS = ("a photo of a circle.", "a photo of a square.")


@pytest.fixture
def shapes(drawings) -> Listed:
    """Return drawings whose only text is the prompt of their shape."""
    return Listed(
        [replace(s, texts=(Text(PROMPTS["square" in s.texts[0].text], "label"),)) for s in drawings(12)], "shapes"
    )


def batches_of(source: Listed, model, size: int = 6) -> list[Batch]:
    loader = Loader(source, model.image_policy, model.tokenizer, LoaderConfig(batch_size=size))
    return list(islice(loader, 2))


def folder_of_drawings(drawings, path, count: int = 7) -> str:
    for sample in drawings(count):
        (path / f"{sample.key}.png").write_bytes(sample.image)
        (path / f"{sample.key}.txt").write_text(sample.texts[0].text)
    return str(path)


@pytest.mark.parametrize("case", ["train_zscl", "train_finetune"])
def test_whole_official_runs(golden, toy, tokens, seen, monkeypatch, case):
    numbers = golden("zscl", case)
    settings = json.loads(str(numbers["settings"]))
    model, teacher = toy(numbers), toy(numbers, "teacher")
    on = {"image_weight": float(settings["image_loss"]), "text_weight": float(settings["text_loss"])}
    config = Config(label_smoothing=settings["label_smoothing"], l2_weight=settings["l2"], **on)
    objective = Objective(model, config)
    objective.supervision.tokens = tokens(numbers["class_tokens"])
    if config.distils:
        shown = torch.from_numpy(numbers["ref_images"])
        size = shown.shape[1]
        with torch.no_grad():
            objective.texts = teacher.encode_text(tokens(numbers["ref_tokens"]))
            known = teacher.encode_image(TowerOutput(shown.flatten(0, 1)))
        objective.teacher, objective.reference = None, Reference(TowerOutput(shown.flatten(0, 1)), known)
        in_turn = lambda self, keys, step, seed: torch.arange(size) + step % len(shown) * size  # noqa: E731
        monkeypatch.setattr(Reference, "draw", in_turn)
    named = {"W_img": model.image_head.linear.weight, "table": model.text.table, "W_txt": model.text_head.linear.weight}
    optimizer = torch.optim.AdamW(named.values(), betas=settings["betas"], weight_decay=settings["weight_decay"])
    average = WeightAverage(model, uniform(1))
    for step in range(settings["steps_run"]):
        optimizer.param_groups[0]["lr"] = float(numbers["lr"][step])
        which = step % len(numbers["images"])
        optimizer.zero_grad()
        losses = objective(seen(numbers["images"][which], numbers["labels"][which]))
        losses.total.backward()
        optimizer.step()
        objective.after_step(step + 1)
        if step % settings["avg_freq"] == 0:  # there the first snapshot follows the first step
            average.update(model, step // settings["avg_freq"] + 1)
        assert losses.total.item() == pytest.approx(float(numbers["loss"][step]), rel=1e-8)
        for name, official in (("distil_image", "kd_image"), ("distil_text", "kd_text"), ("l2", "l2")):
            if name in losses.parts:
                assert losses.parts[name].item() == pytest.approx(float(numbers[f"loss_{official}"][step]), rel=1e-7)
        for name, parameter in named.items():
            np.testing.assert_allclose(parameter.detach(), numbers[f"theta_{name}"][step], rtol=1e-6, atol=1e-9)
    assert model.log_scale.item() == float(numbers["saved_logit_scale"])
    if settings["we"]:
        average.swap(model)
        for name, parameter in named.items():
            np.testing.assert_allclose(parameter.detach(), numbers[f"saved_{name}"], rtol=1e-6, atol=1e-9)


def test_official_distances_and_means(golden):
    numbers = {name: torch.from_numpy(v) for name, v in golden("zscl", "weights").items() if name != "settings"}
    start, now = (torch.nn.ParameterList([numbers["start"].clone()]) for _ in range(2))
    average = WeightAverage(now, uniform(1))
    for step, snapshot in enumerate(numbers["snapshots"], 1):
        with torch.no_grad():
            now[0].copy_(snapshot)
        average.update(now, step)
        distance = squared_distance(now, start)
        torch.testing.assert_close(distance, numbers["l2_to_start"][step - 1], rtol=1e-8, atol=0)
        torch.testing.assert_close(average.average["0"], numbers["average_sequence"][step - 1], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(distance, now[0])[0], numbers["l2_grad_last"], rtol=1e-8, atol=1e-12)


def test_all_weights_moved_by_c_cost_p_c_squared(make_model):
    model, start = make_model().double(), make_model().double()
    model.text.requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert squared_distance(model, start).item() == pytest.approx(trained * 0.01, rel=1e-6)


def plain_steps(model, batches: list[Batch], classes: bool) -> list[Tensor]:
    """Fine-tune as one would write it by hand; return the weights."""
    model.log_scale.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    prompts = model.tokenizer(PROMPTS)
    for batch in batches:
        optimizer.zero_grad()
        image = model.encode_image(batch.images[0])
        if classes:
            labels = torch.tensor([prompts.key.tolist().index(key) for key in batch.texts[0].key.tolist()])
            logits = model.scale * image @ model.encode_text(prompts).T
            F.cross_entropy(logits, labels, label_smoothing=0.2).backward()
        else:
            clip.Objective(model, clip.Config())(batch).total.backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["classes", "pairs"])
@pytest.mark.parametrize("method", ["zscl", "vr_lwf"])
def test_switched_off_it_is_fine_tuning_to_the_last_bit(make_model, drawings, shapes, kind, method):
    source, classes = (shapes, PROMPTS) if kind == "classes" else (drawings(12), ())
    model, by_hand = make_model(), make_model()
    if method == "zscl":
        objective = Objective(model, Config(classes=classes, teacher="mini", reference="openmoji", **OFF))
    else:
        objective = vr_lwf.Objective(model, vr_lwf.Config(classes=classes, image_weight=0.0, text_weight=0.0))
    objective.train()
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-3)
    batches = batches_of(source, model)
    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        losses = objective(batch)
        assert set(losses.parts) == {"task"}
        losses.total.backward()
        optimizer.step()
        objective.after_step(step)
    expected = plain_steps(by_hand, batches, bool(classes))
    for found, wanted in zip(model.parameters(), expected, strict=True):
        assert torch.equal(found, wanted)
    assert not any("teacher" in name or "start" in name for name in objective.state_dict())


def test_a_student_that_is_its_teacher_gets_no_gradient_from_it(make_model, shapes):
    objective = Objective(make_model(), Config(classes=PROMPTS))
    losses = objective(batches_of(shapes, objective.model)[0])
    together = losses.parts["distil_image"] + losses.parts["distil_text"] + losses.parts["l2"]
    trained = [p for p in objective.parameters() if p.requires_grad]
    for gradient in torch.autograd.grad(together, trained, allow_unused=True):
        assert gradient is None or gradient.abs().max() < 1e-6


def test_distillation_never_reaches_the_text_tower(make_model, drawings, tmp_path):
    model = make_model()
    objective = Objective(model, Config(reference=folder_of_drawings(drawings, tmp_path), l2_weight=0.0))
    with torch.no_grad():
        model.image_head.linear.weight.add_(0.3)
    losses = objective(batches_of(drawings(12), model)[0])
    (losses.parts["distil_image"] + losses.parts["distil_text"]).backward()
    assert model.image_head.linear.weight.grad.abs().sum() > 0
    assert all(p.grad is None for module in (model.text, model.text_head) for p in module.parameters())


def test_each_sample_brings_a_reference_image_whatever_batch_it_is_in(make_model, drawings, tmp_path):
    model = make_model()
    objective = Objective(model, Config(reference=folder_of_drawings(drawings, tmp_path), reference_count=5))
    assert objective.reference is not None and objective.teacher is None
    assert len(objective.reference.teacher) == 5 and len(objective.texts) == 7
    reference = objective.reference
    rows = reference.draw(("a", "b", "c"), 3, 0)
    assert torch.equal(rows[1:], reference.draw(("b", "c"), 3, 0))
    drawn = torch.cat([reference.draw(("a", "b", "c", "d"), step, 0) for step in range(2000)])
    shares = torch.bincount(drawn, minlength=5) / len(drawn)
    assert (shares - 0.2).abs().max() < 0.02  # 8,000 draws: a standard deviation is 0.0045
    embedded = objective.encode(batches_of(drawings(12), model)[0])
    torch.testing.assert_close(embedded.student[0], embedded.teacher[0])


def test_frozen_towers_see_the_reference_once_and_say_the_same(make_model, drawings, tmp_path):
    reference = folder_of_drawings(drawings, tmp_path)
    trained, frozen = make_model(), make_model()
    set_mode(frozen.vision, "frozen")
    one, two = (Objective(model, Config(reference=reference)) for model in (trained, frozen))
    assert isinstance(two.reference.images, TowerOutput) and not isinstance(one.reference.images, TowerOutput)
    batch = batches_of(drawings(12), trained)[0]
    torch.testing.assert_close(two.encode(batch).student[0], one.encode(batch).student[0])


def test_cached_steps_see_the_same_reference_images(make_model, drawings, tmp_path):
    reference = folder_of_drawings(drawings, tmp_path)
    objective = Objective(make_model(), Config(reference=reference))
    with torch.no_grad():
        objective.model.image_head.linear.weight.add_(0.3)
        objective.model.log_scale.zero_()  # at 14 and more it is mostly rounding that gradients in fp32 differ by
    batches = batches_of(drawings(12), objective.model)
    (losses,) = cached_gradients(objective, [*batches, *batches], 2, nullcontext())
    found = [p.grad.clone() for p in objective.parameters() if p.grad is not None]
    objective.zero_grad()
    whole = Loader(
        drawings(12), objective.model.image_policy, objective.model.tokenizer, LoaderConfig(batch_size=12)
    ).maker
    order = [int(key.removeprefix("s")) for batch in batches for key in batch.keys]
    expected = objective(whole.some(order))
    expected.total.backward()
    torch.testing.assert_close(losses.total, expected.total.detach())
    for one, two in zip(found, [p.grad for p in objective.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_a_named_teacher_is_the_original_whatever_training_starts_from(make_model, drawings, tmp_path):
    original, later = make_model(), make_model()
    save_model(original, tmp_path / "original")
    with torch.no_grad():
        later.image_head.linear.weight.add_(1.0)
    objective = Objective(later, Config(teacher=str(tmp_path / "original")))
    batch = batches_of(drawings(12), later)[0]
    with torch.no_grad():
        assert torch.equal(objective.encode(batch).teacher[0], original.encode_image(batch.images[0]))
    assert torch.equal(
        objective.start.module.image_head.linear.weight, later.image_head.linear.weight
    )  # not the teacher


def test_a_teacher_that_reads_otherwise_is_refused(make_model):
    with pytest.raises(ConfigError, match="the preprocessing of 'mini' differs"):
        Objective(make_model(), Config(teacher="mini"))


def test_misplaced_teachers_cost_more(make_model, shapes):
    right, wrong = (Objective(make_model(), Config(classes=PROMPTS, control=it)) for it in (None, "misplaced"))
    batch = batches_of(shapes, right.model)[0]
    assert right(batch).parts["distil_text"] < wrong(batch).parts["distil_text"]


def test_a_grey_reference_is_one_image_and_a_random_teacher_knows_nothing(make_model, drawings, tmp_path):
    reference = folder_of_drawings(drawings, tmp_path)
    model = make_model()
    right, grey, random = (Objective(model, Config(reference=reference, control=it)) for it in (None, "grey", "random"))
    assert len(right.reference.teacher) == 7 and len(grey.reference.teacher) == 1
    assert torch.equal(grey.reference.images, torch.full_like(right.reference.images[:1], 128))
    assert grey.reference.draw(("a", "b"), 3, 0).tolist() == [0, 0]
    assert torch.equal(random.reference.images, right.reference.images)
    assert not torch.allclose(random.reference.teacher, right.reference.teacher) and not torch.allclose(
        random.texts, right.texts
    )


def test_ewc_switched_off_is_fine_tuning_and_on_it_holds_what_matters(make_model, drawings, tmp_path):
    reference = folder_of_drawings(drawings, tmp_path)
    model = make_model()
    off = Objective(model, Config(reference=reference, **OFF))
    on = Objective(model, Config(reference=reference, ewc_weight=3.0, **OFF))
    assert off.start is None and off.importance == [] and on.teacher is None and on.reference is None
    batch = batches_of(drawings(12), model)[0]
    assert torch.equal(on(batch).total, off(batch).total) and on(batch).parts["ewc"] == 0
    assert len(on.importance) == sum(p.requires_grad for p in model.parameters())
    assert all((each >= 0).all() for each in on.importance)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = trained.index("image_head.linear.weight")
    assert on.importance[head].sum() > 0
    with torch.no_grad():
        model.image_head.linear.weight.add_(0.1)
    losses = on(batch)
    assert losses.parts["ewc"].item() == pytest.approx(0.005 * on.importance[head].sum().item(), rel=1e-4)
    torch.testing.assert_close(losses.total, off(batch).total + 3.0 * losses.parts["ewc"])


def test_ewc_needs_a_reference():
    with pytest.raises(ConfigError, match=r"there is none. Name one in objective\.reference"):
        Config(ewc_weight=1.0)


def test_at_chance_by_hand(make_model, shapes):
    objective = Objective(make_model(), Config(classes=PROMPTS))
    objective.model.log_scale.data.fill_(-20.0)
    losses = objective(batches_of(shapes, objective.model)[0])
    expected = math.log(2) + 4 * math.log(2) + 4 * math.log(6)
    assert losses.total.item() == pytest.approx(expected, rel=1e-5)


def test_a_text_that_is_no_prompt_is_refused(make_model, drawings):
    objective = Objective(make_model(), Config(classes=PROMPTS))
    with pytest.raises(DataError, match=r"none of the 2 prompts of objective\.classes.*prompted"):
        objective(batches_of(drawings(12), objective.model)[0])


@pytest.mark.parametrize("classes", [PROMPTS[:1], (*PROMPTS, PROMPTS[0])], ids=["one", "twice"])
def test_classes_that_are_none_are_refused(make_model, classes):
    with pytest.raises(ConfigError, match="two classes or more, each with a prompt of its own"):
        Objective(make_model(), Config(classes=classes))


@pytest.mark.parametrize("settings", [{"l2_weight": -1.0}, {"temperature": 0.0}, {"label_smoothing": 1.0}], ids=str)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match="weights >= 0, a temperature > 0"):
        Config(**settings)


def test_an_image_of_the_reference_that_cannot_be_read_is_named(make_model, drawings, tmp_path):
    folder_of_drawings(drawings, tmp_path)
    (tmp_path / "s3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"'s3.*in the reference .* cannot be used"):
        Objective(make_model(), Config(reference=str(tmp_path)))


def test_a_reference_without_texts_takes_the_classes_or_says_what_it_needs(make_model, drawings, tmp_path):
    folder = folder_of_drawings(drawings, tmp_path)
    for file in tmp_path.glob("*.txt"):
        file.unlink()
    assert len(Objective(make_model(), Config(reference=folder, classes=PROMPTS)).texts) == 2
    with pytest.raises(ConfigError, match=r"has no texts.*objective\.reference_texts"):
        Objective(make_model(), Config(reference=folder))


def test_the_recipe_has_the_values_of_the_paper():
    base = recipe()
    assert (base.optimizer.lr, base.optimizer.weight_decay, base.optimizer.mean_every) == (1e-5, 0.0, 100)
    assert (base.model.vision_mode, base.model.text_mode, base.data.batch_size) == ("full", "full", 64)
    assert mini().objective == base.objective == Config()


def test_the_claim_is_well_formed_and_its_control_can_fail():
    found = claim()
    assert [one.name for one in found] == ["order_I", "order_II", "looks_I", "looks_II"]
    assert all(
        {"LwF", "L2", "EWC", "WiSE-FT", "jointly", "zero-shot"} < {arm.name for arm in one.arms} for one in found
    )
    check(found, "zscl")
    numbers = {"baseline": [0.1, 0.1, 0.1], "method": [0.5, 0.5, 0.5], "control": [0.2, 0.2, 0.2]}
    assert all(one.control.passed(numbers) for one in found)
    assert not any(one.control.passed(numbers | {"control": [0.4, 0.4, 0.4]}) for one in found)


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("resvg_py")
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "zscl.py"))
    example["main"](count=50)
    said = capsys.readouterr().out
    assert said.count("is left of what it could.") == 2 and (tmp_path / "runs/looks/ZSCL/trace.json").exists()
