"""Pictures of records: time and memory of the losses over n, and ratios as bars."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diptych.bench.record import Record
from diptych.config import to_json
from diptych.errors import require
from diptych.files import atomic_file

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#7F7F7F"
"""That the colour-blind can tell apart (Okabe and Ito 2008)."""


def plot_record(record: Record, path: Path) -> None:
    """Write a PNG of an area that has a picture.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    figure = require("matplotlib.figure", "plot").Figure(figsize=(11, 4.5), layout="constrained")
    DRAWN[record.area](figure, to_json(record.finding.tables[0].rows))
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _draw_loss(figure: Any, rows: list[Mapping[str, Any]]) -> None:
    """Draw seconds and megabytes of InfoNCE over n, both forms, each width."""
    rows = [row for row in rows if row["loss"] == "InfoNCE"]
    for axis, unit, label in zip(figure.subplots(1, 2), ("s", "mb"), ("seconds", "MB beside the inputs"), strict=True):
        for d, line in zip(sorted({row["d"] for row in rows}), ("--", "-"), strict=False):
            for form, colour, marker in (("tiled", BLUE, "o"), ("plain", VERMILION, "s")):
                points = [
                    (row["n"], row[f"{form}_{unit}"]) for row in rows if row["d"] == d and f"{form}_{unit}" in row
                ]
                axis.plot(*zip(*points, strict=True), line, marker=marker, color=colour, label=f"{form}, d = {d}")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("pairs n")
        axis.set_ylabel(label)
        axis.set_title(f"InfoNCE, value and gradients, fp32: {label}", loc="left")
        axis.grid(color="#DDDDDD")
        axis.legend()


def _draw_train(figure: Any, rows: list[Mapping[str, Any]]) -> None:
    _draw_bars(
        figure,
        rows,
        "over_levers",
        "time of a step / ours with exact levers (longer is slower)",
        lambda row: row["name"],
    )


def _draw_data(figure: Any, rows: list[Mapping[str, Any]]) -> None:
    _draw_bars(
        figure,
        rows,
        "speed",
        "images per second / ImageFolder's (longer is faster)",
        lambda row: f"{row['name']}, {row['workers']} workers",
    )


def _draw_bars(
    figure: Any, rows: list[Mapping[str, Any]], key: str, label: str, name: Callable[[Mapping[str, Any]], str]
) -> None:
    """Draw one bar per row with its interval, ours in blue, and a line at 1; a bar that dwarfs the others is cut off, its number is not."""
    axis = figure.subplots()
    highest = sorted(row[key]["high"] for row in rows)
    end = 1.15 * (highest[-2] if len(rows) > 1 and highest[-1] > 4 * highest[-2] else highest[-1])
    for place, row in enumerate(rows):
        ratio = row[key]
        ends = [[ratio["value"] - ratio["low"]], [ratio["high"] - ratio["value"]]]
        colour = BLUE if row["name"].startswith("diptych") else GREY
        axis.barh(place, ratio["value"], xerr=ends, color=colour, ecolor="black", capsize=3)
        cut = ratio["high"] > end
        axis.annotate(
            f" {ratio['value']:.2f}{' (cut off) ' if cut else ''}",
            (min(ratio["high"], end), place),
            va="center",
            ha="right" if cut else "left",
            color="white" if cut else "black",
        )
    axis.set_xlim(0, end)
    axis.axvline(1, color="black", linewidth=1, linestyle="--")
    axis.set_yticks(range(len(rows)), [name(row) for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel(label)
    axis.spines[["top", "right"]].set_visible(False)


DRAWN: dict[str, Callable[[Any, list[Mapping[str, Any]]], None]] = {
    "loss": _draw_loss,
    "train": _draw_train,
    "data": _draw_data,
}
"""Areas that have a picture."""
