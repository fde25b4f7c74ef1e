"""Retrieval from embeddings that are there: our recalls with their intervals, against a full matrix and an argsort per query in numpy."""

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diptych.bench.process import Anchors
from diptych.bench.record import Bar, Column, Finding, Table
from diptych.bench.turns import ratio, take_turns, timed
from diptych.errors import DiptychError
from diptych.evaluation.retrieval import KS, retrieval

CAPTIONS = 5
"""Per image, as in Flickr and COCO."""


@dataclass(frozen=True)
class Setting:
    """Sizes.

    Attributes:
        images: With five captions each; COCO's test split has 5,000.
        d: Numbers per embedding.
        turns: Per contender.
    """

    images: int = 3000
    d: int = 384
    turns: int = 5


QUICK = Setting(images=50, d=16, turns=2)


def measure(setting: Setting, anchors: Anchors) -> Finding:
    """Return the seconds of an evaluation."""
    del anchors
    images, texts, owner = made_embeddings(setting)

    def ours() -> list[float]:
        found = retrieval(images, texts, owner)
        return [side.recall[k].value for side in (found.image_to_text, found.text_to_image) for k in KS]

    def naive() -> list[float]:
        return naive_recalls(images.numpy(), texts.numpy(), owner.numpy())

    largest = max(abs(a - b) for a, b in zip(ours(), naive(), strict=True))
    if largest > 1e-9:
        raise DiptychError(f"Our recalls differ from those of the argsort by up to {largest:.2e}.")
    seconds = take_turns([timed("diptych", ours), timed("numpy", naive)], setting.turns)
    speed = ratio(seconds["numpy"], seconds["diptych"])
    rows: tuple[dict[str, Any], ...] = (
        {"name": "diptych, with bootstrap intervals", "seconds": statistics.median(seconds["diptych"]), "over": None},
        {
            "name": "numpy, full matrix and argsort, no intervals",
            "seconds": statistics.median(seconds["numpy"]),
            "over": speed,
        },
    )
    return Finding(
        f"Recall at 1, 5 and 10, both ways, of {setting.images:,} images with five captions each from embeddings in memory. Recalls are equal; that "
        "is checked first.",
        {**vars(setting), "recalls": ours()},
        (
            Table(
                f"{setting.turns} turns",
                (
                    Column("name", "evaluation"),
                    Column("seconds", "median seconds", ".3f"),
                    Column("over", "ratio to ours"),
                ),
                rows,
            ),
        ),
        (Bar("numpy / ours", 1.0, True, speed.value),),
    )


def made_embeddings(setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """Return embeddings of images and of captions near them, and whose the captions are."""
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(setting.images, setting.d, generator=generator), dim=1)
    owner = torch.arange(setting.images).repeat_interleave(CAPTIONS)
    noise = F.normalize(torch.randn(len(owner), setting.d, generator=generator), dim=1)
    return images, F.normalize(images[owner] + 5 * noise, dim=1), owner


def naive_recalls(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> list[float]:
    """Return recall at 1, 5, 10 from image to text and from text to image, by sorting every row of the whole matrix."""
    scores = images @ texts.T
    forward = [int(np.argmax(owner[np.argsort(-row, kind="stable")] == image)) for image, row in enumerate(scores)]
    backward = [
        int(np.argmax(np.argsort(-column, kind="stable") == image))
        for image, column in zip(owner, scores.T, strict=True)
    ]
    return [float(np.mean(np.array(found) < k)) for found in (forward, backward) for k in KS]
