"""What a sequence of tasks did to a model: one matrix of scores, and the numbers that the field reads off it.

Row k of the matrix is the model after stage k, row 0 the model before any; column i is task i, measured after every stage whether it was
trained yet or not. Columns behind the tasks are never trained: they show what else the model forgets.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diptych.errors import EvaluationError, require
from diptych.evaluation.stats import bootstrap_means
from diptych.files import atomic_file, write_text
from diptych.types import Interval

Matrix = Float[np.ndarray, "stages tasks"]
"""As many stages as tasks: entry (k, i) is the score on task i after stage k, both from 0 and without the model before any stage."""


def transfer(scores: Matrix) -> float:
    """Return how well tasks are solved before they are trained: mean_{i >= 2} mean_{k < i} A_ki.

    The first task has no stage before it and takes no part; nor does the model before any stage. Untrained skill kept whole gives the zero-shot
    mean of tasks 2 to n.

    Raises:
        EvaluationError: If there are fewer than two tasks, or a number is missing.

    Source: Zheng et al. 2023 (MTIL), section 4.1.
    """
    return float(_transfer(_square(scores)))


def average(scores: Matrix) -> float:
    """Return the mean over all stages and tasks: mean_{k, i} A_ki.

    Source: Zheng et al. 2023 (MTIL), section 4.1.
    """
    return float(_average(_square(scores, least=1)))


def last(scores: Matrix) -> float:
    """Return the mean over tasks after the last stage: mean_i A_ni.

    Source: Zheng et al. 2023 (MTIL), section 4.1.
    """
    return float(_last(_square(scores, least=1)))


def forgetting(scores: Matrix) -> float:
    """Return how far tasks fall below the best they were since they were trained: mean_{i < n} (max_{i <= k < n} A_ki - A_ni).

    Returns:
        0 when nothing was forgotten; below 0 when later stages helped.

    Source: Chaudhry et al. 2018, equation 3, the maximum taken from the task's own stage on.
    """
    return float(_forgetting(_square(scores)))


def backward_transfer(scores: Matrix) -> float:
    """Return what later stages did to tasks: mean_{i < n} (A_ni - A_ii); below 0 when they were forgotten.

    Source: Lopez-Paz and Ranzato 2017, equation 3.
    """
    return float(_backward_transfer(_square(scores)))


def seen_accuracy(scores: Matrix, sizes: Sequence[int]) -> Float[np.ndarray, " n"]:
    """Return the accuracy over all items of the tasks seen so far, after each stage: sum_{i <= k} n_i A_ki / sum_{i <= k} n_i.

    Its mean and its last entry are the two numbers of class-incremental learning, if the classes to choose from were those seen so far.

    Args:
        scores: Share of right answers.
        sizes: Items that each task is measured on, n_i.

    Source: Rebuffi et al. 2017 (iCaRL), section 4.
    """
    checked, weight = _square(scores, least=1), np.asarray(sizes, dtype=np.float64)
    if weight.shape != (len(checked),) or not (weight > 0).all():
        raise EvaluationError(
            f"Each of the {len(checked)} tasks needs a number of items above 0; the sizes are {list(sizes)}."
        )
    seen: Float[np.ndarray, " n"] = np.tril(checked) @ weight / weight.cumsum()
    return seen


@dataclass(frozen=True)
class Trace:
    """Scores of one model through a sequence of stages. A matrix says nothing of its items, so there are no intervals: those are `ItemTrace`'s.

    Attributes:
        metric: What the scores are, for example `top-1` or `R@1`; higher is better.
        stages: Names of the stages, in order.
        tasks: Names of the columns; the first ones are those of the stages, further ones are never trained.
        scores: One row for the model before any stage, then one per stage.
    """

    metric: str
    stages: tuple[str, ...]
    tasks: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if self.tasks[: len(self.stages)] != self.stages:
            raise EvaluationError(
                f"The first columns are the tasks of the stages, {list(self.stages)}; they are {list(self.tasks)}."
            )
        if [len(row) for row in self.scores] != [len(self.tasks)] * (len(self.stages) + 1):
            raise EvaluationError(
                f"{len(self.stages)} stages and {len(self.tasks)} tasks make {len(self.stages) + 1} rows of {len(self.tasks)} scores; "
                f"there are rows of {[len(row) for row in self.scores]}."
            )

    @property
    def matrix(self) -> Matrix:
        """Return the scores of the stages on their own tasks."""
        return np.array(self.scores)[1:, : len(self.stages)]

    @property
    def summary(self) -> dict[str, float]:
        """Return the numbers of this file by name, and for every column behind the tasks what is left of it: last / start.

        After one stage there are only average and last, as the others look at an earlier or a later one.
        """
        found = {name: float(number(_square(self.matrix, least=1))) for name, number in _defined(self.stages).items()}
        for column in range(len(self.stages), len(self.tasks)):
            start = self.scores[0][column]
            found[f"retention/{self.tasks[column]}"] = self.scores[-1][column] / start if start else float("nan")
        return found

    def table(self) -> str:
        """Return the matrix in Markdown, percent with one decimal; the task of each stage is in bold in its row."""
        lines = [f"| {self.metric} after | " + " | ".join(self.tasks) + " |", "|---" * (len(self.tasks) + 1) + "|"]
        for number, row in enumerate(self.scores):
            cells = [f"{100 * score:.1f}" for score in row]
            if number:
                cells[number - 1] = f"**{cells[number - 1]}**"
            lines.append(f"| {('start', *self.stages)[number]} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def save(self, path: Path) -> None:
        """Write scores and summary as JSON; `read_trace` reads it back."""
        write_text(path, json.dumps(self._record(), indent=2) + "\n")

    def _record(self) -> dict[str, Any]:
        summary = {name: None if value != value else value for name, value in self.summary.items()}  # JSON has no NaN
        return {**asdict(self), "summary": summary}

    def plot(self, path: Path) -> None:
        """Write the matrix as a heat map (PNG): above the steps what was not trained yet, below what was.

        Raises:
            MissingExtraError: If matplotlib is not installed.
        """
        figure_module = require("matplotlib.figure", "plot")
        rows, columns = len(self.scores), len(self.tasks)
        figure = figure_module.Figure(figsize=(2.2 + 0.8 * columns, 1.6 + 0.45 * rows), layout="constrained")
        axis = figure.subplots()
        image = axis.imshow(np.array(self.scores) * 100, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for row, numbers in enumerate(self.scores):
            for column, score in enumerate(numbers):
                axis.text(column, row, f"{100 * score:.0f}", **_text_style(score))
        for stage in range(len(self.stages)):
            axis.add_patch(_frame(stage))
        axis.set_xticks(range(columns), self.tasks, rotation=30, ha="right")
        axis.set_yticks(range(rows), ["start", *self.stages])
        axis.set_ylabel("after stage")
        figure.colorbar(image, label=f"{self.metric}, %")
        with atomic_file(path) as file:
            figure.savefig(file, format="png", dpi=150)


Items = tuple[float, ...]
"""One score per item of a task, for example 1 for a hit and 0 for a miss."""


@dataclass(frozen=True)
class ItemTrace:
    """Scores of one model through a sequence of stages, item by item, so that every number has its interval.

    Attributes:
        metric: As in `Trace`.
        stages: As in `Trace`.
        tasks: As in `Trace`.
        items: One row for the model before any stage, then one per stage: the items of each task, the same and in the same order in every row.
    """

    metric: str
    stages: tuple[str, ...]
    tasks: tuple[str, ...]
    items: tuple[tuple[Items, ...], ...]

    def __post_init__(self) -> None:
        counts = [[len(task) for task in row] for row in self.items]
        if any(row != counts[0] for row in counts) or not all(map(all, counts)):
            raise EvaluationError(
                f"Every task needs the same items, at least one, after every stage; the rows have {counts} of them. Measure all stages on the same "
                "samples."
            )
        _ = self.trace  # which checks that rows and columns fit

    @property
    def trace(self) -> Trace:
        """Return the mean of each task's items after each stage."""
        return Trace(
            self.metric,
            self.stages,
            self.tasks,
            tuple(tuple(float(np.mean(task)) for task in row) for row in self.items),
        )

    def intervals(self, *, seed: int = 0) -> dict[str, Interval]:
        """Return the numbers of `Trace.summary` with their 95 % bootstrap intervals.

        The items of a task are drawn together for all stages, and tasks independently. What is left of a column has no interval where too many
        resamples start at 0. The maximum in `forgetting` leans upwards where items are few.

        Args:
            seed: Of the 2,000 resamples.
        """
        samples = [np.array(task, dtype=np.float64).T for task in zip(*self.items, strict=True)]  # each [items, rows]
        own = [sample[:, 1:] for sample in samples[: len(self.stages)]]

        def measured(number: Number, *chosen: np.ndarray) -> Interval:
            def of_means(*means: np.ndarray) -> np.ndarray:
                found: np.ndarray = number(np.array(means).reshape(len(chosen), chosen[0].shape[1], -1).swapaxes(0, 1))
                return found

            return bootstrap_means(of_means, *chosen, seed=seed)

        found = {name: measured(number, *own) for name, number in _defined(self.stages).items()}
        for name, sample in list(zip(self.tasks, samples, strict=True))[len(own) :]:
            with np.errstate(divide="ignore", invalid="ignore"):
                left = measured(lambda scores: scores[-1, 0] / scores[0, 0], sample)
            if np.isfinite([left.low, left.high]).all():
                found[f"retention/{name}"] = left
        return found

    def save(self, path: Path) -> None:
        """Write what `Trace.save` does, and the intervals; `read_trace` reads the scores back."""
        intervals = {name: interval.to_json() for name, interval in self.intervals().items()}
        write_text(path, json.dumps({**self.trace._record(), "intervals": intervals}, indent=2) + "\n")


def read_trace(path: Path) -> Trace:
    """Return what `Trace.save` wrote."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    scores = tuple(tuple(row) for row in record["scores"])
    return Trace(record["metric"], tuple(record["stages"]), tuple(record["tasks"]), scores)


def angles(first: Float[Tensor, "*n d"], second: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
    """Return the angles between vectors in radians, in [0, pi]; pi / 2 at chance in many dimensions.

    2 atan2(|a - b|, |a + b|) of the normalised vectors, which is exact near 0 and pi, where the arc cosine is not.
    """
    one, other = (F.normalize(vectors.double(), dim=-1) for vectors in (first, second))
    return 2 * torch.atan2((one - other).norm(dim=-1), (one + other).norm(dim=-1))


def inner_angles(features: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Return the angle between every two samples of one modality: how its cloud is shaped, whichever way it is turned.

    Source: Ni et al. 2023 (Mod-X), section 3, self-angle relationship matrix.
    """
    count = len(features)
    return angles(features[:, None].expand(-1, count, -1), features.expand(count, -1, -1))


def rotation_gap(
    image: tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]], text: tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]
) -> float:
    """Return by how much the two towers turned differently between two models: |mean image angle - mean text angle| in radians.

    Args:
        image: Embeddings of the same images by the earlier and the later model.
        text: Embeddings of the same texts.

    Source: Ni et al. 2023 (Mod-X), section 3, inter-modal deviation; the summary by two means is ours.
    """
    return abs(float(angles(*image).mean() - angles(*text).mean()))


Number = Callable[[Any], Any]
"""From scores [stages, tasks, ...] to [...]: of one matrix, or of many behind one another."""


def _transfer(scores: Any) -> Any:
    return np.mean([scores[:task, task].mean(0) for task in range(1, len(scores))], axis=0)


def _average(scores: Any) -> Any:
    return scores.mean((0, 1))


def _last(scores: Any) -> Any:
    return scores[-1].mean(0)


def _forgetting(scores: Any) -> Any:
    return np.mean([scores[task:-1, task].max(0) - scores[-1, task] for task in range(len(scores) - 1)], axis=0)


def _backward_transfer(scores: Any) -> Any:
    return np.mean([scores[-1, task] - scores[task, task] for task in range(len(scores) - 1)], axis=0)


def _defined(stages: Sequence[str]) -> dict[str, Number]:
    """Return the numbers that so many stages have, by name."""
    after_one: dict[str, Number] = {"average": _average, "last": _last}
    if len(stages) == 1:
        return after_one
    return {"transfer": _transfer, **after_one, "forgetting": _forgetting, "backward_transfer": _backward_transfer}


def _square(scores: Matrix, *, least: int = 2) -> Matrix:
    found = np.asarray(scores, dtype=np.float64)
    if found.ndim != 2 or found.shape[0] != found.shape[1] or len(found) < least or not np.isfinite(found).all():
        raise EvaluationError(
            f"These numbers need one row per stage and one column per task, at least {least} of each and none missing; "
            f"the matrix is {' x '.join(map(str, found.shape))} with {int((~np.isfinite(found)).sum())} missing numbers."
        )
    return found


def _text_style(score: float) -> dict[str, Any]:
    return {"ha": "center", "va": "center", "fontsize": 8, "color": "black" if score > 0.6 else "white"}


def _frame(stage: int) -> Any:
    """Return a frame around the cell of a stage and its own task."""
    patches = require("matplotlib.patches", "plot")
    return patches.Rectangle((stage - 0.5, stage + 0.5), 1, 1, fill=False, edgecolor="white", linewidth=2)
