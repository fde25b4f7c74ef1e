"""The guard of a fine-tuning run: it warns while the run forgets, and says in the end which mix with the start is worth taking."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from diptych.commands.records import write_json
from diptych.commands.terminal import say
from diptych.data.sources import AbstractSource
from diptych.errors import MissingExtraError
from diptych.evaluation.guard import SHARES, Curve, Guard, choose_probe, draw_curve, mixed, stand_guard, task_part
from diptych.models.checkpoint import save_model
from diptych.models.dual import DualEncoder
from diptych.models.memory import remembered
from diptych.training import distributed

MIX = "mix"
"""The folder inside a run directory that holds the mix of start and tuned weights."""


@contextmanager
def guarding(
    model: DualEncoder, spec: str, start: str, avoid: Sequence[AbstractSource], *, gigabytes: float
) -> Iterator[Guard | None]:
    """Measure a model on a probe before it is tuned, and say so; None where nothing is guarded.

    Args:
        model: As it starts.
        spec: See `choose_probe`; `none` for no guard.
        start: What it starts from; random weights know nothing.
        avoid: What it is trained and evaluated on.
        gigabytes: Most that is kept of what frozen towers make of the probe.
    """
    if spec == "none" or start == "new":
        if spec not in ("none", "auto"):
            say(f"--guard {spec} does nothing: the model starts from random weights, which know nothing yet.")
        yield None
        return
    probe = choose_probe(spec, [source.name for source in avoid])
    with remembered(model, probe, gigabytes=gigabytes) as memory:
        began = time.perf_counter()
        training = model.training
        guard = stand_guard(model.eval(), probe, memory)
        model.train(training)
        seconds, before = time.perf_counter() - began, guard.before
        say(
            f"Guard: {before.metric} {before.items.mean():.3f} on {len(probe)} samples of {probe.name} before training (chance {before.chance:.3f}). "
            f"It is measured at every evaluation and {len(SHARES)} times at the end, {seconds:.1f} s the first time, less where towers are frozen. "
            "--guard SOURCE names other samples, --guard none switches it off."
        )
        yield guard


def look(guard: Guard, model: DualEncoder) -> dict[str, float]:
    """Return the score on the probe for the log; say so when it fell by more than its interval."""
    now, change = guard.change(model)
    if change.high < 0:
        say(
            f"WARNING: the model is losing what it knew: {guard.before.metric} on {guard.probe.name} is {now:.3f}, and was "
            f"{guard.before.items.mean():.3f} before training ({change.signed()})."
        )
    return {f"guard/{guard.probe.name}": now}


def conclude(guard: Guard, model: DualEncoder, held: AbstractSource, folder: Path, *, choose: bool) -> Curve:
    """Draw the curve from start to tuned weights into a run directory, save its best mix, and say what to do.

    Args:
        guard: From `guarding`.
        model: With its final weights; it ends as it was.
        held: Samples that were not trained on.
        folder: Run directory; guard.json, guard.png where matplotlib is installed, and the model `mix` where a mix is better.
        choose: Whether `held` may choose the mix, which a test split may not.
    """
    task = task_part(held)
    with remembered(model, task) as memory:
        curve = draw_curve(guard, model, task, choose=choose, memory=memory)
    write_json(folder / "guard.json", curve.to_json())
    if distributed.is_first():
        try:
            curve.save(folder / "guard.png")
        except MissingExtraError:
            pass  # the numbers are in guard.json and the report
        if curve.fallen and 0 < curve.best < 1:
            with mixed(model, guard.start, curve.best), torch.no_grad():
                save_model(model, folder / MIX)
            say(f"The mix with {curve.best:.0%} of the tuned weights is in {folder / MIX}.")
    say(f"Guard: {curve.advice}")
    return curve
