import json
import runpy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from diptych.claims.claim import Arm, Trial
from diptych.claims.reproduce import check
from diptych.claims.train import train_quietly
from diptych.cli import main
from diptych.data.loader import Loader
from diptych.data.scenes import scenes
from diptych.data.sources import AbstractSource, Subset, open_source
from diptych.errors import ConfigError
from diptych.losses.contrastive import info_nce
from diptych.methods import clip, fdt, load_method
from diptych.methods.fdt import PATIENCE, Config, FDTEmbeddings, Objective, claim, mini, recipe
from diptych.models.checkpoint import load_model, save_model
from diptych.models.codebook import CodebookHead, CodebookHeadConfig, add_codebook, has_codebook, sparsemax
from diptych.models.dual import DualEncoder
from diptych.models.modes import set_mode
from diptych.models.weights import load
from diptych.training.loop import fit
from diptych.training.prepare import make_loader
from diptych.training.recipe import Recipe
from diptych.training.step import accumulate_gradients, cached_gradients
from diptych.types import Batch, TowerOutput, rows

SMALL = CodebookHeadConfig(codes=24, dim=8, temperature=4.0)
CASES = (
    "sparsemax_max_T1",
    "softmax_max_T1",
    "sigmoid_max_T1",
    "sparsemax_mean_T1",
    "sparsemax_sum_T1",
    "softmax_mean_T1",
    "sparsemax_max_T1000",
    "sparsemax_max_T3_f32",
)


# --- the official numbers ---


def tolerance(array: np.ndarray) -> dict[str, float]:
    return {"rtol": 1e-9, "atol": 1e-12} if array.dtype == np.float64 else {"rtol": 1e-4, "atol": 1e-6}


def assert_golden(found: Tensor, expected: np.ndarray, *, gradient: bool = False) -> None:
    wanted = tolerance(expected)
    if gradient and expected.dtype == np.float32:
        wanted["atol"] = 1e-5
    torch.testing.assert_close(found.detach().reshape(expected.shape), torch.from_numpy(expected), **wanted)


@pytest.mark.parametrize("case", ["small", "random", "narrow", "3d"])
def test_official_sparsemax(golden, case):
    numbers = golden("fdt", f"sparsemax_{case}")
    scores = torch.from_numpy(numbers["input"]).requires_grad_()
    weights = sparsemax(scores)
    weights.backward(torch.from_numpy(numbers["grad_output"]))
    assert_golden(weights, numbers["output"])
    assert_golden(scores.grad, numbers["grad_input"], gradient=True)


def official_heads(numbers: dict[str, np.ndarray]) -> tuple[CodebookHead, CodebookHead]:
    """Return heads that share a codebook, with the official weights."""
    settings, (codes, dim) = json.loads(str(numbers["settings"])), numbers["codebook"].shape
    config = CodebookHeadConfig(
        codes, dim, settings["temperature"], settings["normalizer"], settings["pool"], pad="zero"
    )
    image = CodebookHead(numbers["patch_features"].shape[-1], config)
    text = CodebookHead(numbers["word_features"].shape[-1], config, image)
    for side, head in (("image", image), ("text", text)):
        head.to(torch.from_numpy(numbers["codebook"]).dtype)
        prefix = f"head_{side}_"
        weights = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in numbers.items() if k.startswith(prefix)}
        head.query.load_state_dict(weights)
    with torch.no_grad():
        image.codes.copy_(torch.from_numpy(numbers["codebook"]))
    return image, text


@pytest.mark.parametrize("case", CASES)
def test_official_forward_and_backward(golden, case):
    numbers = golden("fdt", case)
    image_head, text_head = official_heads(numbers)
    patches, tokens = (torch.from_numpy(numbers[f"{n}_features"]).requires_grad_() for n in ("patch", "word"))
    log_scale = torch.from_numpy(numbers["logit_scale_log"]).requires_grad_()
    image = image_head.mix(TowerOutput(patches.mean(1), patches))
    text = text_head.mix(TowerOutput(tokens.mean(1), tokens, ~torch.from_numpy(numbers["padding_mask"])))
    one, two = (side.features / (side.features.norm(dim=-1, keepdim=True) + 1e-10) for side in (image, text))
    scale = log_scale.exp()[0]
    loss = info_nce(one, two, scale)
    loss.backward()

    assert_golden(image.weights, numbers["weights_image"])
    assert_golden(text.weights, numbers["weights_text"])
    assert_golden(image.features, numbers["features_image"])
    assert_golden(text.features, numbers["features_text"])
    assert_golden(scale * one @ two.T, numbers["logits_per_image"])
    assert_golden(scale * two @ one.T, numbers["logits_per_text"])
    assert_golden(loss, numbers["loss"])
    assert_golden(patches.grad, numbers["grad_patch_features"], gradient=True)
    assert_golden(tokens.grad, numbers["grad_word_features"], gradient=True)
    assert_golden(image_head.codes.grad, numbers["grad_codebook"], gradient=True)
    assert_golden(log_scale.grad, numbers["grad_logit_scale_log"], gradient=True)


def test_official_queries_and_scores_of_positions(golden):
    numbers = golden("fdt", "sparsemax_max_T1")
    image_head, text_head = official_heads(numbers)
    patches, tokens = (torch.from_numpy(numbers[f"{n}_features"]) for n in ("patch", "word"))
    mask = ~torch.from_numpy(numbers["padding_mask"])
    assert_golden(image_head.query(patches), numbers["query_image"])
    assert_golden(text_head.query(tokens), numbers["query_text"])
    image = image_head.scores(TowerOutput(patches.mean(1), patches))
    text = text_head.scores(TowerOutput(tokens.mean(1), tokens, mask))
    assert_golden(image * 8**0.5, numbers["token_att_image_raw"])  # raw dot products there
    assert_golden(text * mask[..., None], numbers["token_att_text_scaled"])  # divided by sqrt(d), padding at 0


# --- on and off ---


@pytest.fixture
def batch(make_model, drawings) -> Batch:
    model = make_model()
    config = replace(recipe().data, batch_size=8, views=mini().data.views)
    return next(iter(Loader(drawings(12), model.image_policy, model.tokenizer, config)))


def test_switched_off_it_is_clip_to_the_bit(make_model, batch):
    off, plain = Objective(make_model(), Config(heads=None)), clip.Objective(make_model(), clip.Config())
    assert not has_codebook(off.model)
    found, expected = off(batch), plain(batch)
    assert torch.equal(found.total, expected.total) and found.parts.keys() == expected.parts.keys()
    found.total.backward()
    expected.total.backward()
    for one, two in zip(off.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_on_it_is_clips_loss_of_what_the_model_embeds(make_model, batch):
    objective = Objective(make_model(), Config(SMALL))
    model = objective.model
    images, texts = model.encode_image(batch.images[0]), model.encode_text(batch.texts[0])
    losses = objective(batch)
    torch.testing.assert_close(losses.total, info_nce(images, texts, model.scale))
    assert losses.parts["contrastive"] == losses.total
    mixture = model.image_head.mix(model.vision(model.pixels(batch.images[0])))
    assert losses.parts["image_codes"].item() == (mixture.weights > 0).sum(1).float().mean().item()
    assert 1 < losses.parts["text_codes"].item() < SMALL.codes


@pytest.mark.parametrize("heads", [replace(SMALL, codes=1), replace(SMALL, temperature=1e9)], ids=["one code", "hot"])
def test_a_mixture_without_a_choice_is_at_chance(make_model, batch, heads):
    loss = Objective(make_model(), Config(heads))(batch).total
    assert loss.item() == pytest.approx(np.log(8), abs=1e-4)


def test_another_order_of_codes_on_one_side_costs_the_match(make_model, batch):
    """The card's control: were codes not used, nothing would change."""
    torch.manual_seed(0)
    objective = Objective(make_model(), Config(SMALL, multi_positive=False))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        objective(batch).total.backward()
        optimizer.step()

    def hits() -> float:
        encoded = objective.encode(batch)
        found = (encoded.images[0] @ encoded.texts[0].T).argmax(1)
        return (found == torch.arange(8)).float().mean().item()

    assert hits() == 1.0
    head, order = objective.model.text_head, torch.randperm(SMALL.codes, generator=torch.Generator().manual_seed(0))
    objective.model.text_head = Renamed(head, torch.arange(SMALL.codes))
    assert hits() == 1.0
    objective.model.text_head = Renamed(head, order)
    assert hits() <= 0.5


class Renamed(torch.nn.Module):
    """The weights of a head, spent on codes in another order."""

    def __init__(self, head: CodebookHead, order: Tensor) -> None:
        super().__init__()
        self.head, self.order = head, order

    def forward(self, output: TowerOutput) -> Tensor:
        return self.head.mix(output).weights @ self.head.codebook[self.order]


# --- which heads ---


def test_a_model_without_a_codebook_gets_one(make_model):
    model = make_model()
    objective = Objective(model, Config(SMALL))
    assert objective.model is model and has_codebook(model)
    assert model.config.image_head == model.config.text_head == SMALL


def test_a_trained_codebook_is_kept(make_model):
    model = make_model()
    add_codebook(model, SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Objective(model, Config(SMALL))
    Objective(model, Config(None))
    with pytest.warns(
        UserWarning, match=r"has a codebook already \(CodebookHeadConfig\(codes=24.*objective.heads has no effect"
    ):
        Objective(model, Config(replace(SMALL, codes=5)))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_bad_settings_are_refused(make_model):
    with pytest.raises(ConfigError, match="temperature of a codebook must be > 0"):
        Objective(make_model(), Config(replace(SMALL, temperature=-1.0)))


@pytest.mark.parametrize("modes", [("frozen", "frozen"), ("full", "full"), ("lora", "lora"), ("frozen", "full")])
def test_it_trains_with_towers_in_any_mode(make_model, batch, modes, tmp_path):
    model = make_model()
    for tower, mode in zip((model.vision, model.text), modes, strict=True):
        set_mode(tower, mode)
    objective = Objective(model, Config(SMALL))
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for step in range(1, 13):
        optimizer.zero_grad()
        losses.append(accumulate_gradients(objective, [batch, batch], 2, torch.autocast("cpu", enabled=False))[0].total)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        optimizer.step()
        objective.after_step(step)
    assert losses[-1] < 0.8 * losses[0]
    save_model(model.eval(), tmp_path / "saved")
    with torch.no_grad():
        again = load_model(tmp_path / "saved").encode_image(batch.images[0])
        torch.testing.assert_close(again, model.encode_image(batch.images[0]), rtol=0, atol=1e-5)


def test_a_cached_step_gives_the_gradient_of_the_whole_batch(make_model, batch):
    whole, cached = (Objective(make_model(), Config(SMALL)).train() for _ in range(2))
    cached.load_state_dict(whole.state_dict())
    expected = whole(batch)
    expected.total.backward()
    parts = [rows(batch, 0, 3), rows(batch, 3, 8)]
    (found,) = cached_gradients(cached, [*parts, *parts], 2, torch.autocast("cpu", enabled=False))
    torch.testing.assert_close(found.total, expected.total.detach())
    assert torch.equal(cached.mean_support, whole.mean_support) and whole.mean_support.all()
    for one, two in zip(cached.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-5)


# --- the watch on the codebook ---


def seen(image_codes: float, text_codes: float) -> FDTEmbeddings:
    """Return embeddings of two samples that took so many codes on average."""
    one = torch.eye(2, 8)
    counts = tuple(torch.tensor([int(2 * mean) - 1, 1]) for mean in (image_codes, text_codes))
    return FDTEmbeddings((one,), (one,), counts)


def watch(objective: Objective, batch: Batch, steps: int, *codes: float, first: int = 1) -> list[str]:
    """Take steps in which so many codes are used; return what is said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(first, first + steps):
            objective.loss(seen(*codes), batch)
            objective.after_step(step)
    return [str(warning.message) for warning in said]


@pytest.fixture
def objective(make_model) -> Objective:
    return Objective(make_model(), Config(SMALL, multi_positive=False)).train()


@pytest.mark.parametrize(
    ("codes", "sentence"),
    [
        ((1.5, 10.0), "each image has used 1.5 of 24 .* dead.*raise"),
        ((10.0, 22.0), "each text has used 22.0 .* saturated.*lower"),
    ],
)
def test_a_codebook_out_of_bounds_is_spoken_of_once(objective, batch, codes, sentence):
    assert watch(objective, batch, PATIENCE - 1, *codes) == []
    (said,) = watch(objective, batch, 1, *codes, first=PATIENCE)
    assert said.startswith(f"Step {PATIENCE}: for {PATIENCE} steps")
    with pytest.warns(UserWarning, match=sentence):
        warnings.warn(said, stacklevel=1)
    assert watch(objective, batch, 2 * PATIENCE, *codes) == []


def test_one_good_step_starts_the_count_anew(objective, batch):
    for codes in ((2.5, 21.5), (1.5, 10.0)):  # just inside; then outside, but not for long
        assert watch(objective, batch, PATIENCE - 1, *codes) == []
    assert watch(objective, batch, 1, 10.0, 10.0) == []
    assert watch(objective, batch, PATIENCE - 1, 1.5, 10.0) == []
    assert objective.steps_out_of_bounds.tolist() == [PATIENCE - 1, 0]


def test_the_count_is_part_of_the_state(objective, batch, make_model):
    watch(objective, batch, PATIENCE - 1, 1.5, 1.5)
    resumed = Objective(make_model(), Config(SMALL, multi_positive=False)).train()
    resumed.load_state_dict(objective.state_dict())
    assert len(watch(resumed, batch, 1, 1.5, 1.5)) == 2


def test_a_resumed_run_ends_in_the_same_weights(make_model, drawings, tmp_path, monkeypatch):
    small = replace(mini(), objective=Config(SMALL), epochs=4, save_every=3, device="cpu", precision="fp32")
    small = replace(small, data=replace(small.data, batch_size=6))

    def run(folder: Path, *, seed: int = 0, resume: bool = False) -> Objective:
        objective = Objective(make_model(seed), small.objective)
        loader = make_loader(small, drawings(12), objective.model)
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        fit(objective, loader, small, folder, console=Console(quiet=True), resume=resume)
        return objective

    expected = run(tmp_path / "whole").state_dict()
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Objective, "after_step", stop_at(5, Objective.after_step))
        run(tmp_path / "cut")
    found = run(tmp_path / "cut", seed=1, resume=True).state_dict()
    assert found["steps_out_of_bounds"].tolist() == expected["steps_out_of_bounds"].tolist()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def stop_at(last: int, after_step):
    def stopping(self: Objective, step: int) -> None:
        after_step(self, step)
        if step == last:
            raise InterruptedError

    return stopping


def test_evaluation_and_other_normalisers_are_not_watched(make_model, batch, objective):
    assert watch(objective.eval(), batch, 1, 20.0, 20.0) == []
    assert not objective.mean_support.any()
    soft = Objective(make_model(), Config(replace(SMALL, normaliser="softmax"))).train()
    assert watch(soft, batch, PATIENCE + 1, 24.0, 24.0) == []


# --- recipes, claims, example ---


@pytest.fixture
def trained(monkeypatch) -> list[Recipe]:
    """Return the list of recipes that `measure` trains; scenes are few in this test."""
    monkeypatch.setattr(fdt, "drawn", lambda split, count: scenes(split, count=24, config=fdt.SCENES))
    return []


def measure(arm: Arm, point: Mapping[str, object], trained: list[Recipe]) -> float:
    """Run an arm on a few samples for one epoch."""

    def train(recipe: Recipe, source: AbstractSource) -> DualEncoder:
        trained.append(recipe)
        small = replace(recipe, epochs=1, data=replace(recipe.data, batch_size=8))
        few = Subset(source, range(16), source.name)
        return train_quietly(small, few, load_method(recipe.method), seed=0)[0]

    return arm.run(Trial(0, "test", point, lambda slug: load_method(slug).mini(), train))


def test_the_arms_differ_in_what_they_say(trained):
    scene_claim, photo_claim = claim()
    check(claim(), "fdt")
    for arm in scene_claim.arms:
        for point in arm.grid:
            assert 0 <= measure(arm, point, trained) <= 1
    assert len(trained) == 8
    assert_arms(trained)
    assert [arm.name for arm in photo_claim.arms] == [arm.name for arm in scene_claim.arms[:3]]


@pytest.mark.slow
@pytest.mark.data
def test_the_arms_on_photos(data, trained, monkeypatch):
    monkeypatch.setattr(fdt, "open_source", lambda spec: Subset(open_source(spec), range(24), spec))
    for arm in claim()[1].arms:
        for point in arm.grid:
            assert 0 <= measure(arm, point, trained) <= 1
    assert_arms(trained)


def assert_arms(trained: list[Recipe]) -> None:
    assert [recipe.method for recipe in trained] == ["clip"] * 2 + ["fdt"] * (len(trained) - 2)
    method, control, apart = ([r.objective.heads for r in trained[i : i + 2]] for i in (2, 4, 6))
    assert method[0].temperature != method[1].temperature and all(heads.shared for heads in method)
    assert apart in ([], [replace(heads, shared=False) for heads in method])
    assert control == [replace(heads, pool="mean", normaliser="softmax", temperature=1000.0) for heads in method]
    rates = [recipe.optimizer.lr for recipe in trained]
    assert rates[:2] == rates[4:6] and rates[0] != rates[1] and set(rates[2:4] + rates[6:]) == {rates[0]}
    same = [replace(r, method="", objective=None, optimizer=replace(r.optimizer, lr=0.0)) for r in trained]
    assert all(recipe == same[0] for recipe in same)


def test_the_control_must_not_beat_the_baseline():
    control = claim()[0].control
    assert control.passed({"baseline": [0.3, 0.2], "method": [0.4, 0.4], "control": [0.3, 0.1]})
    assert not control.passed({"baseline": [0.3, 0.2], "method": [0.4, 0.4], "control": [0.3, 0.3]})


def test_the_defaults_are_the_papers():
    heads = Config().heads
    assert (heads.codes, heads.dim, heads.temperature) == (16384, 512, 1000.0)
    assert (heads.normaliser, heads.pool, heads.shared) == ("sparsemax", "max", True)


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "fdt.py"), run_name="__main__")
    assert "Code " in (tmp_path / "runs" / "concepts" / "concepts.html").read_text()


@pytest.mark.slow
@pytest.mark.data
def test_a_codebook_on_pretrained_towers_from_the_command_line(data, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["train", "flickr8k-1k:dev", "--method", "fdt", "--model.start", "lite0-minilm", "--out", str(out)]
    small = ["--epochs", "2", "--data.batch-size", "32", "--objective.heads.codes", "64", "--no-check"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *small])
    assert stop.value.code == 0
    model = load(out)
    assert isinstance(model.image_head, CodebookHead) and model.image_head.codebook.shape == (64, 256)
    patches = model.vision(torch.zeros(1, 3, 224, 224))
    assert patches.grid == (7, 7) and model.image_head.scores(patches).shape == (1, 49, 64)
    assert {name.partition(".")[0] for name in load_file(out / "checkpoint" / "model.safetensors")} == {
        "image_head",
        "text_head",
        "log_scale",
    }
