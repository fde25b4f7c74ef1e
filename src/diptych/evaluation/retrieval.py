"""Image-text retrieval: recall at k, both ways, with several captions per image.

Conventions, which differ between evaluators in the field:
- Image to text is a hit if ANY caption of the image is among the k best captions; text to image if the caption's image is.
- Ties go against the model: a wrong candidate that scores exactly as high as the best right one ranks before it. A model that
  embeds everything alike therefore scores 0, not 1.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diptych.errors import EvaluationError
from diptych.evaluation.stats import bootstrap
from diptych.types import Interval

KS = (1, 5, 10)


@dataclass(frozen=True)
class Direction:
    """Recall in one direction.

    Attributes:
        ranks: Per query, how many wrong candidates come before the best right one; 0 is a hit at 1.
        cluster: Per query, the image it belongs to; intervals resample images.
        candidates: How many there were; recall@k at chance is about k / candidates times the right ones per query.
        recall: k -> share of queries with rank < k, with interval.
    """

    ranks: Int64[np.ndarray, " q"]
    cluster: Int64[np.ndarray, " q"]
    candidates: int
    recall: dict[int, Interval]

    def hits(self, k: int) -> Float[np.ndarray, " q"]:
        """Return 1.0 for each query whose rank is below k, else 0.0."""
        return (self.ranks < k).astype(np.float64)


@dataclass(frozen=True)
class Retrieval:
    """Recall both ways."""

    image_to_text: Direction
    text_to_image: Direction


def retrieval(
    images: Float[Tensor, "n d"], texts: Float[Tensor, "m d"], owner: Int64[Tensor, " m"], *, seed: int = 0
) -> Retrieval:
    """Return recall both ways.

    Args:
        images: L2-normalised embeddings.
        texts: L2-normalised embeddings.
        owner: Row of `images` that each text belongs to. Texts with exactly equal embeddings are not treated as one.
        seed: Of the bootstrap.

    Raises:
        EvaluationError: If something is empty or not finite, or an image has no text.
    """
    _check(images, texts, owner)
    everyone = torch.arange(len(images))
    forward, backward = ranks(images, texts, everyone, owner), ranks(texts, images, owner, everyone)
    return Retrieval(_direction(forward, everyone, len(texts), seed), _direction(backward, owner, len(images), seed))


def ranks(
    queries: Float[Tensor, "q d"],
    candidates: Float[Tensor, "c d"],
    query_group: Int64[Tensor, " q"],
    candidate_group: Int64[Tensor, " c"],
    *,
    chunk: int = 512,
) -> Int64[Tensor, " q"]:
    """Return, per query, how many candidates of other groups score at least as high as its best own one.

    The score matrix is made `chunk` rows at a time.
    """
    found = []
    for start in range(0, len(queries), chunk):
        scores = queries[start : start + chunk] @ candidates.T
        own = query_group[start : start + chunk, None] == candidate_group
        best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        found.append(((scores >= best) & ~own).sum(1))
    return torch.cat(found)


def _direction(found: Tensor, cluster: Tensor, candidates: int, seed: int) -> Direction:
    positions, clusters = found.numpy(), cluster.numpy()
    recall = {k: bootstrap((positions < k).astype(np.float64), cluster=clusters, seed=seed) for k in KS}
    return Direction(positions, clusters, candidates, recall)


def _check(images: Tensor, texts: Tensor, owner: Tensor) -> None:
    if len(images) == 0 or len(texts) == 0:
        raise EvaluationError(f"Retrieval needs images and texts; there are {len(images)} and {len(texts)}.")
    if not (images.isfinite().all() and texts.isfinite().all()):
        raise EvaluationError("Some embeddings are not finite. The model is broken: look at the training log.")
    if len(owner) != len(texts) or not torch.equal(owner.unique(), torch.arange(len(images))):
        missing = len(images) - len(owner.unique())
        raise EvaluationError(f"Every image needs at least one text; {missing} of {len(images)} have none.")
