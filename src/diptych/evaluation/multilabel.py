"""Images that show several things: which of them are predicted, and how far that is right."""

import math

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from diptych.errors import EvaluationError


def predict_labels(logits: Float[Tensor, "n k"]) -> Bool[Tensor, "n k"]:
    """Return the classes whose probability is more than half of the image's largest; at least one for every image.

    Source: Aich et al. 2022, official evaluation; compared as logarithms, so that very small probabilities are not 0.
    """
    chance = F.logsigmoid(logits)
    return chance > chance.amax(1, keepdim=True) - math.log(2)


def hamming_scores(predicted: Bool[Tensor, "n k"], true: Bool[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """Return |predicted and true| / |predicted or true| of each image: 1 for a perfect prediction, 0 where nothing is right.

    Source: Godbole and Sarawagi 2004, section 4.1 (their "accuracy"; "Hamming score" in Aich et al. 2022).

    Raises:
        EvaluationError: If an image has neither predicted nor true classes.
    """
    either = (predicted | true).sum(1)
    if not either.all():
        raise EvaluationError(
            f"{int((either == 0).sum())} images have neither a predicted nor a true class; leave images without classes out."
        )
    return (predicted & true).sum(1) / either
