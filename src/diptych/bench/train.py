"""One training step of the same CLIP, same weights, same batches in memory: ours, open_clip's, transformers', sentence-transformers'."""

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import torch

from diptych.bench.pairs import captions, export, made_batches, made_model, padded
from diptych.bench.process import Anchors
from diptych.bench.record import Bar, Column, Finding, Table
from diptych.bench.turns import Contender, best, median, ratio, take_turns, timed
from diptych.errors import DiptychError
from diptych.methods import clip
from diptych.models.compiling import compiled
from diptych.models.dual import DualEncoder
from diptych.models.precision import autocast, choose_precision
from diptych.training.optim import OptimizerConfig, make_optimizer
from diptych.training.speed import counting, matmul_peak
from diptych.training.step import Autocast, accumulate_gradients, clip_gradients
from diptych.types import Batch
from diptych.verbs import AbstractObjective

CPU = torch.device("cpu")
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""By how much first losses may differ, relative to ours in fp32."""

Tokens = Literal["padded", "trimmed", "by length"]
"""To 77 tokens, to the longest text of the batch, or to the longest of a few texts of similar length."""


@dataclass(frozen=True)
class Setting:
    """Sizes.

    Attributes:
        batch: Pairs per step.
        batches: That all contenders go round.
        image: Pixels of a side.
        width: Of both towers.
        steps: Per contender that count.
        skip: Steps before those.
    """

    batch: int = 32
    batches: int = 8
    image: int = 224
    width: int = 192
    steps: int = 200
    skip: int = 20


QUICK = Setting(batch=4, batches=2, image=64, width=64, steps=2, skip=1)


@dataclass(frozen=True)
class Entry:
    """A contender and how it is to be read.

    Attributes:
        name: In tables.
        family: Whose it is.
        role: `default` as its own trainer does it when nothing is asked for, `best` at another setting it offers; `check` takes one step, to see
            in fp32 that it does the same work, and is not timed.
        precision: Of its matrix products.
        tokens: How its texts come.
        every: It takes part in every so many turns.
    """

    name: str
    family: str
    role: Literal["default", "best", "check"]
    precision: Literal["fp32", "bf16", "fp16"]
    tokens: Tokens = "padded"
    every: int = 1


ANCHORS: tuple[tuple[Entry, str, dict[str, Any]], ...] = (
    (
        Entry("open_clip, amp (its default: fp16)", "open-clip", "default", "fp16", every=10),  # seconds per step
        "open-clip",
        {"precision": "amp"},
    ),
    (Entry("open_clip, fp32", "open-clip", "check", "fp32"), "open-clip", {"precision": "fp32"}),
    (Entry("open_clip, amp_bf16", "open-clip", "best", "bf16"), "open-clip", {"precision": "amp_bf16"}),
    (
        Entry("open_clip, amp_bf16, torchcompile", "open-clip", "best", "bf16"),
        "open-clip",
        {"precision": "amp_bf16", "compiled": True},
    ),
    (Entry("transformers, fp32 (its default)", "transformers", "default", "fp32"), "transformers", {}),
    (Entry("transformers, bf16", "transformers", "best", "bf16"), "transformers", {"bf16": True}),
    (
        Entry("transformers, bf16, torch_compile", "transformers", "best", "bf16"),
        "transformers",
        {"bf16": True, "compiled": True},
    ),
    (
        Entry("sentence-transformers, fp32 (its default)", "sentence-transformers", "default", "fp32", "trimmed"),
        "sentence-transformers",
        {},
    ),
    (
        Entry("sentence-transformers, bf16", "sentence-transformers", "best", "bf16", "trimmed"),
        "sentence-transformers",
        {"bf16": True},
    ),
)
FP32, PLAIN = "diptych, plain, fp32", "diptych, plain"
LEVERS, COMPILED = "diptych, exact levers", "diptych, exact levers, compile"


def measure(setting: Setting, anchors: Anchors) -> Finding:
    """Return the seconds of a step and its ratio to ours."""
    texts, origin = captions(setting.batch * setting.batches)
    model = made_model(setting.image, setting.width, texts)
    batches = made_batches(model, texts, setting.batch)
    full = [padded(batch, model.config.text_policy.pad) for batch in batches]
    precision, _ = choose_precision("auto", CPU)
    own = [
        Entry(FP32, "diptych", "check", "fp32"),
        Entry(PLAIN, "diptych", "default", precision),
        Entry(LEVERS, "diptych", "best", precision, "by length"),
        Entry(COMPILED, "diptych", "best", precision, "by length"),
    ]
    given: dict[Tokens, list[Batch]] = {"padded": full, "trimmed": batches, "by length": batches}
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as opened:
        export(model, batches, Path(temporary))
        contenders = []
        for entry in own:
            copy = made_model(setting.image, setting.width, texts).train()
            copy.texts_by_length = entry.tokens == "by length"
            mine, cast = given[entry.tokens], autocast("bf16" if entry.precision == "bf16" else "fp32", CPU)
            if entry.name == COMPILED:
                opened.enter_context(compiled(copy, mine[0], cast, say=anchors.notes.append))
            contenders.append(own_step(entry.name, copy, mine, cast))
        entries = {entry.name: entry for entry in own}
        for entry, script, job in ANCHORS:
            job = job | {"folder": temporary, "batch": setting.batch, "tokens": entry.tokens}
            if found := anchors.start(entry.family, entry.name, f"train-{script}", **job):
                contenders += found
                entries[entry.name] = entry
        contenders, losses = first_losses(contenders, entries, anchors)
        timed_ones = [
            replace(contender, every=entries[contender.name].every)
            for contender in contenders
            if entries[contender.name].role != "check"
        ]
        seconds = take_turns(timed_ones, setting.steps, skip=setting.skip)
    work = {tokens: operations(model, given[tokens], by_length=tokens == "by length") for tokens in given}
    rows = tuple(row(entries[name], times, seconds, losses[name], work) for name, times in seconds.items())
    return Finding(
        "Seconds of one training step (forward, loss, backward, clipping where it is the default, AdamW) of one CLIP with one set of weights, "
        f"on the same batches of {setting.batch} pairs in memory. `ratio` is a contender's time over ours, the median over turns: above 1, "
        "ours is faster.",
        {**vars(setting), "captions": origin, "parameters": sum(p.numel() for p in model.parameters())},
        (
            Table(
                f"{setting.steps} steps each, taken in turns",
                (
                    Column("name", "step of"),
                    Column("tokens", "texts"),
                    Column("seconds", "median seconds", ".3f"),
                    Column("over_plain", "ratio to plain"),
                    Column("over_levers", "ratio to exact levers"),
                    Column("gflops", "GFLOP/s", ",.0f"),
                    Column("share", "of the peak", ".0%"),
                    Column("loss", "first loss", ".4f"),
                ),
                rows,
            ),
        ),
        bars(entries, seconds),
        (
            "Padded texts have 77 tokens, as open_clip's tokenizer and the CLIP example of transformers make them. The processor that "
            "sentence-transformers uses pads to the longest text of a batch (trimmed), and so does our loader: that is one of the levers.",
            "sentence-transformers' loss has a constant scale; its step is otherwise the same.",
            "The share of the peak compares with a large matrix product in the same precision.",
        ),
    )


def own_step(name: str, model: DualEncoder, batches: list[Batch], cast: Autocast) -> Contender:
    """Return our training step as the loop takes it."""
    objective: AbstractObjective[Any] = clip.Objective(model, clip.Config())
    config = OptimizerConfig(lr=1e-5)
    optimizer = make_optimizer(objective, (model.vision, model.text), config)
    source = cycle(batches)

    def step() -> float:
        optimizer.zero_grad()
        (losses,) = accumulate_gradients(objective, source, 1, cast)
        clip_gradients(objective, config.clip_norm)
        optimizer.step()
        return losses.total.item()

    return timed(name, step)


def first_losses(
    contenders: list[Contender], entries: dict[str, Entry], anchors: Anchors
) -> tuple[list[Contender], dict[str, float]]:
    """Return the contenders that can take a step, with the loss of their first one; what cannot is left out with a note.

    Raises:
        DiptychError: If a loss is not ours.
    """
    losses, able = {}, []
    for contender in contenders:
        try:
            losses[contender.name] = contender.step().value
            able.append(contender)
        except DiptychError as error:
            anchors.notes.append(f"{contender.name} is left out: {error}.")
    ours = losses[FP32]
    for name, loss in losses.items():
        if abs(loss - ours) > TOLERANCE[entries[name].precision] * abs(ours):
            raise DiptychError(
                f"The first loss of {name} is {loss:.6f}, ours {ours:.6f}: they do not do the same work."
            )
    return able, losses


def operations(model: DualEncoder, batches: list[Batch], *, by_length: bool) -> float:
    """Return the floating-point operations of a step, the mean over batches."""
    model.texts_by_length = by_length
    objective, total = clip.Objective(model.train(), clip.Config()), 0
    for batch in batches:
        with counting() as found:
            objective(batch).total.backward()
        objective.zero_grad()
        total += found.count
    return total / len(batches)


def row(
    entry: Entry, times: list[float], seconds: dict[str, list[float]], loss: float, work: dict[Tokens, float]
) -> dict[str, Any]:
    """Return one row of the table."""
    middle = median(times).value
    gflops = work[entry.tokens] / middle / 1e9
    return {
        **vars(entry),
        "seconds": middle,
        "over_plain": ratio(times, seconds[PLAIN]),
        "over_levers": ratio(times, seconds[LEVERS]),
        "gflops": gflops,
        "share": None if entry.precision == "fp16" else gflops / matmul_peak(CPU, entry.precision),
        "loss": loss,
    }


def bars(entries: dict[str, Entry], seconds: dict[str, list[float]]) -> tuple[Bar, ...]:
    """Return what was to be shown: plain against the best on the same tokens, levers against the best of all, levers against defaults."""
    theirs = [name for name in seconds if entries[name].family != "diptych"]
    same = best(seconds, [name for name in theirs if entries[name].tokens == "padded"])
    fastest, ours = best(seconds, theirs), best(seconds, [LEVERS, COMPILED]) or LEVERS
    defaults = [name for name in theirs if entries[name].role == "default"]

    def over(name: str | None, own: str) -> float | None:
        return None if name is None else ratio(seconds[name], seconds[own]).value

    return (
        Bar(f"best anchor on padded texts ({same}) / plain", 1.0, True, over(same, PLAIN)),
        Bar(f"best anchor of all ({fastest}) / {ours}", 1.5, True, over(fastest, ours)),
        *(Bar(f"{name} / {ours}", 3.0, True, over(name, ours)) for name in defaults),
    )
