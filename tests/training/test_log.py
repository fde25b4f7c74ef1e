import io
import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from diptych.errors import MissingExtraError
from diptych.training.log import MetricsLog, display, read_rows

ROOT = Path(__file__).parents[2]
TRAINING = {"step": 2, "loss": 1.5, "parts": {"first": 0.5, "second": 1.0}, "skipped": 0}
EVALUATION = {"step": 2, "epoch": 1, "evaluation": {"image_to_text/recall@1": 0.25}}


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_rows(folder / "metrics.jsonl")]


def test_rows_are_on_disk_at_once_and_come_back(tmp_path):
    log = MetricsLog(tmp_path)
    for row in (TRAINING, EVALUATION):
        log.write(row)
    assert read_rows(tmp_path / "metrics.jsonl") == [TRAINING, EVALUATION]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2
    log.close()


def test_rows_after_the_step_are_cut_on_resume(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3, 4):
        log.write({"step": step})
    MetricsLog(tmp_path, step=2)
    assert steps(tmp_path) == [1, 2]
    MetricsLog(tmp_path, step=2).write({"step": 3})
    assert steps(tmp_path) == [1, 2, 3]


def test_a_new_run_starts_an_empty_log(tmp_path):
    MetricsLog(tmp_path).write({"step": 1})
    MetricsLog(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("kept", range(1, len('{"step": 3, "loss": 1.0}')))
def test_a_last_line_cut_short_by_a_kill_is_dropped(tmp_path, kept):
    whole = '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 3, "loss": 1.0}'[:kept])
    assert steps(tmp_path) == [1, 2]
    MetricsLog(tmp_path, step=5).write({"step": 6})
    assert steps(tmp_path) == [1, 2, 6]


def test_a_missing_log_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "metrics.jsonl") == []
    MetricsLog(tmp_path, step=3).write({"step": 4})  # the user removed the file before resuming
    assert steps(tmp_path) == [4]


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, writers=("tensorboard",))
    log.write({**TRAINING, "note": "words are left out"})
    log.write(EVALUATION)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    values = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert values["parts/second"] == [(2, 1.0)]
    assert values["evaluation/image_to_text/recall@1"] == [(2, 0.25)]
    assert set(values) == {
        "step",
        "epoch",
        "loss",
        "parts/first",
        "parts/second",
        "skipped",
        "evaluation/image_to_text/recall@1",
    }


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_run_trackers_get_every_number(monkeypatch, tmp_path, name):
    calls = []
    package = ModuleType(name)
    package.init = lambda **given: calls.append(("init", given))
    package.log = lambda values, step: calls.append(("log", values, step))
    package.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, name, package)
    log = MetricsLog(tmp_path, writers=(name,))
    log.write(TRAINING)
    log.close()
    assert calls == [
        ("init", {"project": "diptych", "name": tmp_path.name}),
        ("log", {"step": 2.0, "loss": 1.5, "parts/first": 0.5, "parts/second": 1.0, "skipped": 0.0}, 2),
        ("finish",),
    ]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_writer_names_an_extra_that_exists_and_brings_it(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match="pip install") as caught:
        MetricsLog(tmp_path, writers=(name,))
    command = re.search(r"pip install 'diptych\[(\w+)\]'", str(caught.value))
    assert command is not None
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(requirement.startswith(name) for requirement in extras[command[1]])


def test_cutting_rows_never_loses_the_others(monkeypatch, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsLog(tmp_path, step=1)
    assert steps(tmp_path) == [1, 2]


def row(step: int) -> dict[str, float]:
    return {
        "step": step,
        "epoch": 0,
        "loss": 2.0,
        "samples_per_second": 100.0,
        "seconds_data": 0.5,
        "seconds_compute": 1.5,
    }


def test_in_a_file_each_row_is_one_line():
    console = Console(file=io.StringIO(), width=200)
    with display(20, console) as screen:
        screen.say("epoch 1: [bold] stays as it is")
        screen.show(row(10))
        screen.show(row(20))
    assert console.file.getvalue().splitlines() == [
        "epoch 1: [bold] stays as it is",
        "step 10/20  epoch 0  loss 2.000  100 samples/s  data 0.50 s  compute 1.50 s",
        "step 20/20  epoch 0  loss 2.000  100 samples/s  data 0.50 s  compute 1.50 s",
    ]


def test_on_a_terminal_there_is_one_moving_line():
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    with display(20, console) as screen:
        screen.show(row(10))
        screen.show(row(20))
    printed = console.file.getvalue()
    assert "step 10/20" not in printed
    assert "20/20" in printed and "loss 2.000" in printed


def test_rows_are_plain_json(tmp_path):
    MetricsLog(tmp_path).write(TRAINING)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == TRAINING
