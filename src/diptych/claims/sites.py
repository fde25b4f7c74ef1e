"""Simulated recordings whose truth is known: sites that see, hear, do both, integrate, or do nothing, over events in time."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from diptych.data.responses import Responses

Kind = Literal["vision", "language", "both", "integrating", "noise"]
COUNTS: dict[Kind, int] = {"vision": 15, "language": 15, "both": 10, "integrating": 10, "noise": 10}
BINS = 9


@dataclass(frozen=True)
class Sites:
    """Responses and what made them.

    Attributes:
        responses: Of all sites.
        kinds: Of each site.
    """

    responses: Responses
    kinds: tuple[Kind, ...]

    def of(self, kind: Kind) -> Bool[np.ndarray, " s"]:
        """Return which sites are of a kind."""
        return np.array([one == kind for one in self.kinds])


def simulate_sites(
    vision: Float[np.ndarray, "n v"],
    language: Float[np.ndarray, "n l"],
    fused: Float[np.ndarray, "n f"],
    rng: np.random.Generator,
    *,
    strength: float = 0.5,
) -> Sites:
    """Return responses to events: the signal of a site, swelling and fading over its bins, in noise that is alike over events and bins.

    A site that sees is linear in vision, one that hears in language, one that does both in their sum. One that integrates is linear in the fused
    features, minus what a linear map of vision and language gives of it; held out, such a map is then a little worse than chance there.

    Args:
        vision: Per event.
        language: Per event.
        fused: Per event; of vision and language, not linear in them.
        rng: Of weights and noise.
        strength: Standard deviation of the signal where it is largest; that of the noise is 1.
    """
    both = np.concatenate([np.ones((len(vision), 1)), vision, language], 1)
    beyond = fused - both @ np.linalg.lstsq(both, fused, rcond=None)[0]
    draw = partial(_direction, rng)
    makers: dict[str, Callable[[], Float64[np.ndarray, " t"]]] = {
        "vision": lambda: draw(vision),
        "language": lambda: draw(language),
        "both": lambda: (draw(vision) + draw(language)) / 2**0.5,
        "integrating": lambda: draw(beyond),
        "noise": lambda: np.zeros(len(vision)),
    }
    swell = np.exp(-0.5 * np.linspace(-1.2, 1.2, BINS) ** 2)
    kinds = tuple(kind for kind, count in COUNTS.items() for _ in range(count))
    signals = np.stack([makers[kind]() for kind in kinds], 1)
    noise = smooth_walk(len(vision), len(kinds) * (BINS + 1), rng, memory=0.5).reshape(len(vision), len(kinds), -1)
    shared, own = noise[:, :, :1], noise[:, :, 1:]
    values = strength * signals[:, :, None] * swell + (shared + own) / 2**0.5
    return Sites(Responses(values, tuple(f"{kind} {number}" for number, kind in enumerate(kinds))), kinds)


def shifted(sites: Sites, lag: int) -> Sites:
    """Return the same sites with responses that belong to other events; the last ones go to the front."""
    return replace(sites, responses=replace(sites.responses, values=np.roll(sites.responses.values, lag, axis=0)))


def smooth_order(features: Float[np.ndarray, "n d"], rng: np.random.Generator) -> Int64[np.ndarray, " n"]:
    """Return events in random order, such that neighbours are alike along one random direction: as scenes of a film are."""
    along = np.argsort(_direction(rng, features))
    order = np.empty(len(features), np.int64)
    order[np.argsort(smooth_walk(len(features), 1, rng, memory=0.95)[:, 0])] = along
    return order


def smooth_walk(
    count: int, columns: int, rng: np.random.Generator, *, memory: float = 0.95
) -> Float64[np.ndarray, "n c"]:
    """Return columns of variance 1 in which each number is `memory` times the one before, and noise: AR(1)."""
    walk = rng.normal(size=(count, columns))
    for step in range(1, count):
        walk[step] = memory * walk[step - 1] + (1 - memory**2) ** 0.5 * walk[step]
    return walk


def _direction(rng: np.random.Generator, features: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, " n"]:
    """Return features along a random direction, of mean 0 and variance 1."""
    along = features @ rng.normal(size=features.shape[1])
    found: np.ndarray = (along - along.mean()) / along.std()
    return found
