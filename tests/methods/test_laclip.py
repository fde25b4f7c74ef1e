import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from numpy.testing import assert_allclose
from torch.nn.functional import normalize

from by_hand import pairs
from diptych.claims.claim import Trial
from diptych.claims.measures import drawn_scenes
from diptych.claims.reproduce import check
from diptych.claims.train import train_quietly
from diptych.data.loader import Loader, LoaderConfig, TextColumn
from diptych.data.sources import AbstractSource, Listed
from diptych.data.tokenizer import hash_strings
from diptych.losses.contrastive import info_nce
from diptych.methods import clip, load_method
from diptych.methods.laclip import (
    REWRITTEN,
    UNSEEN,
    Config,
    Objective,
    claim,
    mini,
    others_as_rewrites,
    recipe,
    with_copies,
    with_rules,
)
from diptych.models.modes import set_mode
from diptych.training.recipe import Recipe
from diptych.types import Batch, PairEmbeddings, Sample, Text


def batch_of(keys: tuple[list[int], ...]) -> Batch:
    return pairs(range(len(keys[0])), *keys)


def with_rewrites(source: AbstractSource, count: int) -> Listed:
    return Listed(
        [
            replace(s, texts=(*s.texts, *(Text(f"rewrite {i} of {s.key}", "rewrite") for i in range(count))))
            for s in source
        ]
    )


@pytest.mark.parametrize("case", ["loss_f64", "loss_f32"])
def test_official_numbers(golden, make_model, case):
    numbers = golden("laclip", case)
    close = {"rtol": 1e-9, "atol": 1e-12} if case == "loss_f64" else {"rtol": 1e-4, "atol": 1e-5}
    image, text, scale = (
        torch.tensor(numbers[name]).requires_grad_() for name in ("image_embed", "text_embed", "logit_scale")
    )
    made = Objective(make_model(), Config())
    made.model.log_scale = torch.nn.Parameter(scale.detach().log())
    encoded = PairEmbeddings((normalize(image, dim=-1),), (normalize(text, dim=-1),))
    losses = made.loss(encoded, batch_of(([*range(len(image))],)))
    losses.total.backward()
    assert_allclose(losses.total.item(), numbers["loss"], **close)
    assert_allclose(image.grad, numbers["grad_image_embed"], **close)
    assert_allclose(text.grad, numbers["grad_text_embed"], **close)
    # d/d(scale) = d/d(log scale) / scale
    assert_allclose(made.model.log_scale.grad.item() / numbers["logit_scale"], numbers["grad_logit_scale"], **close)
    accuracy = 100 * ((encoded.images[0] @ encoded.texts[0].T).argmax(1) == torch.arange(len(image))).float().mean()
    assert_allclose(accuracy.item(), numbers["clip_acc"], rtol=1e-6)


def test_without_rewrites_batches_and_losses_are_those_of_clip(make_model, drawings):
    model, source = make_model(), drawings(8)
    ours, theirs = (
        Loader(source, model.image_policy, model.tokenizer, LoaderConfig(batch_size=4, texts=(column,)), seed=3)
        for column in (REWRITTEN, TextColumn())
    )
    laclip, base = Objective(model, Config()), clip.Objective(model, clip.Config())
    for _, one, other in zip(range(4), ours, theirs, strict=False):
        assert one.keys == other.keys and torch.equal(one.texts[0].ids, other.texts[0].ids)
        assert torch.equal(one.images[0], other.images[0])
        assert laclip(one).total == base(other).total


def test_copies_change_nothing(make_model, drawings):
    model, source = make_model(), drawings(8)
    settings = LoaderConfig(batch_size=8, texts=(REWRITTEN,))
    plain, copied = (
        next(iter(Loader(s, model.image_policy, model.tokenizer, settings))) for s in (source, with_copies(source, 4))
    )
    assert torch.equal(plain.texts[0].ids, copied.texts[0].ids) and torch.equal(plain.images[0], copied.images[0])


def test_rewrites_are_drawn_anew_each_time(make_model, drawings):
    model, source = make_model(), with_rewrites(drawings(8), 4)
    loader = Loader(source, model.image_policy, model.tokenizer, LoaderConfig(batch_size=8, texts=(REWRITTEN,)))
    seen = {key for _, batch in zip(range(40), loader, strict=False) for key in batch.texts[0].key.tolist()}
    assert seen == set(hash_strings([text.text for sample in source for text in sample.texts]).tolist())  # all 40 texts


@pytest.mark.parametrize("rewrite", ["tree", "", " x"])
def test_a_rewrite_of_one_word_gives_way_to_the_original(rewrite):
    import numpy as np

    sample = Sample("x", None, (Text("a tall tree"), Text(rewrite, "rewrite")), "x")
    assert {REWRITTEN.draw(sample, np.random.default_rng(seed)) for seed in range(20)} == {"a tall tree"}


def test_several_columns_are_averaged(make_model):
    generator = torch.Generator().manual_seed(0)
    image, one, two = normalize(torch.randn(3, 5, 8, generator=generator, dtype=torch.float64), dim=-1)
    made = Objective(make_model(), Config())
    keys = [*range(5)]
    found = made.loss(PairEmbeddings((image,), (one, two)), batch_of((keys, keys))).total
    scale = made.model.scale
    torch.testing.assert_close(found, (info_nce(image, one, scale) + info_nce(image, two, scale)) / 2)
    same = made.loss(PairEmbeddings((image,), (one, one, one)), batch_of((keys,) * 3)).total
    torch.testing.assert_close(same, info_nce(image, one, scale), rtol=1e-12, atol=0)


def test_each_column_has_its_own_positives(make_model):
    generator = torch.Generator().manual_seed(0)
    image, text = normalize(torch.randn(2, 3, 8, generator=generator), dim=-1)
    made, keys = Objective(make_model(), Config()), ([0, 1, 2], [5, 5, 6])
    positives = torch.eye(3, dtype=torch.bool)
    positives[0, 1] = positives[1, 0] = True
    scale = made.model.scale
    expected = (info_nce(image, text, scale) + info_nce(image, text, scale, positives=positives)) / 2
    torch.testing.assert_close(made.loss(PairEmbeddings((image,), (text, text)), batch_of(keys)).total, expected)
    plain = Objective(made.model, Config(multi_positive=False))
    torch.testing.assert_close(
        plain.loss(PairEmbeddings((image,), (text, text)), batch_of(keys)).total, info_nce(image, text, scale)
    )


@pytest.mark.parametrize("modes", [("frozen", "frozen"), ("full", "frozen"), ("lora", "lora")], ids=str)
def test_frozen_and_lora_towers_get_finite_gradients_where_they_learn(make_model, drawings, modes):
    if "lora" in modes:
        pytest.importorskip("peft")
    model = make_model()
    for tower, mode in zip((model.vision, model.text), modes, strict=True):
        set_mode(tower, mode)
    made = Objective(model, Config())
    two = LoaderConfig(batch_size=4, texts=(REWRITTEN, REWRITTEN))
    source = with_rewrites(drawings(8), 2)
    made(next(iter(Loader(source, model.image_policy, model.tokenizer, two)))).total.backward()
    for name, parameter in made.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_both_recipes_draw_every_text_equally_often():
    for settings in (recipe(), mini()):
        assert settings.data.texts == (TextColumn(("caption", "rewrite"), by="text", min_words=2),)


class TestClaims:
    def test_they_are_well_formed(self):
        assert [one.name for one in claim()] == ["scenes", "photos"]
        check(claim(), "laclip")

    def test_the_control_is_judged(self):
        passed = claim()[0].control.passed
        assert passed({"baseline": [0.2, 0.3], "control": [0.1, 0.3]})
        assert not passed({"baseline": [0.2, 0.3], "control": [0.3, 0.3]})

    def test_test_paraphrases_are_not_trained_on(self):
        source = with_rules(drawn_scenes("train", 40))
        trained = {text.text for i in range(40) for text in source.texts(i)}
        captions = [source.texts(i)[0].text for i in range(40)]
        assert [len(source.texts(i)) for i in range(40)] == [5] * 40
        assert not trained & set(UNSEEN.write(captions, "both", seed=0))

    def test_other_captions_become_rewrites(self, drawings):
        source = Listed([replace(s, texts=(Text("one"), Text("two"), Text("three"))) for s in drawings(2)])
        assert [t.role for t in others_as_rewrites(source, True)[0].texts] == ["caption", "rewrite", "rewrite"]
        assert [t.text for t in others_as_rewrites(source, False)[0].texts] == ["one"]

    @pytest.mark.slow
    @pytest.mark.data
    @pytest.mark.parametrize("name", ["scenes", "photos"])
    def test_every_arm_runs(self, name, data):
        (one,) = (one for one in claim() if one.name == name)
        trained: list[Recipe] = []

        def train(settings: Recipe, source: AbstractSource):
            small = Listed([source[index] for index in range(96)], source.name)
            settings = replace(settings, epochs=1, data=replace(settings.data, batch_size=48))
            trained.append(settings)
            return train_quietly(settings, small, load_method(settings.method), seed=0)[0]

        values = {
            arm.name: arm.run(Trial(0, "test", {}, lambda slug: load_method(slug).mini(), train)) for arm in one.arms
        }
        assert all(0 <= value <= 1 for value in values.values())
        assert len({(s.epochs, s.optimizer, s.model) for s in trained}) == 1  # arms share model and budget
        if name == "scenes":
            assert math.isclose(values["four copies"], values["original captions"])


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "laclip.py"), run_name="__main__")
    assert "kept" in capsys.readouterr().out
