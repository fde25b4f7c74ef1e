"""Training inside a trial: without a word, without evaluation, and nothing left on the disk."""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

from diptych.data.sources import AbstractSource
from diptych.models.dual import DualEncoder
from diptych.models.modes import set_mode
from diptych.training.loop import fit
from diptych.training.prepare import choose_device, choose_start, make_loader, make_model
from diptych.training.recipe import Recipe
from diptych.verbs import AbstractObjective


def train_quietly(
    recipe: Recipe[Any], source: AbstractSource, module: ModuleType, *, seed: int, model: DualEncoder | None = None
) -> tuple[DualEncoder, int]:
    """Return the trained model in eval mode, and how many samples it was shown, repeats counted.

    Equal seeds give arms of one architecture equal initial weights and equal batches. The network is never used.

    Args:
        recipe: All settings but the seed.
        source: Training samples.
        module: Of the method that the recipe names.
        seed: Of weights, order, augmentation and dropout.
        model: Trained further, in place; the one that the recipe says when absent.
    """
    start, _ = choose_start(recipe.model.start)
    recipe = replace(
        recipe,
        seed=seed,
        model=replace(recipe.model, start=start),
        evaluate_every=0,
        save_every=sys.maxsize,
        writers=(),
    )
    if model is None:
        model = make_model(recipe.model, source, seed=seed, offline=True).to(choose_device(recipe.device))
    else:
        set_mode(model.vision, recipe.model.vision_mode)
        set_mode(model.text, recipe.model.text_mode)
    objective: AbstractObjective[Any] = module.Objective(model, recipe.objective).to(model.device)
    loader = make_loader(recipe, source, model)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        fit(objective, loader, recipe, Path(folder), console=Console(quiet=True, force_terminal=False))
    return model, recipe.epochs * loader.batches_per_epoch * loader.batch_size
