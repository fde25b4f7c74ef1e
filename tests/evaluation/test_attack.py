import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from diptych.data.sources import Listed
from diptych.data.words import UniversalWord, with_word
from diptych.errors import EvaluationError
from diptych.evaluation.attack import (
    attack_success,
    evaluate_changed,
    hits_of,
    measure_attack,
    measure_words,
    reword,
)
from diptych.evaluation.run import evaluate_model
from diptych.models.perturbation import UniversalPerturbation, sign_noise
from diptych.types import Sample, Text


@pytest.mark.data
def test_official_success_rates(golden):
    """Their ranking is a reversed ascending sort, so equal scores favour the higher index; here there are none."""
    numbers = golden("c_pgc", "asr")
    per_image = json.loads(str(numbers["settings"]))["captions_per_image"]
    owner = np.arange(numbers["scores_before"].shape[1]) // per_image

    def hits(scores: np.ndarray, k: int, *, of_texts: bool) -> np.ndarray:
        if of_texts:
            order = np.argsort(-scores, axis=0)[:k]
            return (order == owner).any(0).astype(float)
        order = np.argsort(-scores, axis=1)[:, :k]
        return (owner[order] == np.arange(len(scores))[:, None]).any(1).astype(float)

    for place, name in enumerate(json.loads(str(numbers["keys"]))):
        side, k = name.split("_r")
        pair = [hits(numbers[f"scores_{when}"], int(k), of_texts=side == "img") for when in ("before", "after")]
        assert pair[0].sum() == numbers["n_correct_before"][place]
        assert 100 * attack_success(*pair).value == pytest.approx(numbers["asr_percent"][place], abs=0.0051)


def test_success_counts_what_was_right_before():
    before, after = np.array([1.0, 1, 1, 1, 0, 0]), np.array([1.0, 0, 0, 1, 1, 0])
    assert attack_success(before, after).value == 0.5
    assert attack_success(before, before).value == 0
    assert attack_success(before, np.zeros(6)).value == 1
    with pytest.raises(EvaluationError, match="No answer was right"):
        attack_success(np.zeros(3), np.ones(3))


def test_answers_of_one_image_are_drawn_together():
    before, after = np.ones(40), np.repeat([0.0, 1.0], 20)
    alone, together = (attack_success(before, after, cluster=ids) for ids in (None, np.repeat(np.arange(4), 10)))
    assert alone.value == together.value == 0.5
    assert together.high - together.low > 2 * (alone.high - alone.low)


@pytest.fixture
def labelled(drawings) -> Listed:
    """Return drawings with captions and with two classes."""
    return Listed([replace(s, label=("circle", "square")[n % 2]) for n, s in enumerate(drawings(12))], "labelled")


def test_nothing_is_lost_to_no_change(make_model, labelled):
    report = measure_attack(make_model(), labelled, sign_noise(16, 0), precision="fp32")
    assert report.clean.headline() == report.attacked.headline() == report.noise.headline()
    for rates in (report.success(), report.noise_success(), report.beyond_noise()):
        assert {value.value for value in rates.values()} == {0.0}
        assert list(rates) == report.names()


def test_noise_against_itself_is_no_further(make_model, labelled):
    report = measure_attack(make_model(), labelled, sign_noise(16, 60, seed=5), seed=5)
    assert report.attacked.headline() == report.noise.headline()
    assert {value.value for value in report.beyond_noise().values()} == {0.0}


def test_images_that_all_become_alike_are_all_lost(make_model, labelled):
    """Black images have equal embeddings, and ties go against the model."""
    report = measure_attack(make_model(), labelled, UniversalPerturbation(torch.full((3, 16, 16), -254 / 255), 254))
    black = replace(report, attacked=evaluate_changed(make_model(), labelled, report.clean, torch.zeros_like))
    assert black.attacked.headline()["text_to_image/recall@1"].value == 0
    for name, rate in black.success().items():
        if name == "text_to_image/recall@1":
            assert rate.value == 1


def test_a_record_says_everything(make_model, labelled):
    report = measure_attack(make_model(), labelled, sign_noise(16, 8), name="tiny")
    record = json.loads(json.dumps(report.to_json()))
    assert record["eps"] == 8 and record["clean"]["settings"]["model"] == "tiny"
    assert record["success"]["zeroshot/top1"].keys() == {"value", "low", "high"}
    assert record["clean"]["zeroshot"]["top1"]["value"] == report.clean.headline()["zeroshot/top1"].value
    lines = report.lines()
    assert len([line for line in lines if ", attacked " in line]) == len(report.clean.headline())
    low = report.clean.headline()["image_to_text/recall@1"].value
    assert (low < 0.6) == any(line.startswith("image_to_text/recall@1 is") for line in report.notes())


def test_a_word_is_measured_alone_and_with_the_noise(make_model, labelled):
    """Against measuring samples whose captions were changed beforehand, right answers being those of the clean ones."""
    judge, victim = make_model(texts=["a red circle", "the blue square", "black green purple"] * 4), make_model(1)
    report = measure_attack(victim, labelled, sign_noise(16, 60, seed=2), precision="fp32")
    rewording = reword(judge, report.clean.embedded.captions, UniversalWord("red"), seed=4)
    assert rewording.by_chance.word != "red"
    assert rewording == reword(judge, report.clean.embedded.captions, UniversalWord("red"), seed=4)
    found = measure_words(victim, report, rewording)
    assert list(found) == ["word", "noise and word"]
    for side, word in (("noise", rewording.by_chance), ("attacked", rewording.word)):
        changed = [
            replace(s, texts=(Text(with_word(s.texts[0].text, place, word.word)),))
            for s, place in zip(labelled, rewording.places, strict=True)
        ]
        plain = evaluate_model(victim, Listed(changed), tasks=("retrieval",), precision="fp32").embedded
        for name, images in (("word", report.clean), ("noise and word", getattr(report, side))):
            measured = getattr(found[name], side)
            torch.testing.assert_close(measured.embedded.texts, plain.texts)
            scores = images.embedded.images @ plain.texts.T
            right = (scores.argmax(0) == torch.arange(12)).float()
            assert hits_of(measured)["text_to_image/recall@1"].right.tolist() == right.tolist()
    for one in found.values():
        assert one.clean.zeroshot is one.noise.zeroshot is one.attacked.zeroshot is None
        assert hits_of(one.clean)["text_to_image/recall@5"].right.tolist() == (
            hits_of(report.clean)["text_to_image/recall@5"].right.tolist()
        )
    assert [found[name].eps for name in found] == [0, 60]
    lines = found["word"].lines()
    assert "random word" in lines[0]
    assert any("with 'red' in them" in line and rewording.by_chance.word in line for line in lines)


def test_captions_that_become_equal_stay_apart(make_model):
    """All become "red": both texts are equal, and each has one right image still."""
    model = make_model(texts=["red", "blue", "green"] * 4)
    image = np.full((16, 16, 3), 255, np.uint8)
    samples = [Sample(word, image // (n + 1), (Text(word),), word) for n, word in enumerate(("blue", "green"))]
    report = measure_attack(model, Listed(samples), sign_noise(16, 0), precision="fp32")
    rewording = reword(model, report.clean.embedded.captions, UniversalWord("red"))
    assert rewording.texts(rewording.word) == ["red", "red"]
    one = measure_words(model, report, rewording)["word"]
    assert hits_of(one.attacked)["text_to_image/recall@1"].right.sum() == 1


def test_a_word_needs_the_captions_of_the_report(make_model, labelled):
    model = make_model()
    report = measure_attack(model, labelled, sign_noise(16, 8), precision="fp32")
    other = reword(model, ["a red circle"], UniversalWord("green"))
    with pytest.raises(EvaluationError, match="the same as in the report"):
        measure_words(model, report, other)


def test_hits_are_those_of_the_evaluation(make_model, labelled):
    found = evaluate_model(make_model(), labelled, precision="fp32")
    for name, hits in hits_of(found).items():
        assert hits.right.mean() == pytest.approx(found.headline()[name].value)
        assert len(hits.cluster) == len(hits.right)
