import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diptych.claims import lines, names
from diptych.claims.claim import Trial
from diptych.claims.reproduce import check
from diptych.claims.train import train_quietly
from diptych.data.loader import Loader
from diptych.data.sources import AbstractSource, Listed
from diptych.errors import ConfigError
from diptych.losses.contrastive import info_nce
from diptych.losses.supervised import pair_margin, supervised_contrastive
from diptych.methods import clip, clippings, load_method
from diptych.methods.clippings import Config, Objective, claim, mini, recipe, supervised
from diptych.models.pooling import pool
from diptych.training.recipe import Recipe
from diptych.types import Batch, PairEmbeddings, Tokens
from tiny_run import with_tiny_towers


def batch_of(labels) -> Batch:
    n = len(labels)
    text = Tokens(torch.zeros(n, 1, dtype=torch.int64), torch.ones(n, 1, dtype=torch.bool), torch.arange(n))
    return Batch(tuple(map(str, range(n))), (), (text,), torch.as_tensor(labels))


@pytest.fixture
def golden(data):
    def read(case: str) -> dict[str, torch.Tensor]:
        with np.load(data.parent / "golden" / "clippings.npz") as archive:
            return {
                name.removeprefix(f"{case}/"): torch.from_numpy(archive[name])
                for name in archive.files
                if name.startswith(f"{case}/")
            }

    return read


@pytest.mark.data
def test_official_pooled_loss(make_model, golden):
    numbers = golden("pooled_supcon")
    image, text = (numbers[name].requires_grad_() for name in ("image", "text"))
    config = Config("supervised", numbers["image_weight"].item(), temperature=numbers["temperature"].item())
    loss = Objective(make_model(), config).loss(PairEmbeddings((image,), (text,)), batch_of(numbers["labels"])).total
    loss.backward()
    assert loss.item() == pytest.approx(numbers["loss"].item(), abs=1e-5)
    torch.testing.assert_close(image.grad, numbers["grad.image"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text.grad, numbers["grad.text"], rtol=1e-4, atol=1e-5)


@pytest.mark.data
def test_official_alignment(make_model, golden):
    numbers = golden("infonce")
    model = make_model()
    with torch.no_grad():
        model.log_scale.copy_(numbers["logit_scale_log"])
    image, text = (numbers[name].requires_grad_() for name in ("image", "text"))
    loss = Objective(model, Config()).loss(PairEmbeddings((image,), (text,)), batch_of(range(5))).total
    loss.backward()
    assert loss.item() == pytest.approx(numbers["loss"].item(), abs=1e-4)
    torch.testing.assert_close(image.grad, numbers["grad.image"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.log_scale.grad, numbers["grad.logit_scale_log"], rtol=1e-4, atol=1e-4)


def unit(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(F.normalize(torch.randn(2, n, 6, generator=torch.Generator().manual_seed(seed)), dim=-1))


def total(model, config: Config, labels) -> torch.Tensor:
    image, text = unit(len(labels))
    return Objective(model, config).loss(PairEmbeddings((image,), (text,)), batch_of(labels)).total


def test_the_phases_are_the_losses_they_name(make_model):
    model, labels, (image, text) = make_model(), [0, 1, 0, 2, 1, 0], unit(6)
    label = torch.tensor(labels)
    pooled = pool(image, text)
    assert total(model, Config("supervised"), labels) == supervised_contrastive(pooled, label, 10.0)
    assert total(model, Config("supervised", temperature=0.05), labels) == supervised_contrastive(pooled, label, 20.0)
    assert total(model, Config("supervised", loss="margin", margin=0.7), labels) == pair_margin(
        pooled, label, negative=0.7
    )
    assert total(model, Config(), list(range(6))) == info_nce(image, text, model.scale)


def test_the_first_phase_is_clip_and_a_weight_of_1_or_0_is_one_modality_bit_by_bit(make_model):
    model, labels, (image, text) = make_model(), [0, 1, 0, 2, 1, 0], unit(6)
    base = clip.Objective(model, clip.Config()).loss(PairEmbeddings((image,), (text,)), batch_of(labels)).total
    assert total(model, Config(), labels) == base
    label = torch.tensor(labels)
    assert total(model, Config("supervised", 1.0), labels) == supervised_contrastive(image, label, 10.0)
    assert total(model, Config("supervised", 0.0), labels) == supervised_contrastive(text, label, 10.0)


def test_no_positives_teach_nothing_and_warn(make_model):
    with pytest.warns(UserWarning, match=r"data\.per_group"):
        assert total(make_model(), Config("supervised"), [0, 1, 2]) == 0


def test_settings_out_of_range_are_refused():
    for settings in ({"image_weight": 1.2}, {"temperature": 0.0}):
        with pytest.raises(ConfigError, match=r"image_weight must be in \[0, 1\]"):
            Config(**settings)


def test_the_second_phase_takes_batches_of_several_records_of_a_group():
    first = recipe()
    second = supervised(first, start="runs/a")
    assert second.objective.phase == "supervised" and second.model.start == "runs/a"
    assert (second.data.batch_size, second.data.per_group) == (126, 3)
    assert second.optimizer.lr == first.optimizer.lr / 10 and supervised(first).model == first.model


def test_a_supervised_run_brings_records_of_a_group_together(drawings):
    source = Listed([replace(s, group=f"g{i % 3}") for i, s in enumerate(drawings(12))])
    first = mini()
    architecture = with_tiny_towers(first.model.architecture)
    first = replace(
        first,
        model=replace(first.model, architecture=architecture),
        data=replace(first.data, batch_size=12),
        optimizer=replace(first.optimizer, ema_decay=None),
    )
    second = replace(supervised(first), epochs=12, optimizer=first.optimizer)
    second = replace(second, data=replace(second.data, batch_size=12, per_group=2))
    model, _ = train_quietly(replace(first, epochs=1), source, clippings, seed=0)
    label = torch.tensor([i % 3 for i in range(12)])
    batch = next(iter(Loader(source, model.image_policy, model.tokenizer, second.data)))

    def loss() -> float:
        objective = Objective(model, second.objective).eval()
        with torch.no_grad():
            return objective(batch).total.item()

    before = loss()
    train_quietly(second, source, clippings, seed=0, model=model)
    assert loss() < before - 0.1
    assert len(label) == len(batch)


class TestNames:
    def test_parts_share_no_entity_and_records_are_repeatable(self):
        pytest.importorskip("matplotlib"), pytest.importorskip("emoji")
        parts = {part: names.name_records(part, 0.25) for part in ("validation", "test")}
        groups = {part: {sample.group for sample in found.records} for part, found in parts.items()}
        assert (
            len(groups["validation"]) == 60 and len(groups["test"]) == 100 and not groups["validation"] & groups["test"]
        )
        again = names.name_records.__wrapped__("validation", 0.25)
        assert all(
            np.array_equal(a.image, b.image) and a.texts == b.texts
            for a, b in zip(again.records, parts["validation"].records, strict=True)
        )
        # Half of the entities have a record under another name.
        test = parts["test"]
        of = {
            group: {name for s, name in zip(test.records, test.names, strict=True) if s.group == group}
            for group in groups["test"]
        }
        assert sum(len(known) == 2 for known in of.values()) == 50

    def test_letters_are_misread_as_often_as_said(self):
        rng, name = np.random.default_rng(0), "parapluie"
        assert names.misread(name, 0.0, rng) == name
        kept = [
            sum(a == b for a, b in zip(name, names.misread(name, 0.25, rng), strict=False)) == len(name)
            for _ in range(4000)
        ]
        # "ll" for "l" and the like keep the first letters, so a few misread names count as kept.
        assert np.mean(kept) == pytest.approx(0.75**9, abs=0.03)

    def test_edit_similarity_by_hand(self):
        found = names.edit_similarity("kitten", ["sitting", "kitten", "", "kit", "mitten"])
        np.testing.assert_allclose(found, [1 - 3 / 7, 1, 0, 0.5, 1 - 1 / 6])


class TestClaims:
    def test_they_are_well_formed(self):
        check(claim(), "clippings")
        assert [one.name for one in claim()] == ["pooling", "labels", "strings", "ocr"]

    def test_controls_are_judged(self):
        pooling, labels, *_ = (one.control.passed for one in claim())
        numbers = {"baseline": [0.6, 0.6], "method": [0.8, 0.8], "control": [0.5, 0.5]}
        assert pooling(numbers) and labels(numbers)
        assert not pooling(numbers | {"control": [0.75, 0.7]}) and not labels(numbers | {"control": [0.75, 0.7]})

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["pooling", "labels", "strings", "ocr"])
    def test_every_arm_runs(self, name, monkeypatch, tmp_path):
        pytest.importorskip("matplotlib"), pytest.importorskip("emoji")
        if name == "ocr":
            pytest.importorskip("rapidocr")
        parts = {"train": 24, "validation": 6, "test": 8, "distractors": 10}
        for module in (names, lines):
            monkeypatch.setattr(module, "PARTS", parts)
        monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path))
        monkeypatch.setattr(clippings, "_FIRST", {})
        names.name_records.cache_clear(), lines.linked_lists.cache_clear()
        (one,) = (one for one in claim() if one.name == name)
        trained: list[Recipe] = []

        def train(settings: Recipe, source: AbstractSource, model=None):
            settings = replace(settings, epochs=1, data=replace(settings.data, batch_size=24))
            trained.append(settings)
            return train_quietly(settings, source, load_method(settings.method), seed=0, model=model)[0]

        for arm in one.arms:
            value = arm.run(Trial(0, "test", {}, lambda slug: load_method(slug).mini(), train))
            assert 0 <= value <= 1, arm.name
        phases = [settings.objective.phase for settings in trained]
        assert phases.count("align") == 2 - (name in ("labels", "ocr"))  # once per noise, not once per arm
        names.name_records.cache_clear(), lines.linked_lists.cache_clear()


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "clippings.py"), run_name="__main__")
    assert "f1" in capsys.readouterr().out
