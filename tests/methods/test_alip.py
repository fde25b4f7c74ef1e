import math
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from numpy.testing import assert_allclose
from rich.console import Console
from torch import Tensor
from torch.nn.functional import normalize

from by_hand import pairs
from diptych.claims.claim import Trial
from diptych.claims.measures import auroc
from diptych.claims.reproduce import check
from diptych.data.loader import Loader, LoaderConfig
from diptych.data.sources import AbstractSource, Listed
from diptych.errors import ConfigError, TextError
from diptych.losses.contrastive import info_nce
from diptych.losses.per_sample import info_nce_per_sample
from diptych.methods import clip, load_method
from diptych.methods.alip import (
    TEXTS,
    Config,
    ConsistencyGate,
    Objective,
    claim,
    gate_weights,
    mini,
    recipe,
    similarities,
)
from diptych.models.dual import MAX_LOG_SCALE
from diptych.models.modes import set_mode
from diptych.training.loop import fit
from diptych.training.recipe import Recipe
from diptych.training.step import accumulate_gradients, cached_gradients
from diptych.types import Batch, PairEmbeddings, Text

CLOSE = {"f64": {"rtol": 1e-9, "atol": 1e-12}, "f32": {"rtol": 1e-4, "atol": 1e-5}}


def batch_of(n: int, group: list[int] | None = None, keys: tuple[list[int], ...] | None = None) -> Batch:
    return pairs(group or range(n), *(keys or (range(n), range(n))))


def unit(n: int, seed: int = 0, *, sides: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(normalize(torch.randn(sides, n, 6, generator=generator, dtype=torch.float64), dim=-1))


def objective(make_model, **settings) -> Objective:
    return Objective(make_model(), Config(**settings)).double()


def total(made: Objective, image: Tensor, text: Tensor, caption: Tensor) -> Tensor:
    return made.loss(PairEmbeddings((image,), (text, caption)), batch_of(len(image))).total


@pytest.mark.parametrize("tolerance", [0.0, 1e-6], ids=["official", "default"])
@pytest.mark.parametrize("case", ["steps_f64", "steps_f32", "half_identical"])
def test_official_numbers(golden, make_model, case, tolerance):
    numbers, close = golden("alip", case), CLOSE["f32" if case.endswith("f32") else "f64"]
    dtype = torch.float32 if case.endswith("f32") else torch.float64
    made = Objective(make_model(), Config(tolerance=tolerance)).to(dtype)
    made.train()
    for step in range(len(numbers["loss"])):
        image, text, caption = (
            torch.tensor(numbers[name][step], requires_grad=True) for name in ("image", "text", "caption")
        )
        made.model.log_scale = torch.nn.Parameter(torch.tensor(numbers["logit_scale_log"][step], dtype=dtype))
        losses = made.loss(PairEmbeddings((image,), (text, caption)), batch_of(len(image)))
        losses.total.backward()
        found = {
            "loss": losses.total,
            "loss_text": losses.parts["text"],
            "loss_caption": losses.parts["caption"],
            "hist_tc": made.gate.history[0],
            "hist_xt": made.gate.history[1],
            "hist_xc": made.gate.history[2],
            "grad_image": image.grad,
            "grad_text": text.grad,
            "grad_caption": caption.grad,
            "grad_logit_scale_log": made.model.log_scale.grad,
        }
        similarity = similarities(image, text, caption).detach()
        weights = gate_weights(similarity, made.gate.history, made.config)
        found |= dict(zip(("sim_tc", "sim_xt", "sim_xc"), similarity, strict=True))
        found |= {
            "weight_sample": weights.sample,
            "weight_text_pair": weights.text,
            "weight_caption_pair": weights.caption,
        }
        scale = made.model.scale.detach()
        found["per_sample_nce_text"] = info_nce_per_sample(image, text, scale)
        found["per_sample_nce_caption"] = info_nce_per_sample(image, caption, scale)
        for name, value in found.items():
            assert_allclose(value.detach().numpy(), numbers[name][step], **close, err_msg=f"step {step}, {name}")


def test_the_official_loss_alone(golden):
    numbers = {name: torch.tensor(value) for name, value in golden("alip", "loss_only").items()}
    image, text = (numbers[name].requires_grad_() for name in ("image", "text"))
    per_sample = info_nce_per_sample(image, text, numbers["logit_scale"])
    loss = (numbers["weight_sample"] * numbers["weight_pair"] * per_sample).mean()
    loss.backward()
    assert_allclose(loss.item(), numbers["loss"], rtol=1e-9)
    assert_allclose(image.grad, numbers["grad_image"], rtol=1e-9, atol=1e-12)
    assert_allclose(text.grad, numbers["grad_text"], rtol=1e-9, atol=1e-12)


def test_switched_off_it_is_clip(make_model, drawings):
    model, source = make_model(), with_captions(drawings(8))
    one_text = LoaderConfig(batch_size=8, texts=TEXTS[:1])
    batch = next(iter(Loader(source, model.image_policy, model.tokenizer, one_text)))
    off, base = Objective(model, Config(synthetic=False)), clip.Objective(model, clip.Config())
    found, expected = off(batch), base(batch)
    torch.testing.assert_close(found.total, expected.total, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(losses.total, [*model.parameters()]) for losses in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("settings", [{"gates": ()}, {"gamma_sample": 0.0, "gamma_pair": 0.0}], ids=str)
def test_without_gates_it_is_two_losses(make_model, settings):
    made, (image, text, caption) = objective(make_model, **settings), unit(7)
    made.train()
    scale = made.model.scale
    expected = info_nce(image, text, scale) + info_nce(image, caption, scale)
    torch.testing.assert_close(total(made, image, text, caption), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("gates", [("sample",), ("text",), ("caption",), ("sample", "text", "caption")], ids=str)
def test_the_gates_of_the_ablation(make_model, gates):
    made, (image, text, caption) = objective(make_model, gates=gates), unit(7)
    made.train()
    found = total(made, image, text, caption)
    weights = gate_weights(similarities(image, text, caption), made.gate.history, made.config)
    by_name = {name: getattr(weights, name) if name in gates else 1.0 for name in ("sample", "text", "caption")}
    scale = made.model.scale
    expected = (by_name["sample"] * by_name["text"] * info_nce_per_sample(image, text, scale)).mean()
    expected = expected + (by_name["sample"] * by_name["caption"] * info_nce_per_sample(image, caption, scale)).mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_weights_by_hand():
    similarity = torch.tensor([[0.0, 0.9, 0.5], [0.8, 0.1, 0.3], [0.2, 0.1, 0.0]], dtype=torch.float64)
    weights = gate_weights(similarity, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), Config())
    assert_allclose(weights.sample, [math.exp(-1), 1, 1])
    assert_allclose(weights.text, [math.e, 1, 1])  # above 1: a good pair in a doubted sample
    assert_allclose(weights.caption, [1, 1, 1])


def test_samples_above_the_history_are_trusted_whatever_their_pairs_say():
    similarity = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) * 2 - 1
    similarity[0] = 0.3
    weights = gate_weights(similarity, torch.tensor([0.2, 0.9, -0.9]), Config())
    for weight in (weights.sample, weights.text, weights.caption):
        assert torch.equal(weight, torch.ones(50))


def test_equal_texts_are_trusted_within_rounding(make_model):
    made = objective(make_model).float()
    made.train()
    image, text, _ = (x.float() for x in unit(40))
    found = total(made, image, text, text.clone())
    torch.testing.assert_close(found, 2 * info_nce(image, text, made.model.scale), rtol=1e-5, atol=0)
    exact = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, -0.5]])
    weights = gate_weights(similarities(exact.flip(0), exact, exact), torch.ones(3), Config(tolerance=0.0))
    assert torch.equal(weights.sample, torch.ones(2)) and torch.equal(weights.text, torch.ones(2))


def test_weights_are_constants_to_the_gradient(make_model):
    made, (image, text, caption) = objective(make_model), unit(6)
    made.train()
    image = image.clone().requires_grad_()
    found = torch.autograd.grad(total(made, image, text, caption), image)[0]
    with torch.no_grad():
        weights = gate_weights(similarities(image, text, caption), made.gate.history, made.config)
    scale = made.model.scale
    constant = (weights.sample * weights.text * info_nce_per_sample(image, text, scale)).mean()
    constant = constant + (weights.sample * weights.caption * info_nce_per_sample(image, caption, scale)).mean()
    torch.testing.assert_close(found, torch.autograd.grad(constant, image)[0], rtol=1e-10, atol=1e-14)


def test_the_history_forgets_its_start_as_by_the_formula():
    gate = ConsistencyGate(Config()).double()
    image, text, caption = unit(5)
    means = similarities(image, text, caption).mean(1)
    for _ in range(100):
        gate(image, text, caption)
    assert_allclose(gate.history, means + (1 - means) * 0.99**100, rtol=1e-12)


def test_the_history_may_start_at_the_first_batch():
    gate = ConsistencyGate(Config(history_start="first_batch", momentum=0.9)).double()
    first, second = unit(5), unit(5, seed=1)
    gate.eval()
    assert torch.equal(gate(*first).sample, torch.ones(5, dtype=torch.float64))  # nothing to compare with yet
    gate.train()
    gate(*first)
    assert_allclose(gate.history, similarities(*first).mean(1), rtol=1e-12)
    gate(*second)
    assert_allclose(gate.history, 0.9 * similarities(*first).mean(1) + 0.1 * similarities(*second).mean(1), rtol=1e-12)


def test_looking_does_not_move_the_history(make_model):
    made = objective(make_model)
    made.eval()
    assert total(made, *unit(6)) == total(made, *unit(6))
    assert torch.equal(made.gate.history, torch.ones(3, dtype=torch.float64))


def test_misplaced_weights_are_the_same_weights_elsewhere(make_model):
    made, other = objective(make_model), objective(make_model, misplaced=True)
    made.train(), other.train()
    encoded = PairEmbeddings((unit(6)[0],), unit(6)[1:])
    one, two = made.loss(encoded, batch_of(6)), other.loss(encoded, batch_of(6))
    assert one.total != two.total
    assert one.parts["weight_sample"] == pytest.approx(two.parts["weight_sample"].item(), rel=1e-12)


def test_each_text_has_its_own_positives(make_model):
    made, (image, text, caption) = objective(make_model, gates=()), unit(4)
    same = batch_of(4, keys=([0, 1, 2, 3], [7, 7, 8, 9]))
    found = made.loss(PairEmbeddings((image,), (text, caption)), same)
    positives = torch.eye(4, dtype=torch.bool)
    positives[0, 1] = positives[1, 0] = True
    assert found.parts["text"].item() == pytest.approx(info_nce(image, text, made.model.scale).item(), rel=1e-12)
    expected = info_nce(image, caption, made.model.scale, positives=positives)
    assert found.parts["caption"].item() == pytest.approx(expected.item(), rel=1e-12)
    plain = objective(make_model, gates=(), multi_positive=False)
    assert plain.loss(PairEmbeddings((image,), (text, caption)), same).parts["caption"].item() != pytest.approx(
        expected.item()
    )


def test_the_scale_is_clamped_at_100(make_model):
    made, encoded = objective(make_model, gates=()), unit(5)
    with torch.no_grad():
        made.model.log_scale.fill_(50.0)
        high = total(made, *encoded)
        made.model.log_scale.fill_(MAX_LOG_SCALE)
        assert high == total(made, *encoded)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), not 1.0"),
        ({"momentum": -0.1}, "momentum"),
        ({"gamma_pair": -2.0}, "must be >= 0"),
        ({"tolerance": -1e-3}, "must be >= 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Config(**settings)


def test_one_text_column_is_refused(make_model, drawings):
    model = make_model()
    one = LoaderConfig(batch_size=4, texts=TEXTS[:1])
    batch = next(iter(Loader(drawings(4), model.image_policy, model.tokenizer, one)))
    with pytest.raises(ConfigError, match=r"two text columns.*data\.texts"):
        Objective(model, Config())(batch)


def test_samples_without_a_synthetic_caption_are_skipped_or_stop(make_model, drawings):
    model = make_model()
    half = Listed([s if i % 2 else replace(s, texts=s.texts[:1]) for i, s in enumerate(with_captions(drawings(8)))])
    settings = LoaderConfig(batch_size=8, texts=TEXTS)
    batch = next(iter(Loader(half, model.image_policy, model.tokenizer, settings)))
    assert len(batch) == 4 and all("no text with a role in synthetic" in sentence for sentence in batch.skipped)
    with pytest.raises(TextError, match="synthetic"):
        next(iter(Loader(half, model.image_policy, model.tokenizer, replace(settings, bad_samples="strict"))))


def with_captions(source: AbstractSource) -> Listed:
    return Listed(
        [replace(s, texts=(*s.texts, Text(s.texts[0].text.split()[2], "synthetic"))) for s in source], source.name
    )


@pytest.fixture
def batches(make_model, drawings) -> Callable[[Objective], list[Batch]]:
    def make(made: Objective) -> list[Batch]:
        settings = LoaderConfig(batch_size=4, texts=TEXTS)
        loader = Loader(with_captions(drawings(12)), made.model.image_policy, made.model.tokenizer, settings)
        return [batch for _, batch in zip(range(2), loader, strict=False)]

    return make


@pytest.mark.parametrize("modes", [("frozen", "frozen"), ("full", "frozen"), ("lora", "lora")], ids=str)
def test_frozen_and_lora_towers_get_finite_gradients_where_they_learn(make_model, batches, modes):
    if "lora" in modes:
        pytest.importorskip("peft")
    model = make_model()
    for tower, mode in zip((model.vision, model.text), modes, strict=True):
        set_mode(tower, mode)
    made = Objective(model, recipe().objective)
    made.train()
    made(batches(made)[0]).total.backward()
    for name, parameter in made.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_accumulated_steps_move_the_history_once_per_batch_and_cached_steps_once(make_model, batches):
    from contextlib import nullcontext

    accumulated, cached = (Objective(make_model(), recipe().objective) for _ in range(2))
    two = batches(accumulated)
    accumulated.train(), cached.train()
    accumulate_gradients(accumulated, two, 2, nullcontext())
    cached_gradients(cached, [*two, *two], 2, nullcontext())
    encoded = [accumulated.encode(batch) for batch in two]
    means = [similarities(e.images[0], *e.texts).mean(1) for e in encoded]
    torch.testing.assert_close(accumulated.gate.history, 0.9 * means[0] + 0.1 * means[1])
    torch.testing.assert_close(cached.gate.history, (means[0] + means[1]) / 2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cached.parameters())


def test_a_resumed_run_ends_in_the_same_weights_and_history(make_model, drawings, tmp_path):
    source = with_captions(drawings(12))
    settings = Recipe("alip", Config(), data=LoaderConfig(batch_size=4, texts=TEXTS), epochs=3, save_every=4)

    def run(folder: Path, epochs: int, *, resume: bool = False) -> Objective:
        model = make_model()
        made = Objective(model, settings.objective)
        loader = Loader(source, model.image_policy, model.tokenizer, settings.data)
        folder.mkdir(exist_ok=True)
        fit(made, loader, replace(settings, epochs=epochs), folder, console=Console(quiet=True), resume=resume)
        return made

    whole = run(tmp_path / "whole", 3)
    stopped = run(tmp_path / "parts", 3)  # a finished run, resumed, stays as it is
    assert torch.equal(run(tmp_path / "parts", 3, resume=True).gate.history, stopped.gate.history)
    interrupted = tmp_path / "interrupted"
    with pytest.MonkeyPatch.context() as patch:
        loss, calls = Objective.loss, iter(range(100))

        def stop(self, encoded, batch):
            if next(calls) == 6:
                raise KeyboardInterrupt
            return loss(self, encoded, batch)

        patch.setattr(Objective, "loss", stop)
        with pytest.raises(KeyboardInterrupt):
            run(interrupted, 3)
    resumed = run(interrupted, 3, resume=True)
    assert whole.gate.history.max() < 1 - 1e-3
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_the_recipes_take_two_texts_and_settle_fast():
    for settings in (recipe(), mini()):
        assert [column.roles for column in settings.data.texts] == [("caption",), ("synthetic",)]
        assert settings.objective == Config(momentum=0.9, history_start="first_batch")


def test_the_defaults_are_those_of_the_official_code():
    config = Config()
    assert (config.momentum, config.gamma_sample, config.gamma_pair, config.history_start) == (0.99, 2.0, 2.0, "one")


class TestClaims:
    def test_they_are_well_formed(self):
        found = claim()
        assert [one.name for one in found] == ["captions", "gates", "detection"]
        check(found, "alip")

    def test_controls_are_judged(self):
        captions, gates, detection = (one.control.passed for one in claim())
        numbers = {"baseline": [0.1, 0.2, 0.1], "method": [0.5, 0.5, 0.5], "control": [0.1, 0.2, 0.2]}
        assert captions(numbers) and gates(numbers)
        assert not captions(numbers | {"control": [0.4, 0.4, 0.4]})
        assert detection({"control": [0.47, 0.53, 0.51]}) and not detection({"control": [0.6, 0.7, 0.5]})

    @pytest.mark.slow
    @pytest.mark.data
    @pytest.mark.parametrize("name", ["captions", "gates", "detection"])
    def test_every_arm_runs(self, name, data):
        (one,) = (one for one in claim() if one.name == name)
        trained: list[Recipe] = []

        def train(settings: Recipe, source: AbstractSource):
            from diptych.claims.train import train_quietly

            small = Listed([source[index] for index in range(96)], source.name)
            settings = replace(settings, epochs=1, data=replace(settings.data, batch_size=48))
            trained.append(settings)
            return train_quietly(settings, small, load_method(settings.method), seed=0)[0]

        for arm in one.arms:
            value = arm.run(Trial(0, "test", {}, lambda slug: load_method(slug).mini(), train))
            assert 0 <= value <= 1, arm.name
        assert len({str(settings) for settings in trained}) > 2  # arms differ
        assert len({(s.epochs, s.optimizer, s.model) for s in trained}) == 1  # and share model and budget


def test_weights_know_wrong_captions_of_a_model_that_knows_the_right_ones():
    image = caption = unit(40, sides=1)[0]
    wrong = torch.arange(40) < 10
    similarity = similarities(image, torch.where(wrong[:, None], image.roll(1, 0), image), caption)
    weights = gate_weights(similarity, similarity.mean(1), Config())
    assert auroc(-weights.sample * weights.text, wrong) > 0.9


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "alip.py"), run_name="__main__")
    assert "AUROC" in capsys.readouterr().out
