"""Contenders take turns, so that a busy machine slows all of them alike; what counts are medians of ratios within a turn."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diptych.types import Interval


@dataclass(frozen=True)
class Turn:
    """One step of one contender.

    Attributes:
        seconds: It took.
        value: What came out, to be compared with what came out of others.
    """

    seconds: float
    value: Any = None


@dataclass(frozen=True)
class Contender:
    """Something that can take a step.

    Attributes:
        name: In tables.
        step: Takes one.
        every: It takes part in every so many turns, for one that is too slow for all of them.
    """

    name: str
    step: Callable[[], Turn]
    every: int = 1


def timed(name: str, function: Callable[[], Any]) -> Contender:
    """Return a contender whose step is one call of a function in this process."""

    def step() -> Turn:
        began = time.perf_counter()
        value = function()
        return Turn(time.perf_counter() - began, value)

    return Contender(name, step)


def take_turns(contenders: Sequence[Contender], turns: int, *, skip: int = 0) -> dict[str, list[float]]:
    """Return the seconds of each contender's steps, by name; NaN for turns that it took no part in.

    Every second turn goes in reverse order, so that none always follows the same other.

    Args:
        contenders: With distinct names.
        turns: Steps of each that count.
        skip: Steps of each before those, for warming up.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    assert len(seconds) == len(contenders)
    for turn in range(skip + turns):
        for contender in contenders[:: -1 if turn % 2 else 1]:
            taken = math.nan if turn % contender.every else contender.step().seconds
            if turn >= skip:
                seconds[contender.name].append(taken)
    return seconds


def ratio(times: Sequence[float], reference: Sequence[float]) -> Interval:
    """Return how often `reference` goes into `times`, turn by turn: the median of the ratios; 1 for equals."""
    return median([one / other for one, other in zip(times, reference, strict=True)])


def median(values: Sequence[float]) -> Interval:
    """Return the median between two order statistics that hold the true one with 95 % confidence, whatever the distribution.

    Fewer than six values cannot give that confidence; then the ends are the smallest and the largest. NaN does not count.
    """
    ordered = sorted(value for value in values if not math.isnan(value))
    count = len(ordered)
    left, below = 2.0**-count, 0  # the chance that no more than `below` values lie under the true median
    while left <= 0.025:
        below += 1
        left += math.comb(count, below) / 2**count
    return Interval(statistics.median(ordered), ordered[max(0, below - 1)], ordered[count - max(1, below)])


def best(seconds: Mapping[str, Sequence[float]], names: Sequence[str]) -> str | None:
    """Return which of the names has the smallest median; None if there are none."""
    return min(names, key=lambda name: median(seconds[name]).value, default=None)
