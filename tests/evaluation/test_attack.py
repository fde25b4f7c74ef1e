import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from diptych.data.sources import Listed
from diptych.errors import EvaluationError
from diptych.evaluation.attack import attack_success, evaluate_changed, hits_of, measure_attack
from diptych.evaluation.run import evaluate_model
from diptych.models.perturbation import UniversalPerturbation, sign_noise


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


def test_hits_are_those_of_the_evaluation(make_model, labelled):
    found = evaluate_model(make_model(), labelled, precision="fp32")
    for name, hits in hits_of(found).items():
        assert hits.right.mean() == pytest.approx(found.headline()[name].value)
        assert len(hits.cluster) == len(hits.right)
