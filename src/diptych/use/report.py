"""The report of a training run: one HTML file that needs nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from diptych.evaluation.guard import Curve
from diptych.files import write_text
from diptych.types import Interval
from diptych.use.gallery import Card, render
from diptych.use.page import Line, difference_table, facts, interval_table, line_chart, page


@dataclass(frozen=True)
class Comparison:
    """Versions of one thing beside it.

    Attributes:
        title: One line.
        lead: What was compared how, and what came out.
        rows: (name, value, difference to the first row), the first row without one.
    """

    title: str
    lead: str
    rows: Sequence[tuple[str, Interval, Interval | None]]


@dataclass(frozen=True)
class RunSummary:
    """What a report shows.

    Attributes:
        title: One line.
        lead: One or two sentences: what was trained on what, and how it went.
        metrics: (name, value with interval, value at chance).
        rows: Rows of metrics.jsonl.
        image_to_text: Cards.
        text_to_image: Cards.
        facts: Name and value, by section.
        notes: Sentences, such as the doctor's findings.
        curve: What was learnt and what was kept, along the mixes of the weights before and after.
        comparison: What the parts of the recipe are worth, from an earlier measurement.
    """

    title: str
    lead: str
    metrics: Sequence[tuple[str, Interval, float | None]]
    rows: Sequence[Mapping[str, Any]]
    image_to_text: Sequence[Card] = ()
    text_to_image: Sequence[Card] = ()
    facts: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    curve: Curve | None = None
    comparison: Comparison | None = None


def write_report(path: Path, run: RunSummary) -> None:
    """Write the report; it is there whole or not at all."""
    write_text(path, render_report(run))


def render_report(run: RunSummary) -> str:
    """Return the report as HTML."""
    body = [f'<h1>{escape(run.title)}</h1><p class="lead">{escape(run.lead)}</p>', interval_table(run.metrics)]
    body.append(f'<h2>Curves</h2><div class="charts">{"".join(curves(run.rows))}</div>')
    if run.image_to_text:
        body.append(
            "<h2>Image to text</h2><p class='lead'>A held-out image and the five texts it is nearest to; the right one in green.</p>"
        )
        body.append(render(run.image_to_text))
    if run.text_to_image:
        body.append(
            "<h2>Text to image</h2><p class='lead'>A held-out text and the five images it is nearest to; the right one framed.</p>"
        )
        body.append(render(run.text_to_image))
    if run.curve is not None:
        body.append(_kept(run.curve))
    if run.comparison is not None:
        lead = f"<p class='lead'>{escape(run.comparison.lead)}</p>"
        body.append(f"<h2>{escape(run.comparison.title)}</h2>{lead}{difference_table(run.comparison.rows)}")
    for name, rows in run.facts.items():
        body.append(f"<h2>{escape(name)}</h2>{facts(rows)}")
    if run.notes:
        body.append("<h2>Notes</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in run.notes) + "</ul>")
    return page(run.title, "".join(body))


def _kept(curve: Curve) -> str:
    """Return the section on what the model knew before."""
    lines = [
        Line(f"kept: {curve.metrics[0]} on {curve.probe}", tuple((p.share, p.probe.value) for p in curve.points)),
        Line(f"learnt: {curve.metrics[1]} on {curve.task}", tuple((p.share, p.task.value) for p in curve.points)),
    ]
    kept = [(f"{p.share:.0%} tuned: kept", p.probe, curve.chance) for p in curve.points]
    learnt = [(f"{p.share:.0%} tuned: learnt", p.task, None) for p in curve.points]
    rows = [row for pair in zip(kept, learnt, strict=True) for row in pair]
    chart = line_chart("Mixes of start (0) and tuned weights (1)", lines, x_name="share of the tuned weights")
    return f"<h2>What the model knew before</h2><p class='lead'>{escape(curve.advice)}</p><div class='charts'>{chart}</div>{interval_table(rows)}"


def curves(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one chart per family of numbers in a metrics.jsonl."""
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "evaluation" in row]

    def line(name: str, key: str) -> Line:
        return Line(name, tuple((row["step"], row[key]) for row in steps))

    names = list(dict.fromkeys(name for row in evaluations for name in row["evaluation"]))
    shares = [
        Line(name, tuple((row["step"], row["evaluation"][name]) for row in evaluations if name in row["evaluation"]))
        for name in names
    ]
    recall = [line for line in shares if not line.name.startswith("guard/")]
    guard = [line for line in shares if line.name.startswith("guard/")]
    return [
        line_chart("Loss", [line("loss", "loss")]),
        line_chart("Held-out samples", recall),
        line_chart("What the model knew before", guard),
        line_chart("Learning rate", [line("learning rate", "lr")]),
        line_chart("Scale (1 / temperature)", [line("scale", "scale")]),
        line_chart("Gradient norm", [line("norm before clipping", "grad_norm")]),
        line_chart("Samples per second", [line("samples per second", "samples_per_second")]),
    ]
