"""What claims of attacks share: victims that know their data, and what an attack takes from them."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import fmean

import torch

from diptych.claims.claim import Trial
from diptych.claims.domains import frozen_start
from diptych.claims.measures import drawn_scenes
from diptych.claims.task_stream import parts
from diptych.data.sources import AbstractSource
from diptych.evaluation.attack import attack_success, evaluate_changed, hits_of
from diptych.evaluation.run import Evaluation, evaluate_model
from diptych.models.build import build
from diptych.models.dual import DualEncoder
from diptych.models.embedding import Change
from diptych.models.weights import load

SCENES = 600
"""Of the training split, to learn on."""


@lru_cache(maxsize=1)
def drawings_model() -> DualEncoder:
    """Return our small model, which knows drawn scenes: of 200, recall at 1 is 0.65 (image to text, validation). Not to be changed."""
    return load("mini", offline=True).requires_grad_(False).eval()


def random_like(model: DualEncoder, seed: int) -> DualEncoder:
    """Return a model of the same architecture and tokenizer with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(model.config, model.tokenizer).requires_grad_(False).eval()


def lost_recall(trial: Trial, change: Change) -> float:
    """Return what our small model loses on 200 drawn scenes: the success rate at 1, the mean of both directions."""
    source = drawn_scenes(trial.split, 200)
    return _lost(trial, drawings_model, source, ("image_to_text/recall@1", "text_to_image/recall@1"), change)


def lost_accuracy(trial: Trial, change: Change) -> float:
    """Return what the pretrained towers of `lite0-minilm` lose on photos of PACS: the success rate on zero-shot classes, seven of them."""
    return _lost(trial, frozen_start, _photos(trial.split), ("zeroshot/top1",), change)


@lru_cache(maxsize=2)
def _photos(split: str) -> AbstractSource:
    return parts("pacs:photo")[split]


@lru_cache(maxsize=4)
def _clean(model: Callable[[], DualEncoder], source: AbstractSource) -> Evaluation:
    return evaluate_model(model(), source, precision="fp32")


def _lost(
    trial: Trial, model: Callable[[], DualEncoder], source: AbstractSource, names: Sequence[str], change: Change
) -> float:
    clean = _clean(model, source)
    before, after = hits_of(clean), hits_of(evaluate_changed(model(), source, clean, change))
    for name in names:
        trial.note(f"{name}, clean", float(before[name].right.mean()))
        trial.note(f"{name}, attacked", float(after[name].right.mean()))
    return fmean(attack_success(before[name].right, after[name].right).value for name in names)
