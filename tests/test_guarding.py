import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_run
from diptych import commands
from diptych.commands import guarding
from diptych.config import override
from diptych.errors import TrainingError
from diptych.evaluation import guard as guard_module
from diptych.evaluation.guard import Scores, stand_guard
from diptych.models.weights import load
from diptych.training import loop
from diptych.types import Interval
from tiny_run import write_photos

TINY = override(tiny_run.TINY, {"evaluate_every": 1, "save_every": 2, "optimizer": {"lr": 1e-2}})


@pytest.fixture(scope="module")
def first(tmp_path_factory, drawings) -> Path:
    """Return a folder with photos and a model that was trained on them from scratch."""
    root = tmp_path_factory.mktemp("guarded")
    photos = write_photos(root / "photos", drawings(24))
    commands.train(str(photos), recipe=override(TINY, {"epochs": 30}), out=root / "start", check=False)
    return root


def tune(first: Path, out: Path, **more) -> commands.TrainedRun:
    recipe = override(TINY, {"model": {"start": str(first / "start")}})
    return commands.train(str(first / "photos"), **{"recipe": recipe, "out": out, "check": False} | more)


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load(folder).state_dict()


def test_with_and_without_a_guard_the_weights_are_the_same_to_the_last_bit(first, tmp_path):
    tune(first, tmp_path / "on", guard="shapes")
    tune(first, tmp_path / "off", guard="none")
    on, off = state(tmp_path / "on"), state(tmp_path / "off")
    assert all(torch.equal(value, off[name]) for name, value in on.items())
    names = {path.name for path in (tmp_path / "off").iterdir()}
    assert "guard.json" not in names and "guard.json" in {path.name for path in (tmp_path / "on").iterdir()}


def test_random_weights_are_not_guarded(first, tmp_path, capsys):
    commands.train(str(first / "photos"), recipe=TINY, out=tmp_path / "new", check=False, guard="shapes")
    assert "--guard shapes does nothing: the model starts from random weights" in capsys.readouterr().err
    assert not (tmp_path / "new" / "guard.json").exists()


def test_a_guarded_run_from_end_to_end(first, tmp_path, capsys):
    recipe = override(TINY, {"model": {"start": str(first / "start")}, "optimizer": {"lr": 0.3}})
    tune(first, tmp_path / "run", guard=str(first / "photos"), recipe=recipe)
    said = capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "guard.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    watched = [row["evaluation"]["guard/photos"] for row in rows if "evaluation" in row]
    assert len(watched) == 2 and watched[-1] == pytest.approx(record["points"][-1]["probe"]["value"])
    assert [point["share"] for point in record["points"]] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert re.search(r"Guard: R@1 [\d.]+ on 24 samples of photos before training", said)
    assert f"Guard: {record['advice']}" in said.replace("\n", " ")
    report = (tmp_path / "run" / "report.html").read_text()
    assert "What the model knew before" in report and "share of the tuned weights" in report
    lost = [row for row in watched if f"is {row:.3f}, and was" in said]
    assert (len(lost) > 0) == ("WARNING: the model is losing what it knew" in said)
    assert record["fallen"] == (record["lost"]["high"] < 0)


def test_a_fall_beyond_its_interval_is_said_and_one_within_is_not(make_model, drawings, capsys):
    model = make_model().eval()
    guard = stand_guard(model, drawings(12))
    for hits, warned in ((np.ones(12), False), (np.array([1.0] * 11 + [0.0]), False), (np.zeros(12), True)):
        before = replace(guard, before=Scores(np.ones(12), 0.1, "R@1"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(guard_module, "measure", lambda *_, hits=hits: Scores(hits, 0.1, "R@1"))
            assert guarding.look(before, model) == {"guard/drawings": hits.mean()}
        assert ("WARNING: the model is losing what it knew: R@1 on drawings is" in capsys.readouterr().err) == warned


def test_the_mix_is_saved_where_it_is_better(first, tmp_path, monkeypatch):
    recipe = override(TINY, {"model": {"start": str(first / "start")}, "optimizer": {"lr": 0.3}})
    monkeypatch.setattr(guarding, "draw_curve", chosen(guarding.draw_curve, best=0.4))
    run = tune(first, tmp_path / "run", guard=str(first / "photos"), recipe=recipe)
    before, after, mix = state(first / "start"), run.model.state_dict(), state(tmp_path / "run" / "mix")
    for name, value in mix.items():
        torch.testing.assert_close(value, torch.lerp(before[name], after[name], 0.4))
    assert all(torch.equal(value, state(tmp_path / "run")[name]) for name, value in after.items())
    tune(first, tmp_path / "run", guard="none", overwrite=True)
    assert not (tmp_path / "run" / "mix").exists() and not (tmp_path / "run" / "guard.json").exists()


def chosen(draw, *, best: float):
    """Return `draw_curve` with a curve that fell and whose best mix is this."""

    def drawn(*arguments, **settings):
        return replace(draw(*arguments, **settings), best=best, lost=Interval(-0.5, -0.6, -0.4))

    return drawn


def test_a_test_split_does_not_choose(first, tmp_path, drawings):
    other = write_photos(tmp_path / "other", drawings(12))
    tune(first, tmp_path / "run", guard="shapes", evaluate_on=str(other))
    assert json.loads((tmp_path / "run" / "guard.json").read_text())["best"] == 0.5


def test_a_resumed_run_ends_in_the_same_weights_and_the_same_curve(first, tmp_path, monkeypatch):
    tune(first, tmp_path / "whole", guard="shapes")
    update, steps = loop._update, []

    def dies(*arguments):
        steps.append(1)
        if len(steps) == 3:
            raise TrainingError("stopped for the test")
        return update(*arguments)

    monkeypatch.setattr(loop, "_update", dies)
    with pytest.raises(TrainingError):
        tune(first, tmp_path / "cut", guard="shapes")
    monkeypatch.setattr(loop, "_update", update)
    tune(first, tmp_path / "cut", guard="shapes", resume=True)
    whole, cut = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    one, other = (json.loads((tmp_path / name / "guard.json").read_text()) for name in ("whole", "cut"))
    assert one == other
