"""How well a model is fenced in: it must work in the domain that its user paid for, and fail in others.

A number of the protected model is compared with that of the plain one (SL: adapted alike, without protection). In letters: a is the authorised
domain, u another one; D_a and D_u are the drops in accuracy from the plain to the protected model.

    W_ua = A_a (D_u - D_a)                 the higher the better; 0 without protection, at most 1
    O_ua = A_u^SL (A_a - A_u)              ownership: a are clean images, u images with the owner's mark

Source: Wang et al. 2025 (IP-CLIP, arXiv 2503.02393), as a public reading note has them. Whether a drop is absolute or relative to the plain
model is not confirmed: `relative` of `protection` is the other reading.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from diptych.data.parts import by_domain, one_domain
from diptych.data.sources import AbstractSource
from diptych.errors import EvaluationError
from diptych.evaluation.stats import bootstrap_means
from diptych.models.seen import Labelled
from diptych.types import Interval, Report


@dataclass(frozen=True)
class Protection:
    """The three numbers of a pair of domains.

    Attributes:
        authorised_drop: D_a, best 0.
        unauthorised_drop: D_u, high where the fence holds.
        weighted: W_ua.
    """

    authorised_drop: float
    unauthorised_drop: float
    weighted: float


def protection(
    plain_authorised: float,
    plain_unauthorised: float,
    authorised: float,
    unauthorised: float,
    *,
    relative: bool = False,
) -> Protection:
    """Return D_a, D_u and W_ua.

    Args:
        plain_authorised: Accuracy of the plain model in the authorised domain, in [0, 1]; above 0 for relative drops.
        plain_unauthorised: And in the other domain.
        authorised: Accuracy of the protected model in the authorised domain.
        unauthorised: And in the other domain.
        relative: Divide drops by the accuracy of the plain model.

    Raises:
        EvaluationError: If an accuracy is outside [0, 1], or there is nothing to drop from.
    """
    _check_shares(plain_authorised, plain_unauthorised, authorised, unauthorised)
    if relative and not (plain_authorised and plain_unauthorised):
        raise EvaluationError("A relative drop needs a plain model that is right sometimes; it has an accuracy of 0.")
    found = _protection(plain_authorised, authorised, plain_unauthorised, unauthorised, relative=relative)
    return Protection(*found)


def ownership(plain_unauthorised: float, authorised: float, unauthorised: float) -> float:
    """Return O_ua, in [-1, 1]; 0 for a model that does not care about the mark.

    Args:
        plain_unauthorised: Accuracy of the plain model on marked images, in [0, 1].
        authorised: Accuracy of the protected model on clean images.
        unauthorised: And on marked ones.

    Raises:
        EvaluationError: If an accuracy is outside [0, 1].
    """
    _check_shares(plain_unauthorised, authorised, unauthorised)
    return plain_unauthorised * (authorised - unauthorised)


@dataclass(frozen=True)
class Correct:
    """Which images of one domain two models got right, 1 or 0, image by image.

    Attributes:
        plain: The model without protection.
        protected: The model with it.
    """

    plain: Float[np.ndarray, " _n"]
    protected: Float[np.ndarray, " _n"]


def measure_protection(authorised: Correct, unauthorised: Mapping[str, Correct], *, seed: int = 0) -> Report:
    """Return accuracies, absolute drops and W_ua of every pair of domains, and their means, with 95 % bootstrap intervals over images.

    Images of a domain are drawn together for both models; domains are drawn independently.

    Args:
        authorised: In the authorised domain.
        unauthorised: In each other one, by its name.
        seed: Of the bootstrap.

    Raises:
        EvaluationError: If there is no other domain, or no image in one.
    """
    if not unauthorised:
        raise EvaluationError("Protection is measured between two domains; there is no unauthorised one.")
    own = _table(authorised)
    others = [_table(correct) for correct in unauthorised.values()]

    def interval(part: int, *samples: np.ndarray) -> Interval:
        def mean_over_domains(plain_a: Any, protected_a: Any, *rest: Any) -> Any:
            pairs = zip(rest[::2], rest[1::2], strict=True)
            return np.mean([_protection(plain_a, protected_a, *pair)[part] for pair in pairs], axis=0)

        return bootstrap_means(mean_over_domains, own, *samples, seed=seed)

    def accuracy(table: np.ndarray, column: int) -> Interval:
        return bootstrap_means(lambda value: value, table[:, [column]], seed=seed)

    metrics = {"A_a/plain": accuracy(own, 0), "A_a": accuracy(own, 1), "D_a": interval(0, *others)}
    for name, other in zip(unauthorised, others, strict=True):
        metrics |= {f"A_u/plain/{name}": accuracy(other, 0), f"A_u/{name}": accuracy(other, 1)}
        metrics |= {f"D_u/{name}": interval(1, other), f"W_ua/{name}": interval(2, other)}
    metrics |= {"D_u": interval(1, *others), "W_ua": interval(2, *others)}
    return Report("Protection of one domain against others", metrics, {"seed": seed})


@runtime_checkable
class Judge(Protocol):
    """A classifier of images that a frozen tower has seen."""

    def exam(self, source: AbstractSource) -> Labelled:
        """Return what the tower says of labelled samples."""
        ...

    def correct(self, data: Labelled) -> Float[np.ndarray, " n"]:
        """Return 1.0 for every image whose class is found, else 0.0."""
        ...


def measure_domains(plain: Judge, protected: Judge, data: AbstractSource, authorised: str, *, seed: int = 0) -> Report:
    """Return what `measure_protection` does, of two classifiers on the domains of labelled samples.

    Args:
        plain: Without protection, and else learnt alike, on the same frozen tower.
        protected: Learnt with an authorised domain.
        data: Samples that neither was learnt on, of the authorised domain and at least one other.
        authorised: Name of that domain.
        seed: Of the bootstrap.

    Raises:
        ConfigError: If the authorised domain is not among the data's.
        EvaluationError: If there is no other.
    """
    one_domain(data, authorised)
    found: dict[str, Correct] = {}
    for name, source in by_domain(data).items():
        exam = protected.exam(source)
        found[name] = Correct(plain.correct(exam), protected.correct(exam))
    return measure_protection(found.pop(authorised), found, seed=seed)


def measure_ownership(authorised: Correct, unauthorised: Correct, *, seed: int = 0) -> Interval:
    """Return O_ua with its 95 % bootstrap interval: over clean images, and independently over marked ones."""
    return bootstrap_means(
        lambda clean, plain, marked: plain * (clean - marked),
        _table(authorised)[:, 1:],
        _table(unauthorised),
        seed=seed,
    )


def _protection(
    plain_a: Any, protected_a: Any, plain_u: Any, protected_u: Any, *, relative: bool = False
) -> tuple[Any, Any, Any]:
    """Return D_a, D_u and W_ua of numbers or arrays."""
    drop_a, drop_u = plain_a - protected_a, plain_u - protected_u
    if relative:
        drop_a, drop_u = drop_a / plain_a, drop_u / plain_u
    return drop_a, drop_u, protected_a * (drop_u - drop_a)


def _table(correct: Correct) -> Float[np.ndarray, "n 2"]:
    if correct.plain.shape != correct.protected.shape or not correct.plain.size:
        raise EvaluationError(
            f"Both models are measured on the same images, at least one; there are {correct.plain.size} and {correct.protected.size}."
        )
    return np.stack([correct.plain, correct.protected], 1).astype(np.float64)


def _check_shares(*values: float) -> None:
    if not all(0 <= value <= 1 for value in values):
        raise EvaluationError(f"Accuracies are shares between 0 and 1, not percent; they are {values}.")
