"""A small benchmark after MTIL: six tasks, one after another, and pairs that are only watched. A whole stream takes seconds.

It starts from one of two models. Of `lite0-minilm` the heads are learnt and forgotten, on six image sets, and its towers see each image once in a
process. Of `mini`, which knows emoji and nothing else, all weights are, on six other looks of emoji.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from diptych.claims.claim import Trial
from diptych.data.bundles import class_names
from diptych.data.images import decode
from diptych.data.loader import CacheConfig, LoaderConfig
from diptych.data.parts import Prompted, by_domain, prompt
from diptych.data.sources import AbstractSource, Joined, Listed, Subset, open_source
from diptych.data.transforms import preprocess
from diptych.evaluation.continual import Trace
from diptych.evaluation.zeroshot import read_prompts
from diptych.models.dual import DualEncoder, Images
from diptych.models.modes import is_frozen, set_mode
from diptych.models.weights import load
from diptych.training.optim import blend
from diptych.training.prepare import hold_out
from diptych.training.recipe import ModelConfig, Recipe
from diptych.types import Tokens, concatenate

START = "lite0-minilm"
STARTS = {
    START: ModelConfig(start=START, vision_mode="frozen", text_mode="frozen"),
    "mini": ModelConfig(start="mini"),
}
"""The models, and what of them is trained."""

WATCHED = {START: "flickr8k-1k:dev", "mini": "openmoji:test"}
"""Pairs that are never trained on, of the kind that each model knows: how well it retrieves them is watched."""

WATCHED_COUNT = 100
"""At most so many of them."""

RATES = {START: ({"optimizer": {"lr": 3e-4}}, {"optimizer": {"lr": 1e-3}}), "mini": ({"optimizer": {"lr": 5e-4}},)}
"""Learning rates that every arm of a claim tries; for `mini` there is one, to save time."""

REFERENCE = "imagenet-1k-samples"
ORDERS: dict[str, tuple[str, ...]] = {
    "I": ("cifar10", "clothing", "nwpu-resisc12", "omniglot", "pacs:photo", "pacs:sketch"),
    "II": ("pacs:sketch", "pacs:photo", "omniglot", "cifar10", "clothing", "nwpu-resisc12"),
}
"""The tasks of `lite0-minilm` by name, and in another order."""

LOOKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "negative": lambda pixels: 255 - pixels,
    "upside down": lambda pixels: pixels[::-1],
    "sideways": lambda pixels: pixels.swapaxes(0, 1),
    "grey": lambda pixels: pixels.mean(2, keepdims=True).repeat(3, 2).astype(np.uint8),
    "swapped colours": lambda pixels: pixels[..., [1, 2, 0]],
    "small": lambda pixels: np.pad(
        pixels[::2, ::2], [(size // 4, size // 4) for size in pixels.shape[:2]] + [(0, 0)], constant_values=255
    ),
}
LOOK_ORDERS: dict[str, tuple[str, ...]] = {
    "I": tuple(LOOKS),
    "II": ("small", "grey", "sideways", "negative", "swapped colours", "upside down"),
}
"""The tasks of `mini`, and in another order."""

LOOK_TRAIN, LOOK_EXAM = 100, 60
"""Emoji that each look is trained on, other ones for each, and unseen emoji that all are measured on."""

SOURCES = ("cifar10", "clothing", "nwpu-resisc12", "omniglot", "pacs", REFERENCE, *WATCHED.values())
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
        train: Training samples, each with the prompt of its class, or with a text of its own.
        prompts: One per class, as in training; none for pairs.
    """

    name: str
    train: AbstractSource
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Exam:
    """What a task is measured on.

    Attributes:
        images: Pixels, or outputs of a frozen image tower.
        labels: Row of the texts that each image belongs to.
        texts: For each template the prompts of all classes, with outputs of a frozen text tower.
    """

    images: Images
    labels: Int64[Tensor, " n"]
    texts: tuple[Tokens, ...]


def from_start(recipe: Recipe[Any], start: str) -> Recipe[Any]:
    """Return the small recipe of a method for one of the models; `mini` learns looks in smaller batches."""
    if start == START:
        return replace(recipe, model=STARTS[start])
    data = LoaderConfig(batch_size=25, cache=CacheConfig(pixels=True))
    return replace(recipe, model=STARTS[start], data=data, epochs=4)


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
    if name in LOOKS:
        start = LOOK_TRAIN * [*LOOKS].index(name)
        return Task(name, _seen_as(name, "train", range(start, start + LOOK_TRAIN)), ())
    source, (template, *_) = parts(name)["train"], _templates(name)
    return Task(name, Prompted(source, template), tuple(prompt(label, template) for label in class_names(source)))


@lru_cache
def exam(start: str, name: str, split: Split) -> Exam:
    """Return what a task is measured on; frozen towers are asked once per process."""
    model = _start(start)
    if name in LOOKS:
        first = LOOK_EXAM * (split == "test")
        return _pairs(model, _seen_as(name, "test", range(first, first + LOOK_EXAM)))
    source = parts(name)[split]
    classes = class_names(source)
    labels = [classes.index(str(source.without_image(row).label)) for row in range(len(source))]
    texts = [_asked(model, [prompt(label, template) for label in classes]) for template in _templates(name)]
    return Exam(_shown(model, source), torch.tensor(labels), tuple(texts))


@lru_cache
def watched(start: str, split: Split) -> Exam:
    """Return the pairs that are watched: half of their source for each split, every image with its first text."""
    model, (validation, test) = _start(start), hold_out(open_source(WATCHED[start]), 0.5, seed=0)
    half = test if split == "test" else validation
    return _pairs(model, Subset(half, range(min(len(half), WATCHED_COUNT)), half.name))


@torch.no_grad()
def accuracy(model: DualEncoder, measured: Exam) -> float:
    """Return zero-shot top-1 with the mean embedding of each class's prompts, in [0, 1]."""
    classes = F.normalize(torch.stack([model.encode_text(tokens) for tokens in measured.texts]).mean(0), dim=-1)
    found = (model.encode_image(measured.images) @ classes.T).argmax(1)
    return float((found == measured.labels).float().mean())


@torch.no_grad()
def recall(model: DualEncoder, pairs: Exam) -> float:
    """Return recall at 1 of pairs, the mean of both directions, in [0, 1]; 1 / pairs at chance."""
    cells = model.encode_image(pairs.images) @ model.encode_text(pairs.texts[0]).T
    return float(((cells.argmax(0) == pairs.labels).float() + (cells.argmax(1) == pairs.labels).float()).mean() / 2)


def run_tasks(
    trial: Trial,
    order: str,
    recipe: Recipe[Any],
    *,
    training: Training = "in turn",
    keep: float = 0.0,
) -> Trace:
    """Return the scores of a stream of tasks: accuracy on image sets or recall at 1 on looks, and recall at 1 on the pairs that are watched.

    Transfer, average, last, forgetting, and what is watched after the last stage are noted in the trial.

    Args:
        trial: Of a claim.
        order: Name of an order.
        recipe: Of every stage; its objective is given the prompts of each task. Its model is one of `STARTS`.
        training: `none` leaves the model as it is; `jointly` trains it once on all tasks, so that every row but the first is the same.
        keep: After each stage this share of the weights is taken back to those before it (WiSE-FT).
    """
    start = recipe.model.start
    names = (ORDERS if start == START else LOOK_ORDERS)[order]
    right, metric = (accuracy, "top-1") if start == START else (recall, "R@1")
    model, pairs = copy.deepcopy(_start(start)), watched(start, trial.split)
    tasks, exams = [task(name) for name in names], [exam(start, name, trial.split) for name in names]

    def measured() -> tuple[float, ...]:
        return (*(right(model, one) for one in exams), recall(model, pairs))

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
    trace = Trace(metric, names, (*names, WATCHED[start]), tuple(rows))
    for name in ("transfer", "average", "last", "forgetting"):
        trial.note(name, trace.summary[name])
    trial.note(f"R@1 {WATCHED[start]}", trace.scores[-1][-1])
    return trace


@lru_cache
def _start(start: str) -> DualEncoder:
    """Return the model that streams start from; not to be changed."""
    model, config = load(start, offline=True), STARTS[start]
    set_mode(model.vision, config.vision_mode)
    set_mode(model.text, config.text_mode)
    return model


def _seen_as(look: str, split: str, rows: Sequence[int]) -> Listed:
    """Return emoji with another look and their English names."""
    source = open_source(f"openmoji:{split}")
    samples = [source[row] for row in np.random.default_rng(0).permutation(len(source))[list(rows)].tolist()]
    changed = [np.ascontiguousarray(LOOKS[look](np.asarray(sample.image))) for sample in samples]
    pairs = zip(samples, changed, strict=True)
    return Listed([replace(sample, image=pixels, texts=sample.texts[:1]) for sample, pixels in pairs], f"{look} emoji")


def _pairs(model: DualEncoder, source: AbstractSource) -> Exam:
    texts = _asked(model, [source.texts(row)[0].text for row in range(len(source))])
    return Exam(_shown(model, source), torch.arange(len(source)), (texts,))


@torch.no_grad()
def _shown(model: DualEncoder, source: AbstractSource) -> Images:
    """Return the images of a source as a model takes them: outputs of its tower if that is frozen."""
    pixels: UInt8[Tensor, "n 3 h w"] = torch.stack([_pixels(sample.image, model) for sample in source])
    return concatenate([model.image_output(part) for part in pixels.split(64)]) if is_frozen(model.vision) else pixels


@torch.no_grad()
def _asked(model: DualEncoder, texts: Sequence[str]) -> Tokens:
    """Return texts as a model takes them, with outputs of its tower if that is frozen."""
    tokens = model.tokenizer(texts)
    return replace(tokens, output=model.text_output(tokens)) if is_frozen(model.text) else tokens


def _pixels(image: Any, model: DualEncoder) -> UInt8[Tensor, "3 h w"]:
    return preprocess(decode(image, background=model.image_policy.background), model.image_policy)


def _templates(name: str) -> tuple[str, ...]:
    return read_prompts(PROMPTS.get(name, "photo")).templates
