"""The report of a run: report.html."""

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diptych.commands.records import versions
from diptych.data.sources import AbstractSource
from diptych.evaluation.guard import Curve
from diptych.evaluation.run import Evaluation
from diptych.models.dual import DualEncoder
from diptych.training import distributed
from diptych.training.doctor import Finding
from diptych.training.log import read_rows
from diptych.training.recipe import Recipe
from diptych.use.gallery import retrieval_cards
from diptych.use.report import RunSummary, write_report


def summarise(
    folder: Path,
    recipe: Recipe[Any],
    training: AbstractSource,
    held: AbstractSource,
    model: DualEncoder,
    evaluation: Evaluation,
    findings: Sequence[Finding],
    curve: Curve | None = None,
) -> RunSummary:
    """Return what the report of a run shows.

    Args:
        folder: Run directory, with metrics.jsonl.
        recipe: All settings.
        training: Samples trained on.
        held: Samples evaluated on.
        model: With its final weights.
        evaluation: On `held`.
        findings: Of the doctor.
        curve: Of the guard, if there was one.
    """
    forward, backward = retrieval_cards(evaluation.embedded, held) if evaluation.retrieval is not None else ([], [])
    rows = read_rows(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    lead = (
        f"{len(training):,} training samples, {recipe.epochs} epochs, {evaluation.seconds['train']:.0f} s of training. "
        f"All numbers are on {len(held):,} samples that were never trained on, with 95 % bootstrap intervals."
    )
    return RunSummary(
        f"{training.name}: {recipe.method}",
        lead,
        [(name, value, evaluation.chance(name)) for name, value in evaluation.headline().items()],
        rows,
        forward,
        backward,
        {
            "What was trained on what": _what(recipe, training, held, model),
            "Time": _time(evaluation.seconds, steps),
            "Versions": list(versions().items()),
        },
        [*(finding.sentence for finding in findings), *_skipped(steps), *evaluation.notes],
        curve,
    )


def report(folder: Path, summary: RunSummary) -> None:
    """Write the report of a run into its folder; of several processes the first one does."""
    if distributed.is_first():
        write_report(folder / "report.html", summary)


def _what(
    recipe: Recipe[Any], training: AbstractSource, held: AbstractSource, model: DualEncoder
) -> list[tuple[str, str]]:
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return [
        ("training samples", f"{len(training):,} ({training.name})"),
        ("held-out samples, never trained on", f"{len(held):,} ({held.name})"),
        ("method", f"{recipe.method}, model {recipe.model.start}"),
        ("parameters", f"{parameters:,}, of which {trained:,} trained"),
        ("images", f"{model.image_policy.size} pixels, {model.image_policy.resize}"),
        ("epochs, batch, seed", f"{recipe.epochs}, {recipe.data.batch_size}, {recipe.seed}"),
    ]


def _time(seconds: Mapping[str, float], steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    data, compute = (sum(row[name] for row in steps) for name in ("seconds_data", "seconds_compute"))
    return [
        *((name, f"{value:.1f} s") for name, value in seconds.items()),
        ("in steps", f"{compute:.1f} s computing, {data:.1f} s waiting for data"),
        ("processor", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}"),
    ]


def _skipped(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence on the training samples that could not be used, if there were any."""
    count = steps[-1]["skipped"] if steps else 0
    return [f"In training, unreadable samples were skipped {count:,} times."] if count else []
