"""How many threads torch may use, and how they wait for one another: settled in the environment before torch is loaded."""

import os
from pathlib import Path


def thread_settings(threads: int) -> dict[str, str]:
    """Return the environment for torch's threads that nobody has set: how many, and that they spin briefly for one another, then sleep.

    With the default of GNU OpenMP, 300,000 spins, one other busy process on two cores slowed a small training step from 0.2 s to 8 s.
    Without any, as `OMP_WAIT_POLICY=PASSIVE` has it, a cached step took a quarter longer and a plain one an eighth (medians of three runs at
    raised priority). Beside a busy process of equal priority it is the other way round: with brief spinning a cached step took a third longer.
    """
    wanted = {"OMP_NUM_THREADS": str(threads)}
    if "OMP_WAIT_POLICY" not in os.environ:
        wanted["GOMP_SPINCOUNT"] = "1000"
    return {name: value for name, value in wanted.items() if name not in os.environ}


def usable_cores() -> int:
    """Return how many physical cores this process may keep busy: those it is bound to, and no more than its container's share of time.

    Two threads on one core wait for each other, and in a container torch sees the cores of the whole machine.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = len({_read(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") or str(n) for n in allowed})
    quota, _, period = (_read("/sys/fs/cgroup/cpu.max") or "max").partition(" ")
    return cores if quota == "max" else max(1, min(cores, -(-int(quota) // int(period))))


def _read(path: str) -> str | None:
    """Return what a file of the kernel says; None where there is no such file."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
