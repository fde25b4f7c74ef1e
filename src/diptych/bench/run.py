"""Run areas of the benchmark, one after the other, and write what they found."""

import shutil
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from diptych.bench.machine import machine, versions
from diptych.bench.plot import DRAWN, plot_record
from diptych.bench.process import Anchors
from diptych.bench.record import Record, markdown, plot_link, update_page, write_record
from diptych.errors import DiptychError

Area = Literal["train", "loss", "cached", "data", "embed", "evaluate", "search", "curate", "startup"]
AREAS: tuple[Area, ...] = get_args(Area)
"""Each is a module here with a `Setting`, its `QUICK` and `measure`."""


def run_areas(
    areas: Sequence[Area],
    *,
    quick: bool,
    out: Path,
    anchors: Path,
    scripts: Path,
    page: Path,
    say: Callable[[str], None],
) -> tuple[Record, ...]:
    """Run areas, write their records and plots to a folder, and renew the page.

    Args:
        areas: To be run, in this order.
        quick: At sizes that only show that all runs; the page stays as it is.
        out: Folder of results.
        anchors: Folder of the anchors' environments.
        scripts: Folder of what runs in them.
        page: Where tables stand between comments; left alone if it is not there.
        say: Told what goes on.

    Raises:
        DiptychError: If an area came to nothing; the others are run all the same.
    """
    records, failed = [], []
    for area in areas:
        say(f"{area}: running")
        try:
            record = run_area(area, quick=quick, anchors=anchors, scripts=scripts)
        except DiptychError as error:
            failed.append(f"{area}: {error}")
            say(failed[-1])
            continue
        path = write_record(record, out)
        if area in DRAWN and find_spec("matplotlib"):
            plot_record(record, path.with_suffix(".png"))
        say(f"{area}: {record.minutes:.1f} minutes; {path} and {path.with_suffix('.md')}")
        print(f"\n## {area}\n\n{markdown(record)}\n", flush=True)
        records.append(record)
        if not quick and page.is_file():
            _publish(area, out, page)
    if failed:
        raise DiptychError(f"{len(failed)} of {len(areas)} areas came to nothing. {' '.join(failed)}")
    return tuple(records)


def run_area(area: Area, *, quick: bool, anchors: Path, scripts: Path) -> Record:
    """Return the record of one area."""
    module = import_module(f"diptych.bench.{area}")
    began, here = time.perf_counter(), machine()
    with Anchors(anchors, scripts) as found:
        finding = module.measure(module.QUICK if quick else module.Setting(), found)
    return Record(
        area,
        finding,
        quick,
        (time.perf_counter() - began) / 60,
        f"diptych bench {area}{' --quick' if quick else ''}",
        here,
        {**versions(), "anchors": found.versions},
        tuple(found.notes),
    )


def _publish(area: Area, out: Path, page: Path) -> None:
    """Put the plot beside the page and the table into it."""
    plot, shown = out / f"{area}.png", page.parent / plot_link(area)
    if plot.is_file():
        shown.parent.mkdir(exist_ok=True)
        shutil.copyfile(plot, shown)
    update_page(page, out, area)
