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


def report_run(
    folder: Path,
    recipe: Recipe[Any],
    training: AbstractSource,
    held: AbstractSource,
    model: DualEncoder,
    evaluation: Evaluation,
    findings: Sequence[Finding],
    curve: Curve | None = None,
) -> None:
    """Write the report of a run into its folder; of several processes the first one does.

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
    if not distributed.is_first():
        return
    forward, backward = retrieval_cards(evaluation.embedded, held) if evaluation.retrieval is not None else ([], [])
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    seconds = evaluation.seconds
    rows = read_rows(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    data, compute = (sum(row[name] for row in steps) for name in ("seconds_data", "seconds_compute"))
    facts = {
        "What was trained on what": [
            ("training samples", f"{len(training):,} ({training.name})"),
            ("held-out samples, never trained on", f"{len(held):,} ({held.name})"),
            ("method", f"{recipe.method}, model {recipe.model.start}"),
            ("parameters", f"{parameters:,}, of which {trained:,} trained"),
            ("images", f"{model.image_policy.size} pixels, {model.image_policy.resize}"),
            ("epochs, batch, seed", f"{recipe.epochs}, {recipe.data.batch_size}, {recipe.seed}"),
        ],
        "Time": [
            *((name, f"{value:.1f} s") for name, value in seconds.items()),
            ("in steps", f"{compute:.1f} s computing, {data:.1f} s waiting for data"),
            ("processor", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}"),
        ],
        "Versions": list(versions().items()),
    }
    lead = (
        f"{len(training):,} training samples, {recipe.epochs} epochs, {seconds['train']:.0f} s of training. "
        f"All numbers are on {len(held):,} samples that were never trained on, with 95 % bootstrap intervals."
    )
    write_report(
        folder / "report.html",
        RunSummary(
            f"{training.name}: {recipe.method}",
            lead,
            [(name, value, evaluation.chance(name)) for name, value in evaluation.headline().items()],
            rows,
            forward,
            backward,
            facts,
            [*(finding.sentence for finding in findings), *_skipped(steps), *evaluation.notes],
            curve,
        ),
    )


def _skipped(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence on the training samples that could not be used, if there were any."""
    count = steps[-1]["skipped"] if steps else 0
    return [f"In training, unreadable samples were skipped {count:,} times."] if count else []
