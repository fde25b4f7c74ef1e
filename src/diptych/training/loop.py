"""The training loop, on one screen: take a step, log, evaluate when due, save when due. No callbacks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diptych.data.loader import Loader
from diptych.errors import TrainingError
from diptych.models.dual import DualEncoder
from diptych.models.modes import train_mode
from diptych.training import distributed
from diptych.training.features import use_cache
from diptych.training.log import MetricsLog, Stopwatch, display
from diptych.training.optim import WeightAverage, make_optimizer, schedule, set_learning_rate
from diptych.training.precision import autocast, choose_precision
from diptych.training.recipe import Recipe, repeats
from diptych.training.speed import counting, matmul_peak
from diptych.training.state import RunState, restore, save
from diptych.training.step import STEPS, clip_gradients, to_device
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
    optimizer = make_optimizer(objective, (model.vision, model.text), recipe.optimizer)
    decay = recipe.optimizer.ema_decay
    average = None if decay is None else WeightAverage(objective, decay)
    state = RunState(objective, optimizer, average, loader)
    start = restore(state, folder) if resume else 0
    log = MetricsLog(folder, step=start, writers=recipe.writers)
    distributed.same_weights(objective)
    take_step, watch = STEPS[recipe.step], Stopwatch(loader)
    batches = (to_device(batch, device) for batch in watch.batches())
    train_mode(objective)
    with display(total, console) as screen:
        size = loader.batch_size * recipe.accumulate * distributed.part()[1]
        screen.say(f"Training {total} steps of {size} on {device}. Precision: {reason}")
        draws = total * recipe.accumulate * loader.batch_size
        use_cache(objective, loader, precision, draws=draws, say=screen.say)
        peak, flops = matmul_peak(device, precision), 0
        screen.say(f"A large matrix product reaches {peak:,.0f} GFLOP/s here with {torch.get_num_threads()} threads.")
        for step in range(start + 1, total + 1):
            # Take a step.
            watch.start()
            lr = set_learning_rate(optimizer, schedule(step - 1, total, recipe.optimizer.warmup_rate))
            optimizer.zero_grad()
            try:
                with counting(on=step == start + 1) as first:
                    losses = take_step(objective, batches, recipe.accumulate, autocast(precision, device))
                flops = first.count or flops
                distributed.average_gradients(objective)
                norm = clip_gradients(objective, recipe.optimizer.clip_norm)
            except TrainingError as error:
                raise TrainingError(f"Stopped at step {step}: {error}") from error
            optimizer.step()
            objective.after_step(step)
            if average is not None:
                average.update(objective, step)
            watch.stop()
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
                    **watch.lap(flops, peak),
                    "skipped": loader.skipped,
                }
                log.write(row)
                screen.show(row)

            # Evaluate when due.
            due = recipe.evaluate_every and epoch // recipe.evaluate_every > before // recipe.evaluate_every
            if evaluate is not None and (due or step == total) and distributed.is_first():
                with state.final_weights():
                    numbers = dict(evaluate(model))
                log.write({"step": step, "epoch": round(epoch, 3), "evaluation": numbers})
                screen.say(f"epoch {epoch:g}: " + "  ".join(f"{name} {value:.3f}" for name, value in numbers.items()))

            # Save when due.
            if step % recipe.save_every == 0 or step == total:
                save(state, folder, step)
    distributed.wait()
    log.close()
    state.adopt_final_weights()
    objective.eval()
