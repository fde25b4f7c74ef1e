"""Memory of a process. Standard library only, for use in the environments of anchors."""

from pathlib import Path


def resident(which: str, process: int | str = "self") -> float:
    """Return megabytes of a process in memory, now (`VmRSS`) or at most so far (`VmHWM`).

    The kernel counts these for the process alone; ru_maxrss would start at the size of the process that started it.
    """
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def forget_peak() -> None:
    """Let the largest size so far (`VmHWM`) of this process begin anew at its present size."""
    Path("/proc/self/clear_refs").write_text("5")
