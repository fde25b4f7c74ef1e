"""Seconds until a fresh process has answered: help, imports, the first training batch; ours and others'."""

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from diptych.bench.data import make_photos
from diptych.bench.process import Anchors, environment
from diptych.bench.record import Bar, Column, Finding, Table
from diptych.bench.turns import Contender, Turn, ratio, take_turns
from diptych.errors import DiptychError

FIRST_BATCH = """
import sys
from diptych.data.loader import Loader, LoaderConfig
from diptych.data.sources import open_source
from diptych.models.weights import load
model = load("mini", offline=True)
loader = Loader(open_source(sys.argv[1]), model.image_policy, model.tokenizer, LoaderConfig(batch_size=16, workers=0))
assert len(next(iter(loader))) == 16
"""
OWN = {
    "python -c pass": ["-c", "pass"],
    "import numpy": ["-c", "import numpy"],
    "import diptych": ["-c", "import diptych"],
    "diptych --help": ["-m", "diptych", "--help"],
    "import torch": ["-c", "import torch"],
}
ANCHORS = {
    "import open_clip": "open-clip",
    "import sentence_transformers": "sentence-transformers",
    "import transformers": "transformers",
}


@dataclass(frozen=True)
class Setting:
    """Sizes.

    Attributes:
        turns: Processes per contender that count; two more come first, since the first ones read from the disk.
    """

    turns: int = 9


QUICK = Setting(turns=1)


def measure(setting: Setting, anchors: Anchors) -> Finding:
    """Return wall time from start to end of a process."""
    with tempfile.TemporaryDirectory() as folder:
        make_photos(Path(folder), 16)
        batch = ["-c", FIRST_BATCH, f"{folder}/photos/all"]
        contenders = [run(name, [sys.executable, *rest]) for name, rest in OWN.items()]
        contenders.append(run("diptych: first batch of 16 photos", [sys.executable, *batch]))
        for name, anchor in ANCHORS.items():
            if python := anchors.python(anchor):
                contenders.append(run(name, [str(python), "-c", name]))
        seconds = take_turns(contenders, setting.turns, skip=2)
    bare = seconds["python -c pass"]
    rows = tuple(
        {"name": name, "seconds": statistics.median(times), "over": ratio(times, bare)}
        for name, times in seconds.items()
    )

    def over(name: str, other: str) -> float | None:
        return ratio(seconds[name], seconds[other]).value if name in seconds and other in seconds else None

    return Finding(
        "Wall time from the start of a fresh process to its end, files in the page cache.",
        setting,
        (
            Table(
                f"{setting.turns} turns",
                (
                    Column("name", "process"),
                    Column("seconds", "median seconds", ".3f"),
                    Column("over", "ratio to python -c pass", ".1f"),
                ),
                rows,
            ),
        ),
        (
            Bar("seconds of `diptych --help`", 0.5, False, statistics.median(seconds["diptych --help"])),
            Bar("`import diptych` / `import numpy`", 1.0, False, over("import diptych", "import numpy")),
            Bar("`import open_clip` / `diptych --help`", 1.0, True, over("import open_clip", "diptych --help")),
            Bar(
                "`import sentence_transformers` / our first batch",
                1.0,
                True,
                over("import sentence_transformers", "diptych: first batch of 16 photos"),
            ),
        ),
    )


def run(name: str, command: list[str]) -> Contender:
    """Return a contender whose step is one whole process."""

    def step() -> Turn:
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=environment())
        taken = time.perf_counter() - began
        if done.returncode:
            raise DiptychError(f"{name} ended with code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
        return Turn(taken)

    return Contender(name, step)
