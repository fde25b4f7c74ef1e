import os
import subprocess
import sys

import pytest

from diptych.threads import usable_cores


@pytest.mark.parametrize(
    ("allowed", "siblings", "share", "expected"),
    [
        ({0, 1, 2, 3}, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, "max 100000", 2),  # two threads per core
        ({0, 2}, {0: "0,2", 2: "0,2"}, None, 1),
        (set(range(8)), {}, "250000 100000", 3),
        (set(range(8)), {}, "50000 100000", 1),
        ({4, 5}, {}, "800000 100000", 2),
    ],
)
def test_threads_are_no_more_than_the_cores_that_may_be_used(monkeypatch, allowed, siblings, share, expected):
    known = {f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": text for n, text in siblings.items()}
    monkeypatch.setattr("diptych.threads._read", (known | {"/sys/fs/cgroup/cpu.max": share}).get)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: allowed, raising=False)
    assert usable_cores() == expected


def test_the_number_of_threads_is_chosen_before_torch_is_loaded_unless_it_was_set():
    for given, expected in ((None, str(usable_cores())), ("7", "7")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environment |= {} if given is None else {"OMP_NUM_THREADS": given}
        code = (
            "import os, sys; from diptych.cli import main; main(['--version']); "
            "print(os.environ['OMP_NUM_THREADS'], 'torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split()[-2:] == [expected, "False"]
