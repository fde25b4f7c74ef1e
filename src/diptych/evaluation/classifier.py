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
from diptych.models.embedding import embed_texts, inference, left_out, none_readable, readable_batches
from diptych.models.seen import labels_of
from diptych.types import Batch, Interval, Report, Sample

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

    All of it over all images that can be read and, where samples have domains, in each of them; others are left out, and a note counts them.
    1 / k at chance for k equally frequent classes.

    Args:
        classifier: Learnt beside the model.
        model: In eval mode.
        source: Labelled samples that were not learnt on.
        prompts: Name of the prompt file for zero-shot.
        seed: Of the bootstrap.
        advance: Progress.

    Raises:
        DataError: If a sample has none of the classes.
        ImageError: If no image can be read.
    """
    labels = labels_of(source, classifier.classes)
    vectors = class_embeddings(lambda texts: embed_texts(model, texts), classifier.classes, read_prompts(prompts))
    plain, learnt = list[Bool[Tensor, " b"]](), list[Bool[Tensor, " b"]]()
    samples, skipped = list[Sample](), list[str]()
    for shown, images in readable_batches(model, source, AT_ONCE):
        samples += shown.samples
        skipped += shown.skipped
        if images is None:
            continue
        batch = Batch(tuple(sample.key for sample in shown.samples), (images,), (), torch.zeros(len(images)).long())
        with inference(model):
            embedded = model.encode_image(images).float().cpu()
        label = labels[list(shown.rows)]
        plain.append((embedded @ vectors.T).argmax(1) == label)
        learnt.append(classifier(batch).argmax(1).cpu() == label)
        advance(len(images))
    if not samples:
        raise none_readable(source, skipped)
    before, after = (torch.cat(right).double().numpy() for right in (plain, learnt))
    domains = np.array([sample.domain or "" for sample in samples])
    metrics: dict[str, Interval] = {}
    for name in ("", *sorted(set(domains) - {""})):
        where, here = (f", {name}", domains == name) if name else ("", np.ones(len(domains), np.bool_))
        metrics |= {
            f"zero-shot{where}": bootstrap(before[here], seed=seed),
            f"learnt{where}": bootstrap(after[here], seed=seed),
            f"learnt minus zero-shot{where}": paired_difference(before[here], after[here], seed=seed),
        }
    counts = {"samples": len(samples), "skipped": len(skipped)}
    return Report(f"Top-1 on {source.name}", metrics, {**counts, "prompts": prompts, "seed": seed}, left_out(skipped))
