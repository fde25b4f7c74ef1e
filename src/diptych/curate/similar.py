"""Which of many similar rows stay: the first of each, so that no two that stay are similar and each that goes is similar to one that stays.

That is what a loop gives that takes rows in order and keeps a row unless one kept before is similar to it. Here rows come in blocks that double:
each block is compared with the rows kept so far, then its rest with itself, all in whole-array steps. A chain of similar rows does not fall to one
row, as it would with connected components.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt64

Rows: TypeAlias = Int64[np.ndarray, " _rows"]
Pairs: TypeAlias = tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]
Neighbours: TypeAlias = Callable[[Rows, Rows], Iterator[Pairs]]
"""Yields similar pairs, one of the first rows and one of the second, in no order; a pair may come several times."""

_FIRST = 1024  # rows of the first block
_PAIRS = 1 << 16  # compared at once
_TILE = 2048  # rows and columns of cosines at once


def first_of_similar(count: int, neighbours: Neighbours) -> Int64[np.ndarray, " count"]:
    """Return for each row the first kept one before it that is similar; the row itself if there is none, and it is kept.

    Time grows with the number of pairs that have to be compared. Put rows in a random order: then of many rows that are all similar the first comes
    early, and later blocks are compared with it alone.
    """
    stands = np.arange(count)
    kept = np.empty(0, np.int64)
    start, size = 0, _FIRST
    while start < count:
        block = np.arange(start, min(start + size, count))
        for earlier, later in neighbours(kept, block):
            np.minimum.at(stands, later, earlier)
        rest = block[stands[block] == block]
        _settle(stands, neighbours(rest, rest))
        kept = np.append(kept, rest[stands[rest] == rest])
        start, size = start + size, 2 * size
    return stands


def _settle(stands: Int64[np.ndarray, " _count"], pairs: Iterator[Pairs]) -> None:
    """Let rows of one block stand for each other: pair by pair, ordered by the later row, so that what stands before it is known."""
    found = [np.stack([one, other], 1)[one < other] for one, other in pairs]
    edges = np.unique(np.concatenate([np.empty((0, 2), np.int64), *found])[:, ::-1], axis=0)
    for later, earlier in edges.tolist():
        if stands[earlier] == earlier and stands[later] == later:
            stands[later] = earlier


def sharing_a_band(
    bands: UInt64[np.ndarray, "n b"], similar: Callable[[Rows, Rows], Bool[np.ndarray, " _m"]]
) -> Neighbours:
    """Return the neighbours among rows that are equal in at least one band, locality-sensitive hashing.

    Args:
        bands: Of each row. They decide only which pairs are looked at.
        similar: Of pairs, row by row.
    """

    def neighbours(rows: Rows, others: Rows) -> Iterator[Pairs]:
        for band in bands.T:
            order = rows[np.argsort(band[rows], kind="stable")]
            low, high = (np.searchsorted(band[order], band[others], side=side) for side in ("left", "right"))
            some = np.flatnonzero(high > low)
            ends = (high - low)[some].cumsum()
            start = 0
            while start < len(some):
                done = ends[start - 1] if start else 0
                stop = max(start + 1, int(np.searchsorted(ends, done + _PAIRS, side="right")))
                here = some[start:stop]
                one, other = order[spans(low[here], high[here])], np.repeat(others[here], (high - low)[here])
                one, other = one[one != other], other[one != other]
                same = similar(one, other)
                yield one[same], other[same]
                start = stop

    return neighbours


def close_in_direction(embeddings: Float32[np.ndarray, "n d"], least: float) -> Neighbours:
    """Return the neighbours whose cosine is at least `least`, by comparing all with all, tile by tile.

    Args:
        embeddings: L2-normalised.
        least: In (0, 1].
    """

    def neighbours(rows: Rows, others: Rows) -> Iterator[Pairs]:
        for start in range(0, len(others), _TILE):
            some = others[start : start + _TILE]
            for begin in range(0, len(rows), _TILE):
                tile = rows[begin : begin + _TILE]
                one, other = np.nonzero(embeddings[tile] @ embeddings[some].T >= least)
                yield tile[one], some[other]

    return neighbours


def spans(low: Int64[np.ndarray, " s"], high: Int64[np.ndarray, " s"]) -> Int64[np.ndarray, " _all"]:
    """Return the numbers from each low to its high, exclusive, one span behind the other."""
    ends = (high - low).cumsum()
    found: Int64[np.ndarray, " _all"] = np.arange(ends[-1] if len(ends) else 0) + np.repeat(high - ends, high - low)
    return found
