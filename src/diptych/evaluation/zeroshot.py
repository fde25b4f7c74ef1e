"""Zero-shot classification: a class is the mean of its prompts' embeddings, an image belongs to the nearest class.

Prompts are versioned files in `prompts/`; their hash is part of every result, since accuracy moves by points with them.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from diptych.errors import ConfigError, EvaluationError, nearest
from diptych.evaluation.ranking import check_finite, ranks
from diptych.evaluation.stats import bootstrap, bootstrap_strata
from diptych.models.dual import DualEncoder
from diptych.models.embedding import inference
from diptych.types import Interval, map_tensors

PROMPTS_AT_ONCE = 128
"""Texts per forward pass of `anchors_of`."""


@dataclass(frozen=True)
class Prompts:
    """A set of templates.

    Attributes:
        name: File name without its ending.
        templates: Each holds `{}` where the class name goes.
        digest: Hash of the file's bytes.
    """

    name: str
    templates: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class ZeroShot:
    """Accuracy over all images.

    Attributes:
        top1: Share of images whose class is nearest; 1 / classes at chance.
        top5: Share of images whose class is among the five nearest; None with fewer than six classes.
        mean_per_class: Mean over classes of their top-1 (balanced accuracy), so that every class counts alike.
        by_domain: Top-1 within each domain, if the source has domains.
        correct: Per image, 1.0 if its class is nearest.
        ranks: Per image, how many other classes are as near as its own or nearer.
        classes: Class names, in order.
        prompts: What they were put into.
    """

    top1: Interval
    top5: Interval | None
    mean_per_class: Interval
    by_domain: dict[str, Interval]
    correct: Float[np.ndarray, " n"]
    ranks: Int64[np.ndarray, " n"]
    classes: tuple[str, ...]
    prompts: Prompts

    def hits(self, k: int) -> Float[np.ndarray, " n"]:
        """Return 1.0 for each image whose class is among the k nearest, else 0.0."""
        return (self.ranks < k).astype(np.float64)


def read_prompts(name: str) -> Prompts:
    """Return the templates of a file in `prompts/`.

    Raises:
        ConfigError: If there is no such file; lists those there are.
    """
    folder = files("diptych.evaluation") / "prompts"
    file = folder / f"{name}.json"
    if not file.is_file():
        known = [entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")]
        raise ConfigError(f"There are no prompts {name!r}. {nearest(name, known)}")
    content = file.read_bytes()
    return Prompts(name, tuple(json.loads(content)["templates"]), hashlib.blake2b(content, digest_size=8).hexdigest())


def class_embeddings(
    embed: Callable[[Sequence[str]], Float[Tensor, "m d"]], classes: Sequence[str], prompts: Prompts
) -> Float[Tensor, "k d"]:
    """Return one L2-normalised embedding per class: the mean over templates, normalised again.

    Source: Radford et al. 2021, section 3.1.4 (prompt ensembling in embedding space).
    """
    texts = [template.format(name.replace("_", " ")) for name in classes for template in prompts.templates]
    embedded = embed(texts).unflatten(0, (len(classes), len(prompts.templates)))
    return F.normalize(embedded.mean(1), dim=-1)


def mean_anchor(embeddings: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """Return the normalised mean of embeddings that are not normalised: longer ones count more."""
    return F.normalize(embeddings.mean(0), dim=-1)


def anchors_of(model: DualEncoder, *sides: Sequence[str]) -> Float[Tensor, "sides d"]:
    """Return the mean embedding of each set of texts, normalised: anchors for a handful of states that are each said in many ways."""
    anchors = []
    with inference(model):
        for texts in sides:
            parts = [
                map_tensors(
                    lambda tensor: tensor.to(model.device), model.tokenizer(texts[start : start + PROMPTS_AT_ONCE])
                )
                for start in range(0, len(texts), PROMPTS_AT_ONCE)
            ]
            embedded = torch.cat([model.text_head(model.text_output(part)).float() for part in parts])
            anchors.append(mean_anchor(embedded))
    return torch.stack(anchors).clone()  # a clone can be trained with, a tensor of inference mode cannot


def zero_shot(
    images: Float[Tensor, "n d"],
    class_vectors: Float[Tensor, "k d"],
    labels: Int64[Tensor, " n"],
    classes: Sequence[str],
    prompts: Prompts,
    *,
    domains: Sequence[str | None] = (),
    seed: int = 0,
) -> ZeroShot:
    """Return accuracies with intervals; ties go against the model, see `ranking`.

    Args:
        images: L2-normalised embeddings.
        class_vectors: From `class_embeddings`.
        labels: Row of `class_vectors` that each image belongs to.
        classes: Names of the rows.
        prompts: For the record.
        domains: One per image, or empty.
        seed: Of the bootstrap.

    Raises:
        EvaluationError: If there is only one class, or embeddings are not finite.
    """
    if len(classes) < 2:
        raise EvaluationError(f"Classification needs at least two classes; there is only {list(classes)}.")
    check_finite(images, class_vectors)
    rows = torch.arange(len(classes))
    rank = ranks(images, class_vectors, labels, rows, torch.stack([rows, rows], dim=1))[0].numpy()
    correct = (rank == 0).astype(np.float64)
    domain_array = np.array(domains)
    return ZeroShot(
        top1=bootstrap(correct, seed=seed),
        top5=bootstrap((rank < 5).astype(np.float64), seed=seed) if len(classes) > 5 else None,
        mean_per_class=bootstrap_strata(correct, labels.numpy(), seed=seed),
        by_domain={
            str(name): bootstrap(correct[domain_array == name], seed=seed) for name in sorted({d for d in domains if d})
        },
        correct=correct,
        ranks=rank,
        classes=tuple(classes),
        prompts=prompts,
    )
