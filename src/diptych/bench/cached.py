"""Cached steps, where several batches are one for the loss, against the plain step on all of them at once, and against sentence-transformers'."""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diptych.bench.pairs import captions, export, made_batches, made_model, padded
from diptych.bench.process import Anchors, fresh
from diptych.bench.record import Bar, Column, Finding, Table
from diptych.bench.resident import resident
from diptych.bench.turns import ratio, take_turns, timed
from diptych.errors import DiptychError
from diptych.methods import clip
from diptych.models.precision import autocast, choose_precision
from diptych.training.optim import OptimizerConfig, make_optimizer
from diptych.training.step import accumulate_gradients, cached_gradients, clip_gradients
from diptych.types import concatenate, rows
from diptych.verbs import AbstractObjective

CPU = torch.device("cpu")
TOLERANCE = 1e-5
"""By how much gradients may differ in fp32, relative to the plain step's."""

Kind = Literal["plain", "cached"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Setting:
    """Sizes.

    Attributes:
        batch: Pairs that the loss sees.
        chunk: Pairs whose activations are held.
        image: Pixels of a side.
        width: Of both towers.
        turns: Steps per contender that count.
        skip: Steps before those.
    """

    batch: int = 256
    chunk: int = 32
    image: int = 224
    width: int = 192
    turns: int = 15
    skip: int = 2


QUICK = Setting(batch=12, chunk=4, image=64, width=64, turns=2, skip=1)
THEIRS = "sentence-transformers"


def measure(setting: Setting, anchors: Anchors) -> Finding:
    """Return times and memory of the two kinds of step."""
    precision, _ = choose_precision("auto", CPU)
    exact = {kind: make_step(kind, setting, "fp32") for kind in ("plain", "cached")}
    difference = largest_difference(exact["plain"](), exact["cached"]())
    own = {kind: make_step(kind, setting, precision) for kind in ("plain", "cached")}
    texts, _ = captions(setting.batch)
    with tempfile.TemporaryDirectory() as temporary:
        model = made_model(setting.image, setting.width, texts)
        export(model, made_batches(model, texts, setting.batch), Path(temporary))
        job = {"folder": temporary, "batch": setting.batch, "tokens": "padded", "bf16": precision == "bf16"}
        contenders = [timed(kind, step) for kind, step in own.items()]
        contenders += anchors.start(THEIRS, f"{THEIRS}, plain", "train-sentence-transformers", **job)
        contenders += anchors.start(
            THEIRS, f"{THEIRS}, cached", "train-sentence-transformers", **job, chunk=setting.chunk
        )
        seconds = take_turns(contenders, setting.turns, skip=setting.skip)
    theirs = seconds.get(f"{THEIRS}, cached")
    cost = ratio(seconds["cached"], seconds["plain"])
    memory: dict[str, float] = {kind: fresh(memory_of, kind, *vars(setting).values()) for kind in ("plain", "cached")}
    return Finding(
        f"One step on {setting.batch} pairs: all at once, or cached in chunks of {setting.chunk} (Gao et al. 2021), which needs one more forward "
        "pass and the memory of a chunk. Same model as in `train`, padded texts.",
        {**vars(setting), "precision": precision},
        (
            Table(
                f"{setting.turns} steps each, taken in turns",
                (
                    Column("name", "step"),
                    Column("seconds", "median seconds", ".3f"),
                    Column("over_plain", "ratio to our plain"),
                    Column("over_own_plain", "ratio to its own plain"),
                    Column("mb", "MB beyond the model", ",.0f"),
                ),
                tuple(
                    {
                        "name": name if name.startswith(THEIRS) else f"diptych, {name}",
                        "seconds": statistics.median(times),
                        "over_plain": ratio(times, seconds["plain"]),
                        "over_own_plain": ratio(times, seconds[name.replace("cached", "plain")])
                        if name.replace("cached", "plain") in seconds
                        else None,
                        "mb": memory.get(name),
                    }
                    for name, times in seconds.items()
                ),
            ),
        ),
        (
            Bar("cached / plain, time", 1.45, False, cost.value),
            Bar("largest difference of a gradient, fp32, relative", TOLERANCE, False, difference),
            Bar(
                "sentence-transformers' cached / ours",
                1.0,
                True,
                ratio(theirs, seconds["cached"]).value if theirs else None,
            ),
        ),
        (
            "Memory is the peak of a process of its own during one step beyond its size with model, optimiser and pairs in memory.",
        ),
    )


def make_step(kind: Kind, setting: Setting, precision: Precision) -> Callable[[], list[Tensor]]:
    """Return a step that gives the gradients it was taken with."""
    texts, _ = captions(setting.batch)
    model = made_model(setting.image, setting.width, texts).train()
    model.texts_by_length = False  # as with the anchors, padding is computed
    pad = model.config.text_policy.pad
    whole = concatenate([padded(batch, pad) for batch in made_batches(model, texts, setting.chunk)])
    starts = range(0, len(whole), setting.chunk)
    chunks = [rows(whole, start, min(start + setting.chunk, len(whole))) for start in starts]
    objective: AbstractObjective[Any] = clip.Objective(model, clip.Config())
    config = OptimizerConfig(lr=1e-5)
    optimizer = make_optimizer(objective, (model.vision, model.text), config)
    source = cycle([whole] if kind == "plain" else chunks)

    def step() -> list[Tensor]:
        optimizer.zero_grad()
        if kind == "plain":
            accumulate_gradients(objective, source, 1, autocast(precision, CPU))
        else:
            cached_gradients(objective, source, len(chunks), autocast(precision, CPU))
        clip_gradients(objective, config.clip_norm)
        optimizer.step()
        return [parameter.grad for parameter in objective.parameters() if parameter.grad is not None]

    return step


def largest_difference(plain: list[Tensor], cached: list[Tensor]) -> float:
    """Return the largest difference between two lists of gradients, relative to the norm of all.

    Raises:
        DiptychError: If it is more than rounding.
    """
    norm = torch.stack([gradient.norm() for gradient in plain]).norm()
    difference = max(float((a - b).norm() / norm) for a, b in zip(plain, cached, strict=True))
    if difference > TOLERANCE:
        raise DiptychError(
            f"The cached gradient differs from the plain one by {difference:.1e}, more than {TOLERANCE:.0e}."
        )
    return difference


def memory_of(kind: Kind, *setting: Any) -> float:
    """Return the megabytes that a step takes beyond what is there before it; only right in a fresh process."""
    found = Setting(*setting)
    warm = Setting(**(vars(found) | {"batch": found.chunk}))
    make_step(kind, warm, "fp32")()
    step = make_step(kind, found, "fp32")
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before
