import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from diptych.data.corruptions import CORRUPTIONS
from diptych.data.sources import Listed
from diptych.errors import ConfigError, EvaluationError, InputError
from diptych.evaluation.robustness import ALL_CORRUPTIONS, RobustnessConfig, audit, compare_audits, draw
from diptych.evaluation.run import compare, evaluate_model
from diptych.evaluation.stats import paired_difference
from diptych.models.perturbation import load_perturbation, sign_noise
from diptych.types import Text

QUICK = RobustnessConfig(eps=(0.0, 8.0), steps=2, step_size=0.5, corruptions=("jpeg", "gaussian_noise"))


@pytest.fixture(scope="module")
def labelled():
    """Return a function that gives noise pictures with a caption each and one of four labels that say nothing about them."""

    def make(count: int = 24, seed: int = 0) -> Listed:
        from diptych.types import Sample

        rng = np.random.default_rng(seed)
        return Listed(
            [
                Sample(f"s{i}", rng.integers(256, size=(16, 16, 3), dtype=np.uint8), (Text(f"a thing numbered {i}"),), f"s{i}", "abcd"[k])
                for i, k in enumerate(rng.integers(4, size=count))
            ],
            "noise",
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def found(make_model, labelled):
    return audit(make_model(), labelled(), QUICK)


def test_clean_scores_are_those_of_evaluation(found, make_model, labelled):
    expected = evaluate_model(make_model(), labelled(), precision="fp32").headline()
    assert found.metrics == ("image_to_text/recall@1", "text_to_image/recall@1", "zeroshot/top1")
    for metric in found.metrics:
        assert found.rows[0].scores[metric].value == expected[metric]
        assert found.rows[0].scores[metric].change.value == 0
    assert found.chance["zeroshot/top1"] == 0.25 and found.chance["image_to_text/recall@1"] == pytest.approx(1 / 24)


def test_with_eps_0_scores_are_the_clean_ones_bit_for_bit(found):
    clean, noise, attack = found.rows[:3]
    assert (noise.name, attack.name) == ("noise, eps 0", "PGD, eps 0")
    assert noise.scores == attack.scores == clean.scores


def test_rows_are_all_there_in_order(found):
    names = [row.name for row in found.summary()]
    assert names == [
        "clean", "noise, eps 0", "PGD, eps 0", "noise, eps 8", "PGD, eps 8", "empty box", "wrong words", ALL_CORRUPTIONS, "jpeg", "gaussian_noise",
    ]  # fmt: skip
    assert [(row.name, row.severity) for row in found.rows if row.severity] == [
        (kind, s) for kind in QUICK.corruptions for s in range(1, 6)
    ]
    assert all(set(row.scores) == set(found.metrics) for row in found.rows)


def test_means_of_corruptions_are_those_of_their_severities(found):
    for metric in found.metrics:
        rows = {row.name: row.scores[metric] for row in found.summary()}
        single = [row for row in found.rows if row.severity is not None]
        for kind in QUICK.corruptions:
            values = [row.scores[metric].value.value for row in single if row.name == kind]
            assert rows[kind].value.value == pytest.approx(np.mean(values))
        mean = np.mean([row.scores[metric].value.value for row in single])
        clean = rows["clean"].value.value
        error, relative = found.corruption_error(metric), found.relative_corruption_error(metric)
        assert error.value == pytest.approx(1 - mean) and error.low <= error.value <= error.high
        assert relative.value == pytest.approx(clean - mean) and relative.low <= relative.value <= relative.high


def test_an_audit_can_be_repeated_and_leaves_the_model_alone(found, make_model, labelled):
    model = make_model().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    again = audit(model, labelled(), QUICK)
    assert again.rows == found.rows and again.settings == found.settings
    assert model.training and all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and torch.equal(torch.get_rng_state(), generator)
    other = audit(model, labelled(), replace(QUICK, seed=1, eps=(), words=False))
    assert [row.name for row in other.rows if row.family not in ("clean", "corruption")] == []
    noisy = [picture.shown["gaussian_noise"] for picture in (found.pictures[0], other.pictures[0])]
    assert not np.array_equal(*noisy)
    assert np.array_equal(found.pictures[0].shown["jpeg"], other.pictures[0].shown["jpeg"])


def test_where_labels_say_nothing_accuracy_is_chance_and_an_attack_only_lowers_it(make_model, labelled):
    # Whatever the model says, a label drawn without looking agrees with it one time in four: 200 * 4 answers, five standard deviations.
    config = RobustnessConfig(eps=(8.0,), steps=2, step_size=0.5, corruptions=("contrast",), words=True)
    audits = [audit(make_model(seed), labelled(200, seed), config, tasks=("zeroshot",)) for seed in range(4)]
    for place, row in enumerate(audits[0].summary()):
        mean = np.mean([one.summary()[place].scores["zeroshot/top1"].value.value for one in audits])
        if row.family == "pgd":
            assert mean < 0.25 + 0.077
        else:
            assert mean == pytest.approx(0.25, abs=0.077), row.name


def test_pgd_takes_right_answers_that_noise_of_its_size_leaves(make_model, drawings):
    model, source = fitted(make_model, drawings)
    config = RobustnessConfig(eps=(32.0,), steps=10, step_size=0.25, corruptions=(), words=False)
    scores = {row.family: row.scores["image_to_text/recall@1"].value.value for row in audit(model, source, config).rows}
    assert scores["clean"] == 1.0 and scores["pgd"] <= scores["noise"] - 0.25


def fitted(make_model, drawings):
    """Return a model that knows six drawings by heart, and these."""
    source = Listed([drawings(6)[i] for i in range(6)], "six")
    model = make_model(texts=[source.texts(i)[0].text for i in range(6)])
    from diptych.losses.contrastive import info_nce
    from diptych.models.embedding import evaluation_view

    pixels = torch.stack([evaluation_view(model, sample) for sample in source])
    tokens = model.tokenizer([source.texts(i)[0].text for i in range(6)])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        info_nce(model.encode_image(pixels), model.encode_text(tokens), model.scale).backward()
        optimizer.step()
    return model, source


def test_a_universal_noise_from_a_file_stands_beside_random_noise_of_its_eps(make_model, labelled, tmp_path):
    sign_noise(16, 6.0, seed=3).save(tmp_path / "noise.safetensors")
    config = replace(QUICK, eps=(), words=False, corruptions=(), universal=tmp_path / "noise.safetensors")
    found = audit(make_model(), labelled(), config)
    assert [row.name for row in found.rows] == ["clean", "one noise for all, eps 6", "noise.safetensors, eps 6"]
    clean, noise, given = (found.pictures[0].shown[row.name].astype(int) for row in found.rows)
    assert np.abs(noise - clean).max() == np.abs(given - clean).max() == 6 and not np.array_equal(noise, given)
    fitted = {"mine": load_perturbation(tmp_path / "noise.safetensors")}
    same = audit(make_model(), labelled(), replace(config, universal=None), perturbations=fitted)
    assert [row.name for row in same.rows[1:]] == ["one noise for all, eps 6", "mine, eps 6"]
    assert [row.scores for row in same.rows] == [row.scores for row in found.rows]
    with pytest.raises(InputError, match="cannot be read as a noise"):
        audit(make_model(), labelled(), replace(config, universal=tmp_path / "absent.npy"))


def test_two_models_are_compared_item_by_item(found, make_model, labelled):
    other = audit(make_model(1), labelled(), QUICK)
    differences = compare_audits(other, found)
    assert tuple(differences) == found.metrics
    plain = compare(*(evaluate_model(make_model(seed), labelled(), precision="fp32") for seed in (1, 0)))
    pairs = list(zip(other.answers, found.answers, strict=True))
    for metric, values in differences.items():
        assert list(values) == [row.name for row in found.summary()]
        assert values["clean"] == plain[metric]
        for one, two in ((a, b) for a, b in pairs if a.severity is None):
            a, b = one.hits[metric], two.hits[metric]
            assert values[one.name] == paired_difference(a.right, b.right, cluster=a.cluster, seed=0)
    same = compare_audits(found, audit(make_model(), labelled(), QUICK))
    assert {(v.value, v.low, v.high) for values in same.values() for v in values.values()} == {(0, 0, 0)}


def test_differences_are_the_second_minus_the_first(make_model, drawings):
    """A model that knows its drawings beside one to which all images are the same."""
    model, source = fitted(make_model, drawings)
    config = RobustnessConfig(eps=(1.0,), steps=2, corruptions=(), words=False)
    blind = make_model()
    with torch.no_grad():
        blind.image_head.linear.weight.zero_()  # every image is the same to it, and ties count against it
    audits = [audit(each, source, config) for each in (blind, model)]
    found = compare_audits(*audits)["image_to_text/recall@1"]["clean"]
    assert found.value == 1.0 and compare_audits(*audits[::-1])["image_to_text/recall@1"]["clean"].value == -1.0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"seed": 1}, "robustness, seed"),
        ({"steps": 3}, "robustness"),
        ({"images": 10}, "captions, fingerprint, images, robustness, source"),
    ],
)
def test_other_audits_are_not_compared(found, make_model, labelled, changes, complaint):
    other = audit(make_model(), labelled(), replace(QUICK, **{"eps": (), "words": False, "corruptions": ()} | changes))
    with pytest.raises(EvaluationError, match=f"these differ in {complaint}.*, changes of the images"):
        compare_audits(found, other)


def test_samples_are_drawn_by_seed(labelled):
    source = labelled(24)
    assert draw(source, RobustnessConfig(images=24)) is source
    few, again, other = (draw(source, RobustnessConfig(images=10, seed=seed)) for seed in (0, 0, 1))
    assert len(few) == 10 and few.indices == again.indices == sorted(few.indices) and few.indices != other.indices


def test_tasks_follow_from_the_samples_or_from_what_is_asked(make_model, labelled):
    quick = replace(QUICK, eps=(), corruptions=())
    assert audit(make_model(), labelled(), quick, tasks=("zeroshot",)).metrics == ("zeroshot/top1",)
    captions = Listed([replace(sample, label=None) for sample in labelled()], "captions")
    found = audit(make_model(), captions, quick)
    assert found.metrics == ("image_to_text/recall@1", "text_to_image/recall@1")
    assert found.corruption_error(found.metrics[0]) is None


def test_captions_of_one_group_cannot_be_wrong(make_model, labelled):
    source = Listed([replace(sample, group="one", label=None) for sample in labelled(4)], "one group")
    with pytest.raises(EvaluationError, match="several groups"):
        audit(make_model(), source, QUICK)


def test_letters_that_cannot_be_written_are_noted(make_model, labelled):
    source = Listed([replace(s, texts=(Text(f"猫 {s.key}"),), label=None) for s in labelled(4)], "cats")
    assert any("lacks letters of 4 texts" in note for note in audit(make_model(), source, replace(QUICK, eps=())).notes)


def test_a_record_holds_every_number(found):
    record = json.loads(json.dumps(found.to_json()))
    assert len(record["rows"]) == len(found.rows)
    value = record["rows"][4]["scores"]["zeroshot/top1"]["change"]
    assert value["value"] == found.rows[4].scores["zeroshot/top1"].change.value
    assert record["settings"]["robustness"]["eps"] == [0.0, 8.0] and record["settings"]["precision"] == "fp32"
    assert set(record["corruption_error"]) == set(found.metrics)
    lines = list(found.lines())
    assert sum("wrong words" in line for line in lines) == 3 and len(lines) == 3 * (1 + 10 + 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": (8 / 255,)}, "levels"),
        ({"corruptions": ("fog",)}, "no corruption 'fog'"),
        ({"images": 1}, "at least 2"),
        ({"steps": 0}, "steps >= 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RobustnessConfig(**settings)


def test_all_corruptions_are_the_default():
    assert RobustnessConfig().corruptions == tuple(CORRUPTIONS)
