"""The training loop, on one screen: take a step, log, evaluate when due, save when due. No callbacks."""

import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from diptych.data.loader import Loader
from diptych.errors import TrainingError
from diptych.models.dual import DualEncoder
from diptych.models.modes import train_mode
from diptych.training.log import MetricsLog, display
from diptych.training.optim import WeightAverage, make_optimizer, schedule, set_learning_rate
from diptych.training.precision import autocast, choose_precision
from diptych.training.recipe import Recipe
from diptych.training.state import RunState, restore, save
from diptych.training.step import accumulate_gradients, clip_gradients, to_device
from diptych.types import Encoded
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
        loader: Training batches.
        recipe: Settings.
        folder: Run directory, which exists.
        console: Where progress is shown.
        evaluate: Returns named numbers for the log; called every `recipe.evaluate_every` epochs.
        resume: Go on from the checkpoint in `folder`.

    Raises:
        TrainingError: If a loss or a gradient is not finite; the last checkpoint stays.
    """
    model, device = objective.model, objective.model.device
    total = max(1, recipe.epochs * loader.batches_per_epoch // recipe.accumulate)
    precision, reason = choose_precision(recipe.precision, device)
    optimizer = make_optimizer(objective, (model.vision, model.text), recipe.optimizer)
    decay = recipe.optimizer.ema_decay
    average = None if decay is None else WeightAverage(objective, decay)
    state = RunState(objective, optimizer, average, loader)
    start = restore(state, folder) if resume else 0
    log = MetricsLog(folder, step=start, writers=recipe.writers)
    batches = iter(loader)
    data_seconds = compute_seconds = 0.0
    samples = 0
    train_mode(objective)
    with display(total, console) as screen:
        screen.say(
            f"Training {total} steps of {loader.batch_size * recipe.accumulate} on {device}. Precision: {reason}"
        )
        for step in range(start + 1, total + 1):
            # Take a step.
            began = time.perf_counter()
            taken = [to_device(batch, device) for batch in islice(batches, recipe.accumulate)]
            fetched = time.perf_counter()
            lr = set_learning_rate(optimizer, schedule(step - 1, total, recipe.optimizer.warmup_rate))
            optimizer.zero_grad()
            try:
                losses = accumulate_gradients(objective, taken, autocast(precision, device))
                norm = clip_gradients(objective, recipe.optimizer.clip_norm)
            except TrainingError as error:
                raise TrainingError(f"Stopped at step {step}: {error}") from error
            optimizer.step()
            objective.after_step(step)
            if average is not None:
                average.update(objective, step)
            data_seconds += fetched - began
            compute_seconds += time.perf_counter() - fetched
            samples += sum(map(len, taken))

            epoch, before = (count * recipe.accumulate / loader.batches_per_epoch for count in (step, step - 1))

            # Log.
            if step % recipe.log_every == 0 or step == total:
                row: dict[str, Any] = {
                    "step": step,
                    "epoch": round(epoch, 3),
                    "loss": sum(float(loss.total) for loss in losses) / len(losses),
                    "parts": {
                        name: sum(float(loss.parts[name]) for loss in losses) / len(losses) for name in losses[0].parts
                    },
                    "lr": lr,
                    "scale": model.scale.item(),
                    "grad_norm": norm,
                    "seconds_data": data_seconds,
                    "seconds_compute": compute_seconds,
                    "samples_per_second": samples / (data_seconds + compute_seconds),
                    "skipped": loader.skipped,
                }
                log.write(row)
                screen.show(row)
                data_seconds = compute_seconds = 0.0
                samples = 0

            # Evaluate when due.
            due = recipe.evaluate_every and epoch // recipe.evaluate_every > before // recipe.evaluate_every
            if evaluate is not None and (due or step == total):
                with state.final_weights():
                    numbers = dict(evaluate(model))
                log.write({"step": step, "epoch": round(epoch, 3), "evaluation": numbers})
                screen.say(f"epoch {epoch:g}: " + "  ".join(f"{name} {value:.3f}" for name, value in numbers.items()))

            # Save when due.
            if step % recipe.save_every == 0 or step == total:
                save(state, folder, step)
    log.close()
    state.adopt_final_weights()
    objective.eval()
