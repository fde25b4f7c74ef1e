"""Features worth remembering: for every class those that the model is surest of."""

from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class FeatureBank:
    """The surest features of each class.

    Attributes:
        features: Zeros in empty slots.
        confidence: Probability of the class, 0 in empty slots.
    """

    features: Float[Tensor, "k size d"]
    confidence: Float[Tensor, "k size"]

    @property
    def prototypes(self) -> Float[Tensor, "k d"]:
        """Return the sum of each class's features over the number of slots, empty ones counted, not normalised."""
        return self.features.mean(1)

    @property
    def filled(self) -> Int64[Tensor, " k"]:
        """Return how many slots of each class hold something."""
        return (self.confidence > 0).sum(1)


def fill_bank(
    embeddings: Float[Tensor, "n d"],
    probabilities: Float[Tensor, "n k"],
    labels: Int64[Tensor, " n"] | None = None,
    *,
    size: int = 5,
    enough: float = 0.99,
) -> FeatureBank:
    """Return, for every class, the features that are surest to be of it.

    A feature takes the place of the least sure one of its predicted class if it is surer, in the order of the images, until all are sure enough.

    Args:
        embeddings: L2-normalised.
        probabilities: Of each class.
        labels: Where known, only features whose prediction is right are taken.
        size: Slots per class.
        enough: Confidence of every slot at which nothing more is looked at.

    Source: Wang et al. 2025 (IP-CLIP), feature banks; the order of comparisons as in the official code.
    """
    bank = FeatureBank(
        embeddings.new_zeros(probabilities.shape[1], size, embeddings.shape[1]),
        probabilities.new_zeros(probabilities.shape[1], size),
    )
    confidence, predicted = probabilities.max(1)
    for row, (sure, label) in enumerate(zip(confidence.tolist(), predicted.tolist(), strict=True)):
        if bank.confidence.min() > enough:
            break
        slot = int(bank.confidence[label].argmin())
        if (labels is None or int(labels[row]) == label) and sure > bank.confidence[label, slot]:
            bank.features[label, slot], bank.confidence[label, slot] = embeddings[row], confidence[row]
    return bank
