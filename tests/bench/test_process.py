import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from diptych.bench.process import Anchors, Child, environment, fresh
from diptych.bench.resident import resident
from diptych.errors import DiptychError

SCRIPT = """
import sys
from diptych.bench.serve import serve
def make(start):
    print("a library talks")
    state = [start]
    def step():
        state[0] += 1
        if state[0] > 3:
            raise ValueError("enough")
        print("and talks")
        return state[0]
    return step
serve(make, ("numpy",))
"""


@pytest.fixture
def place(tmp_path):
    """Return a folder with a script and with an environment whose Python is this one."""
    (tmp_path / "count.py").write_text(SCRIPT)
    (tmp_path / "broken.py").write_text("raise ImportError('no such package')")
    (tmp_path / "here" / "bin").mkdir(parents=True)
    (tmp_path / "here" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "here" / "pyvenv.cfg").write_text(f"home = {os.path.dirname(os.path.realpath(sys.executable))}\n")
    return tmp_path


@pytest.fixture
def anchors(place, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    (place / "here" / ".done").touch()
    with Anchors(place, place) as found:
        yield found


def test_a_child_takes_steps_when_asked(place):
    child = Child([sys.executable, str(place / "count.py")], {"start": 1})
    assert child.hello == {"versions": {"numpy": np.__version__}}
    assert [child.step().value for _ in range(2)] == [2, 3]  # what it printed is not in the way
    with pytest.raises(DiptychError, match=r"count\.py ended with code 1: ValueError: enough"):
        child.step()


def test_an_anchor_is_a_contender_with_its_versions(anchors):
    (contender,) = anchors.start("here", "counter", "count", start=0)
    turn = contender.step()
    assert (contender.name, turn.value) == ("counter", 1) and turn.seconds > 0
    assert anchors.versions == {"here": {"numpy": np.__version__}} and anchors.notes == []
    assert anchors.ask("here", "counter", "count", start=2) == 3


def test_what_cannot_start_is_left_out_with_a_note(anchors):
    assert anchors.start("there", "x", "count", start=0) == []
    assert anchors.start("here", "y", "broken") == []
    assert anchors.ask("here", "z", "count", start=3) is None
    assert anchors.ask("there", "x", "count", start=3) is None
    first, second, third = anchors.notes
    assert first == "there is left out: its environment is not there; `make bench` makes it."
    assert second == "y is left out: broken.py ended with code 1: ImportError: no such package."
    assert third == "z is left out: count.py ended with code 1: ValueError: enough."


def test_children_end_with_the_context(place, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    (place / "here" / ".done").touch()
    with Anchors(place, place) as found:
        found.start("here", "counter", "count", start=0)
        (process,) = (child._process for child in found._children)
        assert process.poll() is None
    assert process.poll() is not None


TOUCH = """
from diptych.bench.resident import resident
before = resident("VmRSS")
block = bytearray(100 * 2**20)
del block
print(resident("VmHWM") - before)
"""


def test_memory_is_that_of_the_process_alone():
    block = np.ones(300 * 2**20, np.uint8)  # a child must not start at its parent's peak
    assert 95 < float(subprocess.check_output([sys.executable, "-c", TOUCH])) < 110
    assert resident("VmHWM", os.getpid()) >= len(block) / 2**20


def test_fresh_runs_a_function_in_another_process():
    assert fresh(os.path.join, "a", "b") == "a/b"
    with pytest.raises(DiptychError, match=r"getsize.* ended with code 1: FileNotFoundError"):
        fresh(os.path.getsize, "nowhere")


@pytest.mark.parametrize(
    "given, expected", [({}, "1000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None), ({"GOMP_SPINCOUNT": "5"}, "5")]
)
def test_threads_of_children_spin_briefly_unless_told_otherwise(given, expected, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert environment().get("GOMP_SPINCOUNT") == expected
    assert environment()["OMP_NUM_THREADS"] == str(torch.get_num_threads())


def test_the_far_end_needs_the_standard_library_only():
    """What anchors import must not pull in what their environments lack."""
    code = (
        "import sys, diptych.bench.serve, diptych.bench.resident, diptych.bench.stream\n"
        "print({'torch', 'jaxtyping', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
