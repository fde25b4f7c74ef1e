"""The training loop, on one screen: take a step, log, evaluate when due, save when due. No callbacks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

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
from diptych.types import Encoded, Losses
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
        draws = total * recipe.accumulate * loader.batch_size
        use_cache(objective, loader, precision, draws=draws, say=screen.say)
        peak, flops = matmul_peak(device, precision), 0
        for choice in choices(model, precision, recipe.speed, peak):
            screen.say(choice)
        state, sharded = _make_state(objective, loader, recipe), distributed.is_sharded(objective)
        check_hardening(objective, recipe.harden, sharded=sharded, say=screen.say)
        start = restore(state, folder) if resume else 0
        log = MetricsLog(folder, step=start, writers=recipe.writers)
        opened.enter_context(levers(model, recipe.speed, loader, autocast(precision, device), say=screen.say))
        watch = Stopwatch(loader)
        batches = (to_device(batch, device) for batch in watch.batches())
        for step in range(start + 1, total + 1):
            # Take a step.
            watch.start()
            lr = set_learning_rate(state.optimizer, schedule(step - 1, total, recipe.optimizer.warmup_rate))
            state.optimizer.zero_grad()
            side, last = (side_at(number, total, recipe.speed.resolutions) for number in (step, max(1, step - 1)))
            casting, seed = autocast(precision, device), f"{recipe.seed} {step}"
            sized = map(partial(shrink, side=side), batches)
            shown = hardened(objective, sized, recipe.harden, casting, seed=seed, repeat=loader.repeat)
            with _naming(step):
                with counting(on=step == start + 1 or side != last) as counted:
                    losses = STEPS[recipe.step](objective, shown, recipe.accumulate, casting)
                norm = _update(state, recipe.optimizer.clip_norm, step)
            flops = counted.count or flops
            watch.stop(flops)
            epoch, before = (count * recipe.accumulate / loader.batches_per_epoch for count in (step, step - 1))

            # Log.
            if step % recipe.log_every == 0 or step == total:
                row: dict[str, Any] = {
                    "step": step,
                    "epoch": round(epoch, 3),
                    **_means(losses),
                    "lr": lr,
                    "scale": model.scale.item(),
                    "grad_norm": norm,
                    **watch.lap(peak),
                    "skipped": loader.skipped,
                }
                log.write(row)
                screen.show(row)

            # Evaluate when due.
            due = recipe.evaluate_every and epoch // recipe.evaluate_every > before // recipe.evaluate_every
            asked = sharded or distributed.is_first()  # sharded towers answer where all processes ask
            if evaluate is not None and (due or step == total) and asked:
                with state.final_weights(), uncompiled(model):
                    numbers = dict(evaluate(model))
                log.write({"step": step, "epoch": round(epoch, 3), "evaluation": numbers})
                screen.say(f"epoch {epoch:g}: " + "  ".join(f"{name} {value:.3f}" for name, value in numbers.items()))

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


def _make_state(objective: AbstractObjective[Encoded], loader: Loader, recipe: Recipe[Any]) -> RunState:
    """Return what changes while a run is on; first the towers are cut between the processes, if the recipe says so."""
    if recipe.sharding == "full":
        distributed.shard(objective)
    towers = (objective.model.vision, objective.model.text)
    optimizer = make_optimizer(objective, towers, recipe.optimizer)
    return RunState(objective, optimizer, make_average(objective, recipe.optimizer), loader)


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


@contextmanager
def _naming(step: int) -> Iterator[None]:
    """Name the step in what stops a run."""
    try:
        yield
    except TrainingError as error:
        raise TrainingError(f"Stopped at step {step}: {error}") from error


def _means(losses: Sequence[Losses]) -> dict[str, Any]:
    """Return the mean loss and the means of its parts, for a log row."""
    parts = {name: sum(float(loss.parts[name]) for loss in losses) / len(losses) for name in losses[0].parts}
    return {"loss": sum(float(loss.total) for loss in losses) / len(losses), "parts": parts}
