import io
import math
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.data.loader import Loader, LoaderConfig, Position
from diptych.data.sources import Listed
from diptych.data.tokenizer import TextPolicy, Tokenizer
from diptych.methods.clip import Config, Objective
from diptych.training import doctor
from diptych.training.doctor import (
    Diagnosis,
    Finding,
    examine_source,
    examine_training,
    expected_repeats,
    near_identical,
    overfit,
)
from diptych.types import Sample, Text


def noise(seed: int, side: int = 20) -> bytes:
    """Return an image whose 8 x 8 thumbnail differs from all others."""
    pixels = np.random.default_rng(seed).integers(256, size=(8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def noises(count: int) -> list[Sample]:
    return [Sample(f"s{i}", noise(i), (Text(f"text {i}"),), f"s{i}") for i in range(count)]


@pytest.fixture
def examine(make_model):
    tokenizer = make_model().tokenizer
    return lambda samples, batch_size=4: examine_source(Listed(samples), tokenizer, batch_size)


def sentences(findings: Sequence[Finding], level: str) -> list[str]:
    return [finding.sentence for finding in findings if finding.level == level]


def test_good_data_have_nothing_but_good_findings(examine):
    findings = examine(noises(12))
    assert [finding.level for finding in findings] == ["good"] * 3
    assert findings[0].sentence == "12 samples."
    assert findings[1].sentence == "All images can be read."
    assert re.fullmatch(r"All texts fit: at most \d+ of 16 tokens\.", findings[2].sentence)
    assert Diagnosis(tuple(findings)).healthy


@pytest.mark.parametrize(("broken", "level"), [(1, "warning"), (4, "warning"), (5, "error"), (8, "error")])
def test_unreadable_images_are_an_error_when_they_are_more_than_half(examine, broken, level):
    samples = [replace(sample, image=b"x") if i < broken else sample for i, sample in enumerate(noises(8))]
    findings = examine(samples)
    (sentence,) = [s for s in sentences(findings, level) if "cannot be read" in s]
    assert sentence.startswith(f"{broken} images cannot be read and will be skipped. First, sample 0: 1 bytes")
    assert Diagnosis(tuple(findings)).healthy == (level == "warning")


def test_a_sample_without_an_image_counts_as_unreadable(examine):
    samples = noises(4)
    samples[2] = replace(samples[2], image=None)
    (sentence,) = sentences(examine(samples), "warning")
    assert sentence.startswith("1 images cannot be read and will be skipped. First, sample 2:")


def test_tiny_images_are_counted(examine):
    samples = noises(5)
    samples[0], samples[3] = replace(samples[0], image=noise(90, 15)), replace(samples[3], image=noise(91, 4))
    samples[1] = replace(samples[1], image=noise(92, 16))
    assert sentences(examine(samples), "warning") == [
        "2 images have a side under 16 pixels; little can be learnt from them."
    ]


def test_images_like_an_earlier_one_are_counted(examine):
    samples = noises(6)
    samples[3], samples[5] = replace(samples[3], image=noise(1)), replace(samples[5], image=noise(1))
    (sentence,) = sentences(examine(samples), "warning")
    assert sentence.startswith("2 images look almost like an earlier one.")


def test_near_identical_equals_a_double_loop():
    rng = np.random.default_rng(0)
    rows = rng.random((30, 192), dtype=np.float32)
    for i, spread in ((7, 0.005), (12, 0.0095), (19, 0.0105), (25, 0.02)):
        rows[i] = rows[i - 5] + spread * rng.choice([-1, 1], 192)  # root mean square difference = spread
    expected = sum(
        any(math.sqrt(float(((rows[i] - rows[j]) ** 2).mean())) < 0.01 for j in range(i)) for i in range(len(rows))
    )
    assert expected == 2
    assert near_identical(rows) == expected
    assert near_identical(rows, threshold=0.03) == 4
    assert near_identical(np.repeat(rows[:1], 5, axis=0)) == 4
    assert near_identical(rows[:1]) == 0


@pytest.mark.parametrize("texts", [(), (Text("not this", "hard_negative"),), (Text(" \n"),)])
def test_samples_without_a_text_are_counted(examine, texts):
    samples = noises(4)
    samples[1] = replace(samples[1], texts=texts)
    assert sentences(examine(samples), "warning") == ["1 samples have no text and will be skipped."]
    findings = examine([replace(sample, texts=texts) for sample in samples])
    assert sentences(findings, "error") == ["4 samples have no text and will be skipped."]
    assert not Diagnosis(tuple(findings)).healthy


def test_a_text_of_which_the_tokenizer_leaves_nothing_is_none(make_model):
    tokenizer = Tokenizer(make_model().tokenizer.engine, TextPolicy(length=16, clean="canonicalize"))
    samples = noises(4)
    samples[1] = replace(samples[1], texts=(Text("!?"),))
    findings = examine_source(Listed(samples), tokenizer, 4)
    assert sentences(findings, "warning") == ["1 samples have no text and will be skipped."]


def test_texts_that_will_be_cut_are_counted_over_all_texts(examine):
    samples = noises(3)
    # Digits are one token each, besides the space; 16 with the two ends.
    longest = Text("1 2 3 4 5 6 7")
    samples[0] = replace(samples[0], texts=(Text("a"), Text("9" * 200)))
    samples[1] = replace(samples[1], texts=(longest,))
    (sentence,) = sentences(examine(samples), "warning")
    assert sentence == "1 of 4 texts are longer than 16 tokens (longest 203) and will be cut at the end."


def test_repeated_captions_are_a_warning_from_one_per_batch_on(examine):
    samples = noises(8)
    for i in (1, 2, 3):
        samples[i] = replace(samples[i], texts=(Text("the same"),))
    # All eight in one batch: three share a caption. In a batch of two, 2 * 3 / 8 * 2 / 7 = 0.21 do.
    (sentence,) = sentences(examine(samples, batch_size=8), "warning")
    assert sentence.startswith("A batch of 8 holds about 3 samples whose caption another one also has.")
    assert sentences(examine(samples, batch_size=2), "warning") == []


@pytest.mark.parametrize("batch_size", [2, 5, 16])
def test_expected_repeats_against_simulation(batch_size):
    captions = np.array([*"aaaaabbbccd", *map(str, range(15))])
    rng = np.random.default_rng(batch_size)
    trials = 20_000
    found = 0
    for _ in range(trials):
        batch = captions[rng.permutation(len(captions))[:batch_size]]
        _, inverse, counts = np.unique(batch, return_inverse=True, return_counts=True)
        found += int((counts[inverse] > 1).sum())
    assert expected_repeats(captions.tolist(), batch_size) == pytest.approx(found / trials, rel=0.05)


def test_expected_repeats_by_hand():
    # Two of four share a caption; both are in a batch of two with probability 1/6.
    assert expected_repeats("aabc", 2) == pytest.approx(2 / 6)
    assert expected_repeats("aabc", 1) == 0
    assert expected_repeats("abcd", 4) == 0
    assert expected_repeats("aaaa", 3) == pytest.approx(3)
    assert expected_repeats("aabc", 100) == pytest.approx(2)
    assert expected_repeats("a", 2) == expected_repeats("", 2) == 0


def test_large_sources_are_sampled_evenly(examine, monkeypatch):
    monkeypatch.setattr(doctor, "LIMIT", 5)
    samples = [
        replace(sample, image=sample.image if i % 2 == 0 else b"", texts=sample.texts if i % 2 == 0 else ())
        for i, sample in enumerate(noises(9))
    ]
    findings = examine(samples)  # 0, 2, 4, 6, 8
    assert findings[0].sentence == "9 samples (looked at 5 of them)."
    assert sentences(findings, "warning") == sentences(findings, "error") == []


@pytest.fixture
def prepared(make_model, drawings):
    """Return a function that gives an objective and a loader."""

    def prepare(batch_size: int = 6, source: Listed | None = None) -> tuple[Objective, Loader]:
        source = source or drawings(12)
        model = make_model(0, [sample.texts[0].text for sample in source])
        loader = Loader(source, model.image_policy, model.tokenizer, LoaderConfig(batch_size=batch_size))
        return Objective(model, Config()), loader

    return prepare


def test_a_model_that_can_learn_is_told_so(prepared):
    objective, loader = prepared()
    start, learnt = examine_training(objective, loader)
    assert start.level == learnt.level == "good"
    assert "ln(6) = 1.79" in start.sentence
    first, last = map(float, re.findall(r"loss ([\d.]+) to ([\d.]+) in 40 steps", learnt.sentence)[0])
    assert f"First loss {first:.2f}" in start.sentence
    assert last < 0.7 * first


def test_a_frozen_model_cannot_learn_by_heart(prepared):
    objective, loader = prepared()
    objective.model.requires_grad_(False)
    objective.model.log_scale.requires_grad_(True)
    _, finding = examine_training(objective, loader)
    assert finding.level == "warning"
    assert "could not be learnt by heart" in finding.sentence and "model.vision_mode" in finding.sentence


def test_six_texts_of_one_image_cannot_be_learnt_by_heart(prepared):
    samples = [replace(sample, image=noise(0)) for sample in noises(6)]
    start, finding = examine_training(*prepared(6, Listed(samples)))
    assert start.level == "error" and "collapsed" in start.sentence
    assert finding.level == "warning" and "Are images and texts matched" in finding.sentence
    (last,) = map(float, re.findall(r"to ([\d.]+) in", finding.sentence))
    assert last >= 1.79  # ln 6: nothing tells the texts apart


def test_a_collapsed_model_is_an_error(prepared):
    objective, loader = prepared()
    with torch.no_grad():
        objective.model.vision.patch_embedding.weight.zero_()
    findings = examine_training(objective, loader)
    assert findings[0].level == "error" and "collapsed" in findings[0].sentence
    assert "mean cosine 1.0000" in findings[0].sentence


@pytest.mark.parametrize("count", [1, 12])
def test_a_batch_of_one_is_an_error(prepared, drawings, count):
    findings = examine_training(*prepared(1, drawings(count)))
    assert [finding.level for finding in findings] == ["good", "error"]
    assert "nothing to contrast" in findings[1].sentence


def test_the_objective_and_the_loader_are_left_alone(prepared):
    objective, loader = prepared()
    objective.model.vision.requires_grad_(False)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    examine_training(objective, loader)
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    assert all(p.grad is None for p in objective.parameters())
    assert objective.training and not objective.model.vision.training  # frozen towers stay in eval mode
    assert loader.position == Position(0, 0)  # or training would miss its first batch


def test_a_position_in_the_middle_is_kept(prepared):
    objective, loader = prepared()
    loader.position = Position(3, 1)
    examine_training(objective, loader)
    assert loader.position == Position(3, 1)


def test_overfitting_lowers_the_loss_of_one_batch(prepared):
    objective, loader = prepared()
    batch = next(iter(loader))
    start = objective(batch).total.item()
    first, last = overfit(objective, batch)
    assert first == pytest.approx(start) and last < 0.5 * first
