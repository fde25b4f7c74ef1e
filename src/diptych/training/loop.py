"""The training loop, on one screen: take a step, log, evaluate when due, save when due. No callbacks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from diptych.data.loader import Loader
from diptych.errors import TrainingError
from diptych.models.compiling import uncompiled
from diptych.models.dual import DualEncoder
from diptych.models.modes import train_mode
from diptych.models.precision import autocast, choose_precision
from diptych.training import distributed
from diptych.training.features import use_cache
from diptych.training.hardening import check_hardening, hardened
from diptych.training.levers import levers, shrink, side_at
from diptych.training.log import MetricsLog, Stopwatch, display
from diptych.training.optim import make_average, make_optimizer, schedule, set_learning_rate
from diptych.training.recipe import Recipe, repeats
from diptych.training.speed import choices, counting, matmul_peak
from diptych.training.state import RunState, join_shards, restore, save
from diptych.training.step import STEPS, clip_gradients, to_device
from diptych.types import Batch, Encoded, Losses
from diptych.verbs import AbstractObjective

Evaluate = Callable[[DualEncoder], Mapping[str, float]]


def fit(
    objective: AbstractObjective[Encoded],
    loader: Loader,
    recipe: Recipe[Any],
    folder: Path,
    *,
    console: Console,
    evaluate: Evaluate | None = None,
    resume: bool = False,
) -> None:
    """Train `objective.model`, leaving checkpoints and metrics.jsonl in `folder`; the model ends up with its final weights.

    Args:
        objective: What to train for, already on its device.
        loader: Training batches, from `make_loader`.
        recipe: Settings.
        folder: Run directory, which exists.
        console: Where progress is shown.
        evaluate: Returns named numbers for the log; called every `recipe.evaluate_every` epochs.
        resume: Go on from the checkpoint in `folder`.

    Raises:
        TrainingError: If a loss or a gradient is not finite; the last checkpoint stays.
    """
    assert loader.repeat == repeats(recipe)
    model, device = objective.model, objective.model.device
    total = max(1, recipe.epochs * loader.batches_per_epoch // recipe.accumulate)
    precision, reason = choose_precision(recipe.precision, device)
    distributed.same_weights(objective)
    train_mode(objective)
    with display(total, console) as screen, ExitStack() as opened:
        size = loader.batch_size * recipe.accumulate * distributed.part()[1]
        screen.say(f"Training {total} steps of {size} on {device}. Precision: {reason}")
        state = _make_state(objective, loader, recipe, precision, total=total, say=screen.say)
        start = restore(state, folder) if resume else 0
        log = MetricsLog(folder, step=start, writers=recipe.writers)
        opened.enter_context(levers(model, recipe.speed, loader, autocast(precision, device), say=screen.say))
        watch, peak = Stopwatch(loader), matmul_peak(device, precision)
        batches = (to_device(batch, device) for batch in watch.batches())
        sharded, side, flops = distributed.is_sharded(objective), None, 0
        asks = sharded or distributed.is_first()  # sharded towers answer where all processes ask
        for step in range(start + 1, total + 1):
            # Take a step.
            watch.start()
            lr = set_learning_rate(state.optimizer, schedule(step - 1, total, recipe.optimizer.warmup_rate))
            last, side = side, side_at(step, total, recipe.speed.resolutions)
            sized, casting = map(partial(shrink, side=side), batches), autocast(precision, device)
            seed, count = f"{recipe.seed} {step}", step == start + 1 or side != last
            shown = hardened(objective, sized, recipe.harden, casting, seed=seed, repeat=loader.repeat)
            losses, norm, counted = _take_step(state, shown, recipe, casting, step, count=count)
            flops = counted or flops
            watch.stop(flops)
            at = {"step": step, "epoch": round(_epochs(step, loader, recipe), 3)}

            # Log.
            if step % recipe.log_every == 0 or step == total:
                moved = {"lr": lr, "scale": model.scale.item(), "grad_norm": norm}
                row = {**at, **_means(losses), **moved, **watch.lap(peak), "skipped": loader.skipped}
                log.write(row)
                screen.show(row)

            # Evaluate when due.
            if evaluate is not None and asks and (step == total or _ends_an_epoch(step, loader, recipe)):
                with state.final_weights(), uncompiled(model):
                    numbers = dict(evaluate(model))
                log.write({**at, "evaluation": numbers})
                said = "  ".join(f"{name} {value:.3f}" for name, value in numbers.items())
                screen.say(f"epoch {_epochs(step, loader, recipe):g}: {said}")

            # Save when due.
            if step % recipe.save_every == 0 or step == total:
                save(state, folder, step)
    distributed.wait()
    log.close()
    if sharded:
        join_shards(model, folder)
    else:
        state.adopt_final_weights()
    objective.eval()


def _make_state(
    objective: AbstractObjective[Encoded],
    loader: Loader,
    recipe: Recipe[Any],
    precision: Literal["fp32", "bf16"],
    *,
    total: int,
    say: Callable[[str], None],
) -> RunState:
    """Return what changes while a run of `total` steps is on, and say how it will compute.

    First what frozen towers make of the samples is looked up, and towers are cut between the processes, as the recipe says.
    """
    model = objective.model
    use_cache(objective, loader, precision, draws=total * recipe.accumulate * loader.batch_size, say=say)
    for choice in choices(model, precision, recipe.speed, matmul_peak(model.device, precision)):
        say(choice)
    if recipe.sharding == "full":
        distributed.shard(objective)
    check_hardening(objective, recipe.harden, sharded=distributed.is_sharded(objective), say=say)
    optimizer = make_optimizer(objective, (model.vision, model.text), recipe.optimizer)
    return RunState(objective, optimizer, make_average(objective, recipe.optimizer), loader)


def _take_step(
    state: RunState,
    batches: Iterable[Batch],
    recipe: Recipe[Any],
    casting: AbstractContextManager[None],
    step: int,
    *,
    count: bool,
) -> tuple[list[Losses], float, int]:
    """Move the weights by the gradient of the next batches; return their losses, its norm, and the operations if they are to be counted.

    Raises:
        TrainingError: If a loss or the gradient is not finite; names the step. Nothing has moved then.
    """
    state.optimizer.zero_grad()
    try:
        with counting(on=count) as counted:
            losses = STEPS[recipe.step](state.objective, batches, recipe.accumulate, casting)
        norm = _update(state, recipe.optimizer.clip_norm, step)
    except TrainingError as error:
        raise TrainingError(f"Stopped at step {step}: {error}") from error
    return losses, norm, counted.count


def _update(state: RunState, clip_norm: float | None, step: int) -> float:
    """Move the weights, and whatever follows them, by the gradient; return its norm.

    Raises:
        TrainingError: If it is not finite; nothing has moved then.
    """
    distributed.average_gradients(state.objective)
    norm = clip_gradients(state.objective, clip_norm)
    state.optimizer.step()
    state.objective.after_step(step)
    if state.average is not None:
        state.average.update(state.objective, step)
    return norm


def _epochs(step: int, loader: Loader, recipe: Recipe[Any]) -> float:
    """Return how many passes over the data were made by the end of a step."""
    return step * recipe.accumulate / loader.batches_per_epoch


def _ends_an_epoch(step: int, loader: Loader, recipe: Recipe[Any]) -> bool:
    """Return whether an epoch after which the recipe evaluates ends in this step."""
    before, after = (_epochs(count, loader, recipe) for count in (step - 1, step))
    return recipe.evaluate_every > 0 and after // recipe.evaluate_every > before // recipe.evaluate_every


def _means(losses: Sequence[Losses]) -> dict[str, Any]:
    """Return the mean loss and the means of its parts, for a log row."""
    parts = {name: sum(float(loss.parts[name]) for loss in losses) / len(losses) for name in losses[0].parts}
    return {"loss": sum(float(loss.total) for loss in losses) / len(losses), "parts": parts}
