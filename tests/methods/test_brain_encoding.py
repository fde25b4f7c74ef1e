import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diptych.claims.claim import Trial
from diptych.claims.reproduce import check
from diptych.claims.sites import COUNTS, shifted, simulate_sites, smooth_order, smooth_walk
from diptych.cli import main
from diptych.data.responses import responses_of
from diptych.data.sources import Listed
from diptych.errors import ConfigError, EvaluationError
from diptych.evaluation.encoding import encode
from diptych.methods import brain_encoding
from diptych.methods.brain_encoding import (
    OPPONENTS,
    Config,
    Probe,
    claim,
    mini,
    model_features,
    principal,
    run_battery,
    score_features,
)
from tiny_run import write_photos

SMALL = Config(resamples=199, min_bins=1, alphas=(1.0, 100.0))


@pytest.fixture(scope="module")
def planted():
    """Return features and responses of six sites: two see, one hears, one adds, one integrates, one does nothing."""
    rng = np.random.default_rng(0)
    vision, language, random = (rng.normal(size=(300, 3)) for _ in range(3))
    product = vision * language
    features = {
        "vision": vision,
        "language": language,
        "side by side": np.c_[vision, language],
        "multimodal": np.c_[vision, language, product],
        "random weights": random,
    }
    signal = np.c_[vision[:, :2], language[:, 0], vision[:, 0] + language[:, 1], 1.5 * product[:, 0], np.zeros(300)]
    values = signal[:, :, None] + 1.0 * rng.normal(size=(300, 6, 2))
    return features, responses_of(values, ["see 1", "see 2", "hear", "add", "integrate", "nothing"])


def test_only_the_planted_site_integrates(planted):
    features, responses = planted
    found = run_battery(score_features(features, responses, SMALL), 6, SMALL)
    assert found.multimodal.tolist() == [False, False, False, False, True, False]
    assert found.comparisons["random weights"].significant().tolist() == [True] * 5 + [False]
    assert (
        found.comparisons["vision"].significant()[2:5].all() and not found.comparisons["vision"].significant()[:2].any()
    )
    assert not found.reverse.significant().any()


def test_both_side_by_side_in_place_of_multimodal_finds_nothing(planted):
    features, responses = planted
    scores = score_features(features, responses, SMALL)
    found = run_battery({**scores, "multimodal": scores["side by side"]}, 6, SMALL)
    assert not found.multimodal.any()
    # Without that opponent the site that adds would count.
    naive = run_battery({**scores, "multimodal": scores["side by side"]}, 6, SMALL, opponents=("vision", "language"))
    assert naive.multimodal.tolist() == [False, False, False, True, False, False]


def test_shifted_responses_find_nothing(planted):
    features, responses = planted
    moved = replace(responses, values=np.roll(responses.values, 60, axis=0))
    assert not run_battery(score_features(features, moved, SMALL), 6, SMALL).multimodal.any()


def test_principal_components_keep_what_varies():
    x = np.random.default_rng(0).normal(size=(50, 3)) @ np.random.default_rng(1).normal(size=(3, 8))
    assert principal(x, None) is x and principal(x, 8) is x
    found = principal(x, 3)
    assert found.shape == (50, 3)
    standard = (x - x.mean(0)) / x.std(0)
    np.testing.assert_allclose(found @ found.T, standard @ standard.T, atol=1e-9)  # nothing is lost: it has rank 3


def test_features_of_a_model(make_model, drawings):
    model, source = make_model(), drawings(10)
    found = model_features(model, source, Config())
    assert set(found) == {"multimodal", *OPPONENTS}
    widths = {name: x.shape[1] for name, x in found.items()}
    assert widths == {"vision": 16, "language": 16, "side by side": 32, "multimodal": 24, "random weights": 24}
    image, text, product = np.split(found["multimodal"], 3, 1)
    np.testing.assert_allclose(product, image * text, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, atol=1e-6)
    silent = Listed([replace(sample, texts=()) for sample in source])
    assert set(model_features(model, silent, Config())) == {"vision", "random weights"}
    flat = model_features(model, silent, Config(vision_layer="vision.transformer.blocks.0", positions="flatten"))
    assert flat["vision"].shape == (10, 5 * 16)  # class token and four patches


@pytest.fixture
def measured(tmp_path, drawings):
    """Return drawings with responses and dissimilarities of them on the disk."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "r.npz", responses=rng.normal(size=(40, 3)), sites=np.array(["a", "b", "c"]))
    x = rng.normal(size=(2, 40, 5))
    np.savez(tmp_path / "d.npz", one=1 - np.corrcoef(x[0]), two=1 - np.corrcoef(x[1]))
    return drawings(40)


def test_the_report_says_all(make_model, measured, tmp_path):
    settings = Config(tmp_path / "r.npz", tmp_path / "d.npz", components=4, resamples=20, min_bins=1)
    report = Probe(settings).measure(make_model(), measured)
    assert {f"r, {name}" for name in ("multimodal", *OPPONENTS)} <= set(report.metrics)
    assert {f"sites, multimodal beats {name}" for name in OPPONENTS} <= set(report.metrics)
    assert "sites that integrate" in report.metrics and "similarity, vision" in report.metrics
    assert report.notes[0].startswith("0 of 3 sites integrate: none")
    assert "Noise ceiling of 2 matrices" in report.notes[1]
    assert all(value.low <= value.high for value in report.metrics.values())


def test_what_does_not_fit(make_model, measured, tmp_path, drawings):
    with pytest.raises(ConfigError, match="Set responses or dissimilarities"):
        Probe(Config())
    with pytest.raises(EvaluationError, match="one row per sample of drawings, 12; there are 40"):
        Probe(Config(tmp_path / "r.npz")).measure(make_model(), drawings(12))
    silent = Listed([replace(sample, texts=()) for sample in measured])
    with pytest.raises(EvaluationError, match="needs a text for every image"):
        Probe(Config(tmp_path / "r.npz")).measure(make_model(), silent)


def test_the_command(make_model, measured, tmp_path, capsys):
    from diptych.models.checkpoint import save_model

    save_model(make_model(), tmp_path / "model")
    write_photos(tmp_path / "photos", measured)
    with pytest.raises(SystemExit) as stop:
        main(
            f"probe {tmp_path}/photos --model {tmp_path}/model --responses {tmp_path}/r.npz --components 4 --resamples 20 --json -".split()
        )
    assert not stop.value.code
    record = json.loads(capsys.readouterr().out)
    assert record["settings"]["resamples"] == 20 and "sites that integrate" in record["metrics"]
    with pytest.raises(SystemExit):
        main(["probe", "--help"])
    assert "--vision-layer" in capsys.readouterr().out


class TestSites:
    def test_each_kind_follows_what_it_is_named_for(self):
        rng = np.random.default_rng(0)
        vision, language = rng.normal(size=(2, 600, 4))
        fused = np.concatenate([vision * language, vision], 1)  # half of it is linear in vision, and does not count
        sites = simulate_sites(vision, language, fused, rng, strength=3.0)
        sets = {
            "vision": vision,
            "language": language,
            "side by side": np.c_[vision, language],
            "product": vision * language,
        }
        r = {
            name: encode(x, sites.responses.targets, alphas=(1.0,)).test.reshape(len(sites.kinds), -1).mean(1)
            for name, x in sets.items()
        }

        def mean(features: str, kind: str) -> float:
            return r[features][sites.of(kind)].mean()

        assert mean("vision", "vision") > 0.85 and abs(mean("language", "vision")) < 0.1
        assert mean("language", "language") > 0.85 and abs(mean("vision", "language")) < 0.1
        assert mean("side by side", "both") > 0.85 and mean("vision", "both") < 0.8
        assert mean("product", "integrating") > 0.85 and mean("side by side", "integrating") < 0.1
        assert all(abs(mean(name, "noise")) < 0.1 for name in sets)
        assert {kind: int(sites.of(kind).sum()) for kind in COUNTS} == COUNTS

    def test_shifts_move_responses_to_other_events(self):
        rng = np.random.default_rng(0)
        sites = simulate_sites(*rng.normal(size=(3, 50, 2)), rng)
        assert np.array_equal(shifted(sites, 7).responses.values[7:], sites.responses.values[:-7])
        assert np.array_equal(shifted(sites, 0).responses.values, sites.responses.values)

    def test_walks_and_orders_are_smooth(self):
        rng = np.random.default_rng(0)
        walk = smooth_walk(4000, 20, rng, memory=0.9)
        assert np.mean(walk[1:] * walk[:-1]) == pytest.approx(0.9, abs=0.05) and walk.std() == pytest.approx(
            1, abs=0.05
        )
        features = rng.normal(size=(500, 3))
        order = smooth_order(features, rng)
        assert sorted(order) == list(range(500))

        def step(x: np.ndarray) -> float:
            return float(np.linalg.norm(np.diff(x, axis=0), axis=1).mean())

        assert step(features[order]) < 0.9 * step(features)


class TestClaims:
    def test_they_are_well_formed(self):
        check(claim(), "brain_encoding")
        assert [one.name for one in claim()] == ["recovery", "trained", "leak", "objects"]

    def test_controls_are_judged(self):
        recovery, trained, *_ = (one.control.passed for one in claim())
        assert recovery({"control": [0.02, -0.01, 0.0]}) and not recovery({"control": [0.2, 0.1, 0.0]})
        numbers = {"baseline": [0.1, 0.1], "method": [0.3, 0.3], "control": [0.0, 0.01]}
        assert trained(numbers) and not trained(numbers | {"control": [0.25, 0.25]})

    @pytest.mark.parametrize("name", ["recovery", "trained", "leak"])
    def test_every_simulated_arm_runs(self, name, monkeypatch):
        rng = np.random.default_rng(0)
        vision, language = rng.normal(size=(2, 120, 3))
        features = {
            "vision": vision,
            "language": language,
            "side by side": np.c_[vision, language],
            "multimodal": np.c_[vision, language, vision * language],
            "random weights": rng.normal(size=(120, 3)),
        }
        monkeypatch.setattr(brain_encoding, "_stimuli", lambda: (features, vision * language))
        monkeypatch.setattr(brain_encoding, "EVENTS", 120)
        monkeypatch.setattr(brain_encoding, "mini", lambda: replace(mini(), resamples=4, alphas=(1.0,)))
        brain_encoding._simulated.cache_clear()
        (one,) = (one for one in claim() if one.name == name)
        notes: dict[str, float] = {}
        for arm in one.arms:
            trial = Trial(
                0, "test", {}, lambda slug: mini(), lambda *_: pytest.fail("nothing is trained"), note=notes.__setitem__
            )
            assert -1 <= arm.run(trial) <= 1
        if name == "recovery":
            assert {"found, integrating", "found, noise", "false among found"} <= set(notes)
        brain_encoding._simulated.cache_clear()

    @pytest.mark.data
    def test_every_arm_on_objects_runs(self, monkeypatch, make_model):
        monkeypatch.setattr(brain_encoding, "load", lambda spec, offline: make_model())
        brain_encoding._objects.cache_clear()
        (one,) = (one for one in claim() if one.name == "objects")
        for arm in one.arms:
            notes: dict[str, float] = {}
            value = arm.run(Trial(0, "test", {}, lambda slug: mini(), lambda *_: None, note=notes.__setitem__))
            assert -1 <= value <= 1 and 0 < notes["ceiling, low"] < notes["ceiling, high"] < 1
        brain_encoding._objects.cache_clear()


def test_smooth_noise_leaks_through_shuffled_folds():
    trial = Trial(0, "test", {}, lambda slug: mini(), lambda *_: None)
    blocks, shuffled = (brain_encoding._leak(trial, shuffled=one) for one in (False, True))
    assert abs(blocks) < 0.1 < shuffled


@pytest.mark.data
def test_images_of_the_bundle_come_in_the_order_of_its_matrices(data):
    names = [path.name for path in sorted((data / "brain-92-objects" / "images").iterdir())]
    assert names == [f"{number:02}.png" for number in range(92)]


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "brain_encoding.py"), run_name="__main__")
    assert "sites integrate" in capsys.readouterr().out
