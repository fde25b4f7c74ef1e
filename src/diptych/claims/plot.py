"""The picture of a result: every seed's number and each arm's interval, and the paired difference that decides."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych.claims.ledger import Result
from diptych.claims.verdict import over_seeds
from diptych.errors import require
from diptych.files import atomic_file

COLOURS = {"baseline": "#0072B2", "method": "#D55E00", "control": "#7F7F7F", "further": "#009E73"}
"""Blue, vermilion, grey and green that the colour-blind can tell apart (Okabe and Ito 2008)."""
MARKERS = {"baseline": "o", "method": "s", "control": "X", "further": "D"}


def plot_results(results: Sequence[Result], path: Path) -> None:
    """Write a PNG with one row of two panels per claim: the arms, and method minus baseline.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    figure_module = require("matplotlib.figure", "plot")
    heights = [1.3 + 0.42 * len(result.arms) for result in results]
    figure = figure_module.Figure(figsize=(11, sum(heights)), layout="constrained")
    axes = figure.subplots(
        len(results), 2, squeeze=False, gridspec_kw={"width_ratios": [3, 2], "height_ratios": heights}
    )
    for result, (arms, difference) in zip(results, axes, strict=True):
        _draw_arms(arms, result)
        _draw_difference(difference, result)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _draw_arms(axis: Any, result: Result) -> None:
    """Draw one line per arm: its seeds as open marks, mean and interval below them."""
    for row, (key, values) in enumerate(result.arms.items()):
        part = key if key in COLOURS else "further"
        _draw_interval(axis, values, row, COLOURS[part], MARKERS[part])
    axis.set_yticks(range(len(result.arms)), [_label(result, key) for key in result.arms])
    axis.set_ylim(len(result.arms) - 0.4, -0.6)
    axis.set_xlabel(f"{result.metric} ({'higher' if result.higher_is_better else 'lower'} is better)")
    control = "as expected" if result.control_check.passed else "NOT as expected"
    axis.set_title(f"{result.slug}, {result.name}: {result.verdict} (control {control})", loc="left")
    _tidy(axis)


def _draw_difference(axis: Any, result: Result) -> None:
    pairs = zip(result.arms["baseline"], result.arms["method"], strict=True)
    _draw_interval(axis, [after - before for before, after in pairs], 0, COLOURS["method"], MARKERS["method"])
    axis.axvline(0, color="black", linewidth=1, linestyle="--")
    axis.set_yticks([])
    axis.set_ylim(0.9, -0.9)
    axis.set_xlabel("method minus baseline, seed by seed")
    axis.set_title(f"paired over {len(result.seeds)} seeds, 95 % interval", loc="left")
    _tidy(axis)


def _draw_interval(axis: Any, values: Sequence[float], row: int, colour: str, marker: str) -> None:
    """Draw seeds in a row, and below them their mean with its interval."""
    interval = over_seeds(values)
    axis.plot(values, [row - 0.12] * len(values), marker, markersize=7, markerfacecolor="none", color=colour)
    axis.plot([interval.low, interval.high], [row + 0.14] * 2, color=colour, linewidth=3, solid_capstyle="butt")
    axis.plot(interval.value, row + 0.14, "|", markersize=13, markeredgewidth=3, color=colour)


def _label(result: Result, key: str) -> str:
    name = result.names[key]
    return f"{name} ({key})" if key in COLOURS else name


def _tidy(axis: Any) -> None:
    axis.grid(axis="x", color="#DDDDDD")
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
