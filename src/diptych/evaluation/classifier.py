"""What a classifier gains that was learnt beside a model: its accuracy, and the model's own zero-shot accuracy on the same images."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diptych.data.sources import AbstractSource
from diptych.evaluation.stats import bootstrap, paired_difference
from diptych.evaluation.zeroshot import class_embeddings, read_prompts
from diptych.models.dual import DualEncoder
from diptych.models.embedding import embed_texts, evaluation_view, inference
from diptych.models.seen import labels_of
from diptych.types import Batch, Interval, Report

AT_ONCE = 64
"""Images per forward pass."""


@runtime_checkable
class Classifier(Protocol):
    """Says of images what they are, and can be kept.

    Attributes:
        classes: Names, in the order of the logits.
    """

    classes: tuple[str, ...]

    def __call__(self, batch: Batch) -> Float[Tensor, "b k"]:
        """Return logits for the main view of a batch."""
        ...

    def save(self, folder: Path) -> None:
        """Write what was learnt."""
        ...


def measure_classifier(
    classifier: Classifier,
    model: DualEncoder,
    source: AbstractSource,
    *,
    prompts: str = "photo",
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> Report:
    """Return top-1 of the classifier and of the model's zero-shot prompts, and their difference over the same images.

    All of it over all images and, where samples have domains, in each of them. 1 / k at chance for k equally frequent classes.

    Args:
        classifier: Learnt beside the model.
        model: In eval mode.
        source: Labelled samples that were not learnt on.
        prompts: Name of the prompt file for zero-shot.
        seed: Of the bootstrap.
        advance: Progress.

    Raises:
        DataError: If a sample has none of the classes.
        ImageError: If an image cannot be read.
    """
    labels = labels_of(source, classifier.classes)
    vectors = class_embeddings(lambda texts: embed_texts(model, texts), classifier.classes, read_prompts(prompts))
    plain, learnt = list[Bool[Tensor, " b"]](), list[Bool[Tensor, " b"]]()
    for rows in torch.arange(len(source)).split(AT_ONCE):
        samples = [source[row] for row in rows.tolist()]
        images = torch.stack([evaluation_view(model, sample) for sample in samples]).to(model.device)
        batch = Batch(tuple(sample.key for sample in samples), (images,), (), torch.zeros_like(rows))
        with inference(model):
            embedded = model.encode_image(images).float().cpu()
        plain.append((embedded @ vectors.T).argmax(1) == labels[rows])
        learnt.append(classifier(batch).argmax(1).cpu() == labels[rows])
        advance(len(rows))
    before, after = (torch.cat(right).double().numpy() for right in (plain, learnt))
    domains = np.array([source.without_image(row).domain or "" for row in range(len(source))])
    metrics: dict[str, Interval] = {}
    for name in ("", *sorted(set(domains) - {""})):
        where, here = (f", {name}", domains == name) if name else ("", np.ones(len(domains), np.bool_))
        metrics |= {
            f"zero-shot{where}": bootstrap(before[here], seed=seed),
            f"learnt{where}": bootstrap(after[here], seed=seed),
            f"learnt minus zero-shot{where}": paired_difference(before[here], after[here], seed=seed),
        }
    return Report(f"Top-1 on {source.name}", metrics, {"samples": len(source), "prompts": prompts, "seed": seed})
