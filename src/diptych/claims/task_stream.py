"""A small benchmark after MTIL: six small image sets, one after another, on pretrained towers that stay as they are.

What is learnt and forgotten are the heads of `lite0-minilm`, so towers see each image once in a process, and a whole stream takes seconds.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn import functional as F

from diptych.claims.claim import Trial
from diptych.data.bundles import class_names
from diptych.data.images import decode
from diptych.data.parts import Prompted, by_domain, prompt
from diptych.data.sources import AbstractSource, Joined, Subset, open_source
from diptych.data.transforms import preprocess
from diptych.evaluation.continual import Trace
from diptych.evaluation.zeroshot import read_prompts
from diptych.models.dual import DualEncoder
from diptych.models.modes import set_mode
from diptych.models.weights import load
from diptych.training.optim import blend
from diptych.training.recipe import Recipe
from diptych.types import Tokens, TowerOutput, concatenate

START = "lite0-minilm"
REFERENCE = "imagenet-1k-samples"
ORDERS: dict[str, tuple[str, ...]] = {
    "I": ("cifar10", "clothing", "nwpu-resisc12", "omniglot", "pacs:photo", "pacs:sketch"),
    "II": ("pacs:sketch", "pacs:photo", "omniglot", "cifar10", "clothing", "nwpu-resisc12"),
}
"""The tasks by name, and in another order."""

SOURCES = ("cifar10", "clothing", "nwpu-resisc12", "omniglot", "pacs", REFERENCE)
PROMPTS = {"nwpu-resisc12": "overhead", "pacs:photo": "style", "pacs:sketch": "style"}
"""Templates of the tasks, those for photos where none are named. Training takes the first, measuring the mean of all."""

PER_CLASS: dict[str, int] = {"train": 20, "validation": 8, "test": 12}
"""Images of a class in each part, as far as there are so many; the parts are disjoint."""

Split = Literal["validation", "test"]
Training = Literal["in turn", "jointly", "none"]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: See `ORDERS`.
        train: Training samples, each with the prompt of its class.
        prompts: One per class, as in training.
    """

    name: str
    train: AbstractSource
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Exam:
    """What a task is measured on, as the frozen towers see it.

    Attributes:
        images: Outputs of the image tower.
        labels: Class of each image.
        texts: For each template, outputs of the text tower for all classes.
    """

    images: TowerOutput
    labels: Int64[Tensor, " n"]
    texts: tuple[Tokens, ...]


@lru_cache
def parts(name: str) -> dict[str, Subset]:
    """Return the disjoint parts of a task's samples, drawn class by class."""
    bundle, _, domain = name.partition(":")
    source = by_domain(open_source(bundle))[domain] if domain else open_source(bundle)
    rows: dict[str, list[int]] = {part: [] for part in PER_CLASS}
    free = {label: [part for part, count in PER_CLASS.items() for _ in range(count)] for label in class_names(source)}
    for row in np.random.default_rng(0).permutation(len(source)).tolist():
        if places := free[str(source.without_image(row).label)]:
            rows[places.pop(0)].append(row)
    return {part: Subset(source, sorted(chosen), f"{name} ({part})") for part, chosen in rows.items()}


@lru_cache
def task(name: str) -> Task:
    """Return a task by its name."""
    source, (template, *_) = parts(name)["train"], _templates(name)
    return Task(name, Prompted(source, template), tuple(prompt(label, template) for label in class_names(source)))


@lru_cache
def exam(name: str, split: Split) -> Exam:
    """Return what a task is measured on; the towers are asked once per process."""
    model, source = _start(), parts(name)[split]
    classes, policy = class_names(source), model.image_policy
    with torch.no_grad():
        pixels = [preprocess(decode(sample.image), policy) for sample in source if sample.image is not None]
        images = concatenate([model.image_output(part) for part in torch.stack(pixels).split(64)])
        texts = [model.tokenizer([prompt(label, template) for label in classes]) for template in _templates(name)]
        outputs = tuple(replace(tokens, output=model.text_output(tokens)) for tokens in texts)
    labels = [classes.index(str(source.without_image(row).label)) for row in range(len(source))]
    return Exam(images, torch.tensor(labels), outputs)


@torch.no_grad()
def accuracy(model: DualEncoder, measured: Exam) -> float:
    """Return zero-shot top-1 with the mean embedding of each class's prompts, in [0, 1]."""
    classes = F.normalize(torch.stack([model.encode_text(tokens) for tokens in measured.texts]).mean(0), dim=-1)
    found = (model.encode_image(measured.images) @ classes.T).argmax(1)
    return float((found == measured.labels).float().mean())


def run_tasks(
    trial: Trial, order: str, recipe: Recipe[Any], *, training: Training = "in turn", keep: float = 0.0
) -> Trace:
    """Return the scores of a stream of tasks.

    Args:
        trial: Of a claim.
        order: Name of an order.
        recipe: Of every stage; its objective is given the prompts of each task.
        training: `none` leaves the model as it is; `jointly` trains it once on all tasks, so that every row but the first is the same.
        keep: After each stage this share of the weights is taken back to those before it (WiSE-FT).
    """
    model, names = copy.deepcopy(_start()), ORDERS[order]
    tasks, exams = [task(name) for name in names], [exam(name, trial.split) for name in names]

    def measured() -> tuple[float, ...]:
        return tuple(accuracy(model, one) for one in exams)

    def train(source: AbstractSource, prompts: Iterable[str]) -> None:
        classes = tuple(dict.fromkeys(prompts))
        trial.train(replace(recipe, objective=replace(recipe.objective, classes=classes)), source, model)

    rows = [measured()]
    if training == "jointly":
        train(Joined([each.train for each in tasks]), (text for each in tasks for text in each.prompts))
    for each in tasks:
        if training == "in turn":
            before = copy.deepcopy(model)
            train(each.train, each.prompts)
            blend(model, before, keep)
        rows.append(measured())
    return Trace("top-1", names, names, tuple(rows))


@lru_cache(maxsize=1)
def _start() -> DualEncoder:
    """Return the model that every stream starts from; not to be changed."""
    model = load(START, offline=True)
    set_mode(model.vision, "frozen")
    set_mode(model.text, "frozen")
    return model


def _templates(name: str) -> tuple[str, ...]:
    return read_prompts(PROMPTS.get(name, "photo")).templates
