"""The four domains of PACS as the frozen towers of `lite0-minilm` see them: photos, paintings, cartoons and sketches of seven things.

And how well a model is fenced in that learns to work in one of them only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from statistics import fmean
from typing import Any

import torch

from diptych.claims.claim import Trial
from diptych.claims.task_stream import START, Split, parts
from diptych.data.bundles import class_names
from diptych.data.image_changes import ImageChange, all_marked
from diptych.evaluation.protection import Judge, ownership, protection
from diptych.models.dual import DualEncoder
from diptych.models.seen import Labelled, see
from diptych.models.weights import load
from diptych.types import concatenate, map_tensors

DOMAINS = ("photo", "art_painting", "cartoon", "sketch")
"""20, 8 and 12 images a class in the parts for training, validation and test."""


@lru_cache(maxsize=1)
def frozen_start() -> DualEncoder:
    """Return the model; not to be changed."""
    return load(START, offline=True).requires_grad_(False).eval()


@lru_cache(maxsize=1)
def domain_classes() -> tuple[str, ...]:
    """Return the names of the classes."""
    return class_names(parts(f"pacs:{DOMAINS[0]}")["train"])


@lru_cache
def domain(name: str, split: str, change: ImageChange = iter) -> Labelled:
    """Return a part of a domain, its images changed; the tower is asked once per process.

    Args:
        name: One of `DOMAINS`.
        split: `train`, `validation` or `test`.
        change: Of the images as evaluation shows them; a function of a module, as what was seen is remembered by it.
    """
    return see(frozen_start(), parts(f"pacs:{name}")[split], domain_classes(), change=change)


@dataclass(frozen=True)
class Fence:
    """How a model is fenced in for a claim.

    Attributes:
        learn: Returns it, and how many images learning showed, given authorised images, others, and a seed. One object for all trials, as what
            was learnt is remembered by it.
        change: Of authorised images, which then stand for others; None where other domains do.
        shuffled: Whether the images of all domains are mixed first.
        spoil: What is done to it before it is measured.
    """

    learn: Callable[[Labelled, Labelled, int], tuple[Judge, int]]
    change: ImageChange | None = None
    shuffled: bool = False
    spoil: Callable[[Any], Judge] | None = None


def weighted(trial: Trial, *, authorised: Sequence[str], plain: Fence, fence: Fence) -> float:
    """Return the mean W_ua of some domains, each against all others, and note what it is made of."""
    return fmean(_weighted(trial, name, plain, fence) for name in authorised)


def _weighted(trial: Trial, authorised: str, plain: Fence, fence: Fence) -> float:
    before, after = _both(trial, authorised, plain, fence)
    own = before[authorised], after[authorised]
    pairs = {name: protection(own[0], before[name], own[1], after[name]) for name in DOMAINS if name != authorised}
    trial.note(f"{authorised}: A_a", after[authorised])
    trial.note(f"{authorised}: D_a", fmean(pair.authorised_drop for pair in pairs.values()))
    for name, pair in pairs.items():
        trial.note(f"{authorised}: D_u {name}", pair.unauthorised_drop)
        trial.note(f"{authorised}: W_ua {name}", pair.weighted)
    return fmean(pair.weighted for pair in pairs.values())


def owned(trial: Trial, *, plain: Fence, fence: Fence) -> float:
    """Return O_ua of photos, and note what it is made of."""
    before, after = _both(trial, "photo", plain, fence)
    trial.note("A_u, unprotected", before["marked"])
    trial.note("A_a", after["photo"])
    trial.note("A_u", after["marked"])
    return ownership(before["marked"], after["photo"], after["marked"])


def _both(trial: Trial, authorised: str, plain: Fence, fence: Fence) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Return the accuracies without and with a fence; only what the latter showed counts as shown."""
    before, _ = accuracies(authorised, plain, trial.seed, trial.split)
    after, count = accuracies(authorised, fence, trial.seed, trial.split)
    trial.shown(count)
    return before, after


@cache
def accuracies(authorised: str, fence: Fence, seed: int, split: Split) -> tuple[dict[str, float], int]:
    """Return the accuracy in every domain, and on marked photos if those are authorised; and how many images learning showed."""
    judge, count = learnt(authorised, replace(fence, spoil=None), seed)
    judge = judge if fence.spoil is None else fence.spoil(judge)
    exams = {name: domain(name, split) for name in DOMAINS}
    if authorised == "photo":
        exams["marked"] = domain(authorised, split, all_marked)
    return {name: float(judge.correct(exam).mean()) for name, exam in exams.items()}, count


@lru_cache(maxsize=2)
def learnt(authorised: str, fence: Fence, seed: int) -> tuple[Judge, int]:
    """Return what was learnt in a domain, and how many images that showed."""
    own = domain(authorised, "train")
    others = concatenate([domain(name, "train") for name in DOMAINS if name != authorised])
    if fence.shuffled:
        mixed = concatenate([own, others])
        order = torch.randperm(len(mixed), generator=torch.Generator().manual_seed(seed)).split(len(own))
        own, *rest = (map_tensors(partial(torch.index_select, dim=0, index=rows), mixed) for rows in order)
        others = concatenate(rest)
    if fence.change is not None:
        others = domain(authorised, "train", fence.change)
    return fence.learn(own, others, seed)
