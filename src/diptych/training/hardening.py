"""Adversarial training: each step is taken on the images that, within eps of the real ones, the model is worst at.

min over weights of the mean of max over |d| <= eps of L(weights, images + d, texts), with the objective's own loss L: Madry et al. 2018, "Towards
Deep Learning Models Resistant to Adversarial Attacks", equation 2.1, there for classifiers; Mao et al. 2023, "Understanding Zero-Shot Adversarial
Robustness for Large-Scale Models", section 3, for pairs of images and texts.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from diptych.errors import ConfigError
from diptych.models.embedding import eval_mode
from diptych.models.modes import is_frozen
from diptych.models.perturbation import LEVELS, as_floats
from diptych.models.pgd import PGDConfig, Views, ascend, random_start
from diptych.types import Batch, Encoded
from diptych.verbs import AbstractObjective


def hardened(
    objective: AbstractObjective[Encoded],
    batches: Iterable[Batch],
    config: PGDConfig,
    autocast: AbstractContextManager[Any],
    *,
    seed: str,
    repeat: int | None = None,
) -> Iterator[Batch]:
    """Yield the batches of one step, hardened; with eps 0 as they are.

    Args:
        objective: In the modes of its training.
        batches: As they come.
        config: Of the ascent.
        autocast: Precision of the towers.
        seed: Of the random starts, together with the keys of the samples.
        repeat: How many batches come a second time, in a cached step. What was made of them is kept until then: pixels as floats.
    """
    source = iter(batches)
    if config.eps == 0:
        yield from source
        return
    kept: list[Batch] = []
    for batch in islice(source, repeat):
        made = harden(objective, batch, config, autocast, seed=seed)
        if repeat is not None:
            kept.append(made)
        yield made
    for made, batch in zip(kept, source, strict=False):
        yield replace(batch, images=made.images)


def harden(
    objective: AbstractObjective[Encoded],
    batch: Batch,
    config: PGDConfig,
    autocast: AbstractContextManager[Any],
    *,
    seed: str,
) -> Batch:
    """Return a batch with all views moved by at most eps so that its own loss is larger: PGD from a random start.

    Meanwhile the objective is in eval mode, so no dropout is drawn and no running statistics move. Parameters, their gradients, buffers and
    the random generators are as before. The batch contrasts its own samples, whatever the kind of step.

    Args:
        objective: In the modes of its training, which it gets back.
        batch: uint8 images, or floats in [0, 1].
        config: With eps 0 the batch comes back as it is.
        autocast: Precision of the towers.
        seed: Of the random start, together with the keys of the samples.

    Raises:
        ConfigError: If all that is left of a view is what a frozen tower made of it.
    """
    if config.eps == 0:
        return batch
    views = tuple(map(as_floats, batch.images))

    def loss(moved: Views) -> torch.Tensor:
        shown = replace(batch, images=moved)
        with autocast:
            encoded = objective.encode(shown)
        return objective.loss(encoded, shown).total

    buffers = [buffer.clone() for buffer in objective.buffers()]
    with eval_mode(objective), torch.random.fork_rng(_cuda(objective)):
        moved = ascend(loss, views, config, start=random_start(views, batch.keys, seed))
    with torch.no_grad():
        for buffer, before in zip(objective.buffers(), buffers, strict=True):
            buffer.copy_(before)
    return replace(batch, images=moved)


def check_hardening(
    objective: AbstractObjective[Encoded], config: PGDConfig, *, sharded: bool, say: Callable[[str], None]
) -> None:
    """Say what hardening does to a run, or raise if it cannot be done; with eps 0 do nothing.

    Raises:
        ConfigError: If the image tower is frozen, or sharded.
    """
    if config.eps == 0:
        return
    if is_frozen(objective.model.vision):
        raise ConfigError(
            "harden.eps makes the image tower withstand changed images, and here that tower is frozen. Set model.vision_mode to full or lora, "
            "or harden.eps to 0."
        )
    if sharded:
        raise ConfigError("Sharded towers cannot be hardened. Set harden.eps to 0, or sharding to none.")
    say(f"Hardening: images are moved by at most {config.eps:g} levels of {LEVELS}, {config.steps} gradients each.")


def _cuda(objective: AbstractObjective[Encoded]) -> list[torch.device]:
    device = objective.model.device
    return [device] if device.type == "cuda" else []
