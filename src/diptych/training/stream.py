"""A stream: one model is trained on one task after another, and measured on all of them before the first stage and after every one."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console

from diptych.config import fingerprint
from diptych.data.sources import AbstractSource
from diptych.errors import ConfigError
from diptych.files import write_text
from diptych.models.checkpoint import load_model, save_model
from diptych.models.dual import DualEncoder
from diptych.models.modes import set_mode
from diptych.models.weights import CHECKPOINT
from diptych.training.loop import fit
from diptych.training.prepare import make_loader
from diptych.training.recipe import Recipe
from diptych.verbs import AbstractObjective

SCORES = "scores.json"


@dataclass(frozen=True)
class Stage:
    """One task.

    Attributes:
        name: For tables, and the folder of the stage.
        source: Training samples.
        recipe: How they are trained on; its `model.start` is not looked at, since a stage starts from the one before.
    """

    name: str
    source: AbstractSource
    recipe: Recipe[Any]


Train = Callable[[DualEncoder, Stage, Path], DualEncoder]
"""Returns the model after a stage. The path is the stage's own folder, for whatever lets it go on after a kill."""

Score = TypeVar("Score", bound=float | tuple[float, ...])
"""What a model is worth in one column: a number, as `Trace` takes it, or one for each item, as `ItemTrace` does."""

Measure = Callable[[DualEncoder], Sequence[Score]]
"""Returns one score per column: every task of the stream, then whatever else is watched."""


def run_stream(
    model: DualEncoder, stages: Sequence[Stage], train: Train, measure: Measure[Score], folder: Path
) -> tuple[tuple[Score, ...], ...]:
    """Return the scores of every task before the first stage and after every one: one row for each.

    Each finished stage leaves its model and its scores in a folder of its own. Called again, what is finished is read and not repeated; every
    stage starts from the model on the disk, so that a stream that was stopped anywhere ends in the same scores.

    Args:
        model: To start from; changed.
        stages: In order.
        train: Trains one stage, see `fitted`.
        measure: Measures the model.
        folder: Of the stream; made when absent.

    Raises:
        ConfigError: If the folder holds a stream of other stages.
    """
    start = folder / "00-start"
    rows = [_scores(start, "start", lambda: model, measure)]
    before = start
    for number, stage in enumerate(stages, 1):
        place = folder / f"{number:02}-{stage.name}"

        def trained(stage: Stage = stage, place: Path = place, before: Path = before) -> DualEncoder:
            return train(load_model(before / CHECKPOINT).to(model.device), stage, place)

        asked = f"{fingerprint(stage.recipe)} {stage.source.fingerprint}"
        rows.append(_scores(place, asked, trained, measure))
        before = place
    return tuple(rows)


def fitted(make_objective: Callable[[DualEncoder, Any], AbstractObjective[Any]], *, console: Console) -> Train:
    """Return a `Train` that fits an objective as any run does, and goes on from the checkpoint of a run that was stopped.

    The objective is made anew for every stage, so what it takes its model to be at the start is the model after the stage before.

    Args:
        make_objective: For example the `Objective` of a method; given the model and `recipe.objective`.
        console: Where progress is shown.
    """

    def train(model: DualEncoder, stage: Stage, place: Path) -> DualEncoder:
        recipe = stage.recipe
        set_mode(model.vision, recipe.model.vision_mode)
        set_mode(model.text, recipe.model.text_mode)
        objective = make_objective(model, recipe.objective).to(model.device)
        torch.manual_seed(recipe.seed)
        place.mkdir(parents=True, exist_ok=True)
        loader = make_loader(recipe, stage.source, model)
        fit(objective, loader, recipe, place, console=console, resume=(place / CHECKPOINT).exists())
        return model

    return train


def _scores(place: Path, asked: str, trained: Callable[[], DualEncoder], measure: Measure[Score]) -> tuple[Score, ...]:
    """Return the scores in a folder; where there are none, of the model that goes there."""
    path = place / SCORES
    if not path.exists():
        model = trained()
        record = {"asked": asked, "scores": [np.asarray(score, np.float64).tolist() for score in measure(model)]}
        save_model(model, place / CHECKPOINT)  # the scores come last: they say that the stage is finished
        write_text(path, json.dumps(record))
    record = json.loads(path.read_text())
    if record["asked"] != asked:
        raise ConfigError(
            f"{place} was run with other settings or other samples. Give the stream the same stages, or another folder."
        )
    scores: Any = [tuple(score) if isinstance(score, list) else score for score in record["scores"]]
    return tuple(scores)
