import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FAKE = '''
"""A method whose arms are sums, and write down that they were called."""

from pathlib import Path

from diptych.claims.claim import Arm, Claim, Control

CALLS = Path(__file__).parent / "calls.txt"
GAIN = {"baseline": 0.0, "method": 0.1, "control": 0.0, "further": 0.05}
GRID = ({"bonus": 0.0}, {"bonus": 0.5}, {"bonus": 0.25})
HIGHER = True
SLUG = "fake"
SOURCES = ()


def run_arm(part):
    def run(trial):
        with CALLS.open("a") as file:
            file.write(f"{part} {trial.seed} {trial.split} {trial.changes.get('bonus', '-')}\\n")
        if part != "control":
            trial.note("twice", 2.0 * trial.seed)
        return GAIN[part] + trial.changes.get("bonus", 0.0) + trial.seed + 0.001 * (trial.seed % 2) * (part == "method")
    return run


def claim():
    arms = tuple(Arm(f"{part} arm", part, run_arm(part), GRID) for part in GAIN)
    control = Control("No better than the baseline.", lambda numbers: numbers["control"] <= numbers["baseline"])
    return (Claim(SLUG, "sums", "Adds 0.1 (table 1).", "Sums.", "sum", arms, control, higher_is_better=HIGHER, sources=SOURCES),)
'''


@pytest.fixture
def fake(tmp_path) -> Callable[..., ModuleType]:
    """Return a function that makes the module of a fake method, its code changed as asked."""

    def make(*changes: tuple[str, str]) -> ModuleType:
        code = FAKE
        for old, new in changes:
            assert old in code
            code = code.replace(old, new)
        path = tmp_path / "fake.py"
        path.write_text(code)
        spec = importlib.util.spec_from_file_location("fake", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        exec(compile(code, path, "exec"), module.__dict__)  # not through the import system, which keeps compiled copies
        return module

    return make


@pytest.fixture
def calls(tmp_path) -> Callable[[], list[str]]:
    """Return a function that gives the calls of the fake's arms since it was last asked."""
    path: Path = tmp_path / "calls.txt"

    def take() -> list[str]:
        found = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return found

    return take


@pytest.fixture
def result():
    """Return the result of a claim that was never run."""
    from diptych.claims.ledger import ControlCheck, Hashes, Result, Search
    from diptych.types import Interval

    return Result(
        slug="fake",
        name="scenes",
        claim="Recall | at 1 rises\nfrom 40 to 43 (table 2).",
        setting="6,000 drawn scenes.",
        metric="recall at 1",
        higher_is_better=True,
        seeds=(0, 1, 2),
        arms={
            "baseline": [0.4, 0.5, 0.45],
            "method": [0.5, 0.6, 0.55],
            "control": [0.1, 0.1, 0.1],
            "frozen": [0.3, 0.3, 0.3],
        },
        names={"baseline": "CLIP", "method": "Fake", "control": "shuffled", "frozen": "frozen"},
        difference=Interval(0.1, 0.05, 0.15),
        control_check=ControlCheck("At chance.", True),
        verdict="reproduced",
        search=Search(0, 2, {"method": {"objective": {"weight": 0.5}}}, {"method": [0.4, None]}),
        samples={"baseline": 60000, "method": 60000, "control": 60000, "frozen": 60000},
        minutes=8.25,
        command="diptych reproduce fake",
        versions={"torch": "2.14.1"},
        hashes=Hashes({"fake": "0" * 16}, {"method": ["1" * 16]}, {"method": ["2" * 16]}, {"scenes:train": "3" * 16}),
    )
