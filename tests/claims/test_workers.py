"""Trials in several processes: the same questions, the same answers, and no process left behind."""

import importlib
import json
import os
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
from rich.console import Console

from diptych.claims.reproduce import reproduce_method
from diptych.errors import ConfigError, TrainingError

VERSIONS = {"python": "3"}


@pytest.fixture
def reproduce(fake, tmp_path, monkeypatch):
    """Return a function that runs the claims of a fake method, its code changed as asked, in as many processes."""
    monkeypatch.syspath_prepend(tmp_path)  # others import it by name

    def run(processes, *changes, log="log"):
        fake(*changes)
        sys.modules.pop("fake", None)
        importlib.invalidate_caches()
        (result,) = reproduce_method(
            "fake",
            importlib.import_module,
            log=tmp_path / f"{log}.jsonl",
            command="",
            versions=VERSIONS,
            console=Console(quiet=True),
            processes=processes,
        )
        return result

    yield run
    sys.modules.pop("fake", None)
    assert active_children() == []


def test_as_in_one_process(reproduce, calls, tmp_path):
    # Each trial takes a moment, so that no process is done before the other has begun.
    slow = (
        "        return GAIN",
        "        import os, time\n        time.sleep(0.05)\n        trial.note('process', os.getpid())\n        return GAIN",
    )
    one = reproduce(1, slow, log="one")
    assert len(calls()) == 24
    two = reproduce(2, slow, log="two")
    assert len(calls()) == 24
    assert (two.arms, two.search, two.difference, two.hashes) == (one.arms, one.search, one.difference, one.hashes)
    at_work = [{values[n] for values in two.noted["process"].values()} for n in range(3)]
    assert all(len(own) == 1 for own in at_work)  # the arms of a seed stay together
    assert len(set.union(*at_work)) == 2 and os.getpid() not in set.union(*at_work)
    assert reproduce(2, slow, log="two") == two and calls() == []  # and each is in the log
    questions = [
        sorted(
            (row["arm"], row["seed"], row["split"], row["value"])
            for row in map(json.loads, path.read_text().splitlines())
        )
        for path in (tmp_path / "one.jsonl", tmp_path / "two.jsonl")
    ]
    assert questions[0] == questions[1]


def test_the_first_error_stops_all(reproduce):
    body = "        if trial.split == 'test' and trial.seed == {}:\n            {}\n        return GAIN"
    waits = ("        return GAIN", body.format(0, "import time; time.sleep(600)"))
    breaks = (
        "        return GAIN",
        body.format(1, "from diptych.errors import TrainingError; raise TrainingError('the loss is nan')"),
    )
    began = time.monotonic()
    with pytest.raises(
        TrainingError, match="The trial baseline arm, seed 1, test broke down: the loss is nan"
    ) as caught:
        reproduce(2, waits, breaks)
    assert time.monotonic() - began < 300
    assert "in run" in "".join(caught.value.__notes__)  # where it happened, over there


def test_a_process_that_is_killed(reproduce, tmp_path):
    killed = (
        "        return GAIN",
        "        if trial.seed == 2:\n            import os; os.kill(os.getpid(), 9)\n        return GAIN",
    )
    with pytest.raises(TrainingError, match=r"seed 2, test ended with exit code -9; .* memory ran out.*--processes 1"):
        reproduce(2, killed)
    kept = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {row["split"] for row in kept} == {"validation", "test"}


RUNNER = """
import importlib, sys
from pathlib import Path
from rich.console import Console
from diptych.claims.reproduce import reproduce_method

if __name__ == "__main__":
    log = Path(sys.argv[1]) / "log.jsonl"
    reproduce_method("fake", importlib.import_module, log=log, command="", versions={}, console=Console(quiet=True), processes=2)
"""


def test_processes_end_with_the_one_that_asks(fake, tmp_path):
    fake(
        (
            "        return GAIN",
            "        import os, time\n        (CALLS.parent / f'{os.getpid()}.pid').touch()\n        time.sleep(600)",
        )
    )
    (tmp_path / "runner.py").write_text(RUNNER)
    process = subprocess.Popen([sys.executable, str(tmp_path / "runner.py"), str(tmp_path)])
    deadline = time.monotonic() + 120
    while len(pids := [int(path.stem) for path in tmp_path.glob("*.pid")]) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_no_process_at_all(reproduce):
    with pytest.raises(ConfigError, match="at least one process, not 0"):
        reproduce(0)
