"""`bench`: speed and memory beside other libraries."""

from pathlib import Path

from tyro.conf import Positional

from diptych.bench.record import Record
from diptych.bench.run import AREAS, Area, run_areas
from diptych.commands.terminal import say


def bench(
    areas: Positional[tuple[Area, ...]] = (),
    *,
    quick: bool = False,
    out: Path | None = None,
    anchors: Path = Path(".bench"),
    scripts: Path = Path("benchmarks/anchors"),
    page: Path = Path("docs/benchmarks.md"),
) -> tuple[Record, ...]:
    """Measure speed and memory, side by side with other libraries where `make bench` has installed them.

    Args:
        areas: What to measure; everything when absent.
        quick: Only show that all runs: sizes are too small for the numbers to mean anything.
        out: Folder of results; `benchmarks/results` when absent, `runs/bench` for a quick run.
        anchors: Folder with an environment per other library, made by `make bench`.
        scripts: Folder of what runs in those environments.
        page: Page whose tables are renewed, if it is there; a quick run leaves it alone.
    """
    place = out or Path("runs/bench" if quick else "benchmarks/results")
    return run_areas(areas or AREAS, quick=quick, out=place, anchors=anchors, scripts=scripts, page=page, say=say)
