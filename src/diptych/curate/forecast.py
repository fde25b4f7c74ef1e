"""How a run of any size would go: counts, memory, and what passes between machines, from what a small run on one core has cost.

Most of it is proportional to the pairs. Two things are not. The merge of keys goes through all surveys once for every eight million rows, so what
it reads grows with the square. And the survey of counts follows from how pairs are cut: every batch says of each entry that stands in it how
often it does, and entry e, which stands in a share f_e of the pairs, is in a batch of b pairs with the chance 1 - (1 - f_e)^b.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np
from jaxtyping import Int64

from diptych.curate.parts import BATCH_ROWS
from diptych.curate.unique import AT_ONCE

HELD = 400e6
"""Bytes that the merge of keys holds at most."""


@dataclass(frozen=True)
class Seen:
    """A small run, as it was measured.

    Attributes:
        pairs: It read.
        repeated: Of them, how many had the key of an earlier one.
        matched: Of them, how many came to the survey of counts.
        source: Bytes, without images.
        left: Bytes of pairs that each pass left.
        keys: Bytes of the surveys of keys; 0 where keys were not compared.
        counts: Bytes of the surveys of counts.
        written: Bytes of reasons, and of shards without images.
        entries: Of the word lists.
        seconds: CPU time of one core for each pass, and `shards` for the writing.
    """

    pairs: int
    repeated: int
    matched: int
    source: int
    left: tuple[int, ...]
    keys: int
    counts: int
    written: int
    entries: int
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Stage:
    """What a pass of a run takes.

    Attributes:
        name: Of the pass.
        core_hours: On cores such as that of the small run.
        read: Bytes that the workers read.
        written: Bytes that they write, surveys among them.
        gathered: Bytes that the main process reads to merge the surveys; a survey that is gone through several times counts each time.
        main_memory: Bytes that the merge holds.
        told: Bytes of what each worker is told of all rows, and keeps in memory.
    """

    name: str
    core_hours: float
    read: float
    written: float
    gathered: float = 0.0
    main_memory: float = 0.0
    told: float = 0.0


def survey_rows(counts: Int64[np.ndarray, " entries"], pairs: int, batch: int) -> float:
    """Return how many rows the survey of one batch has, in expectation; between 0 and the number of entries.

    Args:
        counts: In how many of `pairs` pairs each entry stands.
        pairs: Of the pool that was counted.
        batch: Pairs in the batch, drawn from a pool as mixed as that one.
    """
    share = np.minimum(counts / pairs, 1 - 1e-12)
    return float(-np.expm1(batch * np.log1p(-share)).sum())


def forecast(
    seen: Seen, counts: Int64[np.ndarray, " entries"], pairs: int, *, batch: int = BATCH_ROWS
) -> tuple[Stage, ...]:
    """Return the passes of the default steps over `pairs` pairs.

    Args:
        seen: The small run.
        counts: In how many of its matched pairs each entry stood.
        pairs: Of the large one.
        batch: Pairs per batch of the large run.
    """
    times = pairs / seen.pairs

    def cores(name: str) -> float:
        return seen.seconds[name] * times / 3600

    keys, left = seen.keys * times, [size * times for size in seen.left]
    held = max(1, round(batch * seen.matched / seen.pairs))  # of a batch, that come to the survey of counts
    small, large = (
        survey_rows(counts, seen.matched, held) * ceil(number / held) for number in (seen.matched, seen.matched * times)
    )
    tallies = seen.counts * large / small
    found = []
    if keys:
        rounds = ceil(pairs / AT_ONCE)
        found.append(
            Stage(
                "keys",
                cores("keys"),
                seen.source * times,
                left[0] + keys,
                (1 + rounds) * keys,
                min(HELD, HELD * pairs / AT_ONCE),
                9 * seen.repeated * times,
            )
        )
    before = left[0] if keys else seen.source * times
    found += [
        Stage("counts", cores("counts"), before, left[-2] + tallies, tallies, 8 * seen.entries, 8 * seen.entries),
        Stage("draws", cores("draws"), left[-2], left[-1]),
        Stage("shards", cores("shards"), left[-1] + seen.source * times, seen.written * times),
    ]
    return tuple(found)
