"""What a claim is: arms that share data, budget, initialisation and evaluation, and a control that must behave as said.

A method file's `claim()` returns these records; `reproduce` runs them. The records know nothing of methods: a trial hands out the
recipe of a method by its slug, so the file of one method can compare itself with another without importing it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from diptych.models.dual import DualEncoder
from diptych.training.recipe import Recipe

Part = Literal["baseline", "method", "control", "further"]


@dataclass(frozen=True)
class Trial:
    """One run of one arm, as the harness asks for it.

    Attributes:
        seed: Of weights, order and augmentation; the arms of a claim share their seeds.
        split: `validation` while hyper-parameters are chosen, `test` for the numbers that count. Training samples never change.
        changes: The point of the arm's grid that is tried.
        mini: Returns the small recipe of a method, by its slug.
        train: Trains from a recipe on samples with this trial's seed, and returns the model with its final weights. A model given third is
            trained further, in place. With `shared`, arms of one seed that ask for the same recipe on the very same source object get copies
            of one model, as claims of what is trained once and used in many ways do.
        shown: Takes the number of samples that an arm has shown to something it trained by itself, for the record; `train` counts its own.
        note: Takes name and value of a further number of the trial. It decides nothing, and stands in the result beside the metric.
    """

    seed: int
    split: Literal["validation", "test"]
    changes: Mapping[str, Any]
    mini: Callable[[str], Recipe[Any]]
    train: Callable[..., DualEncoder]
    shown: Callable[[int], None] = lambda count: None
    note: Callable[[str, float], None] = lambda name, value: None


@dataclass(frozen=True)
class Arm:
    """One way of doing it.

    Attributes:
        name: Short, for tables and plots.
        part: What it is to the claim. `control` is a version that must not work; `further` arms are shown and decide nothing.
        run: Returns the metric of one trial.
        grid: Hyper-parameters to choose from on the validation split; all arms of a claim have grids of one size.
    """

    name: str
    part: Part
    run: Callable[[Trial], float]
    grid: tuple[Mapping[str, Any], ...] = field(default=({},))


@dataclass(frozen=True)
class Control:
    """How the control must come out for the result to mean anything.

    Attributes:
        expected: In a sentence.
        passed: Given the numbers of each part, one per seed, whether it came out so.
    """

    expected: str
    passed: Callable[[Mapping[Part, Sequence[float]]], bool]


@dataclass(frozen=True)
class Claim:
    """A paper's claim in a setting small enough to run here.

    Attributes:
        slug: Of the method.
        name: Of this setting, one word; unique within the method.
        claim: What the paper says, with its number.
        setting: What is trained and measured here, in a sentence.
        metric: Name of what the arms return.
        arms: One baseline, one method, one control, any number of further ones.
        control: How the control must come out.
        seeds: At least three.
        higher_is_better: Direction of the metric.
        sources: Data sets, as `open_source` takes them. Their fingerprints are recorded, and a trial that is in the log is run again once
            they change.
        ours: Whether the claim is ours and not the paper's; then it says nothing of the method's state.
    """

    slug: str
    name: str
    claim: str
    setting: str
    metric: str
    arms: tuple[Arm, ...]
    control: Control
    seeds: tuple[int, ...] = (0, 1, 2)
    higher_is_better: bool = True
    sources: tuple[str, ...] = ()
    ours: bool = False
