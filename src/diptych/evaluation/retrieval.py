"""Image-text retrieval: recall at k, both ways, with several captions per image.

Conventions, which differ between evaluators in the field:
- Image to text is a hit if ANY caption of the image is among the k best captions; text to image if the caption's image is.
- Ties go against the model, see `ranking`.
- A caption is right for every image that has it: if two images share a caption, or a group, either is a right answer. Without
  this, two equal captions would tie, and each be a miss.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diptych.errors import EvaluationError
from diptych.evaluation.ranking import chance_recall, check_finite, ranks
from diptych.evaluation.stats import bootstrap
from diptych.types import Interval

KS = (1, 5, 10)


@dataclass(frozen=True)
class Direction:
    """Recall in one direction.

    Attributes:
        ranks: Per query, how many wrong candidates come before the best right one; 0 is a hit at 1.
        cluster: Per query, the image (or group of images) it belongs to; intervals resample these.
        candidates: How many there were; recall@k is 1 for every model where k is no smaller.
        recall: k -> share of queries with rank < k, with interval.
        chance: k -> expected recall when the candidates are in random order.
    """

    ranks: Int64[np.ndarray, " q"]
    cluster: Int64[np.ndarray, " q"]
    candidates: int
    recall: dict[int, Interval]
    chance: dict[int, float]

    def hits(self, k: int) -> Float[np.ndarray, " q"]:
        """Return 1.0 for each query whose rank is below k, else 0.0."""
        return (self.ranks < k).astype(np.float64)


@dataclass(frozen=True)
class Retrieval:
    """Recall both ways."""

    image_to_text: Direction
    text_to_image: Direction


def retrieval(
    images: Float[Tensor, "n d"],
    texts: Float[Tensor, "m d"],
    owner: Int64[Tensor, " m"],
    *,
    image_group: Int64[Tensor, " n"] | None = None,
    text_group: Int64[Tensor, " m"] | None = None,
    seed: int = 0,
) -> Retrieval:
    """Return recall both ways.

    Args:
        images: L2-normalised embeddings.
        texts: L2-normalised embeddings.
        owner: Row of `images` that each text belongs to.
        image_group: Images with one id share their texts; each image by itself when absent.
        text_group: Texts with one id are the same text, right wherever one of them is; each text by itself when absent.
        seed: Of the bootstrap.

    Raises:
        EvaluationError: If something is empty or not finite, or an image has no text.
    """
    _check(images, texts, owner)
    image_id = torch.arange(len(images)) if image_group is None else image_group.unique(return_inverse=True)[1]
    text_id = torch.arange(len(texts)) if text_group is None else text_group.unique(return_inverse=True)[1]
    right = torch.stack([image_id[owner], text_id], dim=1).unique(dim=0)
    forward = ranks(images, texts, image_id, text_id, right)
    backward = ranks(texts, images, text_id, image_id, right.flip(1))
    return Retrieval(
        _direction(*forward, image_id, len(texts), seed), _direction(*backward, image_id[owner], len(images), seed)
    )


def _direction(found: Tensor, right: Tensor, cluster: Tensor, candidates: int, seed: int) -> Direction:
    positions, clusters = found.numpy(), cluster.numpy()
    recall = {k: bootstrap((positions < k).astype(np.float64), cluster=clusters, seed=seed) for k in KS}
    return Direction(positions, clusters, candidates, recall, {k: chance_recall(right, candidates, k) for k in KS})


def _check(images: Tensor, texts: Tensor, owner: Tensor) -> None:
    if len(images) == 0 or len(texts) == 0:
        raise EvaluationError(f"Retrieval needs images and texts; there are {len(images)} and {len(texts)}.")
    check_finite(images, texts)
    if len(owner) != len(texts) or not torch.equal(owner.unique(), torch.arange(len(images))):
        raise EvaluationError(
            f"Each of the {len(texts)} texts needs an owner among the {len(images)} images, and each image a text; "
            f"{len(owner)} owners name {len(owner.unique())} images. Drop images without a text."
        )
