"""What frozen image embeddings know about labels: a linear probe and k nearest neighbours."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from diptych.errors import EvaluationError
from diptych.evaluation.ranking import TIE, check_finite
from diptych.evaluation.stats import bootstrap
from diptych.types import Interval

L2_GRID = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Probe:
    """Accuracy of a classifier on frozen features.

    Attributes:
        accuracy: Share of test images classified right.
        correct: Per test image, 1.0 if right.
        setting: The value used (l2 of the linear probe, k of the neighbours).
        chance: Accuracy of naming the most frequent training class for every test image.
    """

    accuracy: Interval
    correct: Float[np.ndarray, " n"]
    setting: float
    chance: float


def linear_probe(
    train: Float[Tensor, "n d"],
    train_labels: Int64[Tensor, " n"],
    test: Float[Tensor, "m d"],
    test_labels: Int64[Tensor, " m"],
    *,
    seed: int = 0,
) -> Probe:
    """Return the accuracy of multinomial logistic regression, its l2 chosen on a fifth of the TRAINING samples.

    minimise mean cross-entropy(x W + b) + l2 |W|^2 with at most 200 steps of LBFGS in float64, first on four fifths for each l2,
    then on all with the best.

    Args:
        train: Features.
        train_labels: Classes, 0 to k - 1.
        test: Features; play no part in any choice.
        test_labels: Classes.
        seed: Of the split and of the bootstrap.

    Raises:
        EvaluationError: If there is one class only.

    Source: Kornblith et al. 2019; Radford et al. 2021, section 3.2.
    """
    _check(train, train_labels, test)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(train)))
    held, kept = order[: max(1, len(order) // 5)], order[max(1, len(order) // 5) :]
    scores = {
        l2: float(_accuracy(_fit(train[kept], train_labels[kept], l2), train[held], train_labels[held]).mean())
        for l2 in L2_GRID
    }
    best = max(L2_GRID, key=lambda l2: (scores[l2], l2))
    correct = _accuracy(_fit(train, train_labels, best), test, test_labels)
    return Probe(bootstrap(correct, seed=seed), correct, best, _chance(train_labels, test_labels))


def nearest_neighbours(
    train: Float[Tensor, "n d"],
    train_labels: Int64[Tensor, " n"],
    test: Float[Tensor, "m d"],
    test_labels: Int64[Tensor, " m"],
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 256,
    seed: int = 0,
) -> Probe:
    """Return the accuracy of a vote of the k nearest training samples, weighted by exp(cosine / temperature).

    Training samples that tie with the k-th vote too, so the answer does not depend on their order. Equal votes go to the class
    with the lower number.

    Args:
        train: Features.
        train_labels: Classes, from 0.
        test: Features.
        test_labels: Classes.
        k: Neighbours; all training samples where there are fewer.
        temperature: Above 0; the larger, the more alike the k votes count.
        chunk: Test samples at once.
        seed: Of the bootstrap.

    Raises:
        EvaluationError: If there is one class only.

    Source: Wu et al. 2018, section 3.4 (k = 200 and temperature 0.07 on ImageNet).
    """
    _check(train, train_labels, test)
    k, votes_for = min(k, len(train)), F.one_hot(train_labels).double()
    train, test = F.normalize(train, dim=-1), F.normalize(test, dim=-1)
    guesses = []
    for part in test.split(chunk):
        similar = (part @ train.T).double()
        least = similar.topk(k).values[:, -1:] - TIE
        votes = (similar / temperature).exp().masked_fill(similar < least, 0)
        guesses.append((votes @ votes_for).argmax(1))
    correct = (torch.cat(guesses) == test_labels).double().numpy()
    return Probe(bootstrap(correct, seed=seed), correct, float(k), _chance(train_labels, test_labels))


def _fit(features: Tensor, labels: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    features = features.double()
    classes = int(labels.max()) + 1
    weight = torch.zeros(features.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=200, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight + bias, labels) + l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _accuracy(model: tuple[Tensor, Tensor], features: Tensor, labels: Tensor) -> Float[np.ndarray, " n"]:
    weight, bias = model
    return ((features.double() @ weight + bias).argmax(1) == labels).double().numpy()


def _check(train: Tensor, labels: Tensor, test: Tensor) -> None:
    if len(labels.unique()) < 2:
        raise EvaluationError(f"A probe needs at least two classes among its {len(train)} training samples.")
    check_finite(train, test)


def _chance(train_labels: Tensor, test_labels: Tensor) -> float:
    return float((test_labels == train_labels.mode().values).double().mean())
