"""Fewer of the frequent, all of the rare: how likely each text is kept, given which entries of a word list stand in it.

N_e texts hold entry e. With a threshold t each entry keeps its texts with p_e = min(1, t / N_e), and a text is kept if one of its entries
keeps it:

    P(keep | text) = 1 - product over entries in the text of (1 - p_e),  0 without any.

A text with one rare entry, N_e <= t, is always kept. Counts of shards add up; probabilities need nothing but the counts; a draw needs nothing but
the row's own id and a seed: so shards in any order, and a run after another, agree.

Source: Xu et al. 2024, "Demystifying CLIP Data", section 3 and algorithm 1, and its official code.
"""

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float64, Int64, UInt64

from diptych.curate.match import text_bytes
from diptych.errors import ConfigError, DataError

Matches: TypeAlias = pa.ListArray | pa.ChunkedArray
"""Ids of entries, one list per text, as `Matcher` gives them."""


def count_entries(matches: Matches, size: int) -> Int64[np.ndarray, " entries"]:
    """Return in how many texts each entry stands; the counts of shards add up to those of all.

    Args:
        matches: Of texts, each id once per text.
        size: How many entries there are.

    Raises:
        DataError: If an id is out of range.
    """
    _, ids = rows_and_ids(matches)
    if len(ids) and not 0 <= ids.min() <= ids.max() < size:
        raise DataError(
            f"Matches name the entries {ids.min()} to {ids.max()}; there are {size:,}. Match with the same word list again."
        )
    return np.bincount(ids, minlength=size)


def entry_probabilities(counts: Int64[np.ndarray, " entries"], threshold: float) -> Float64[np.ndarray, " entries"]:
    """Return p_e = min(1, threshold / N_e), in (0, 1]; 1 for entries that stand nowhere.

    Args:
        counts: N_e.
        threshold: t >= 1; infinity keeps every text that has an entry.

    Raises:
        ConfigError: If the threshold is below 1.
    """
    if not threshold >= 1:
        raise ConfigError(f"The threshold is a number of texts per entry, at least 1, not {threshold}.")
    return np.where(counts > threshold, threshold / np.maximum(counts, 1), 1.0)


def keep_probabilities(
    matches: Matches, probabilities: Float64[np.ndarray, " entries"]
) -> Float64[np.ndarray, " texts"]:
    """Return how likely each text is kept: 1 - product of (1 - p_e), in [0, 1]; 0 for a text without entries."""
    starts, ids = rows_and_ids(matches)
    lost = np.ones(len(starts) - 1)
    has = np.flatnonzero(np.diff(starts))
    if len(has):
        lost[has] = np.multiply.reduceat(1 - probabilities[ids], starts[has])
    return 1 - lost


def keep_by_entries(
    matches: Matches, probabilities: Float64[np.ndarray, " entries"], uniforms: Float64[np.ndarray, " matches"]
) -> Bool[np.ndarray, " texts"]:
    """Return which texts at least one of their entries keeps, with one draw per match: the paper's own form.

    Equal in distribution to one draw per text below `keep_probabilities`, which needs fewer and is what we use.

    Args:
        matches: m in all.
        probabilities: p_e.
        uniforms: In [0, 1), text by text, in the order of the ids.
    """
    starts, ids = rows_and_ids(matches)
    sums = np.concatenate([[0], (uniforms < probabilities[ids]).cumsum()])
    kept: Bool[np.ndarray, " texts"] = sums[starts[1:]] > sums[starts[:-1]]
    return kept


def tail_share(counts: Int64[np.ndarray, " entries"], threshold: float) -> float:
    """Return which share of all matches belongs to entries with fewer than `threshold` texts, in [0, 1].

    Raises:
        DataError: If nothing matched.
    """
    return float(counts[counts < threshold].sum() / _total(counts))


def threshold_for_share(counts: Int64[np.ndarray, " entries"], share: float) -> int:
    """Return the threshold for which the tail has a share of all matches: the count at which the cumulative share comes closest.

    6 % is what the paper keeps when a pool grows (t = 20,000 at 1.6 billion pairs).

    Raises:
        ConfigError: If the share is not in (0, 1].
        DataError: If nothing matched.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"The share of the tail lies in (0, 1], not at {share}.")
    ordered = np.sort(counts)
    return max(1, int(ordered[np.abs(ordered.cumsum() / _total(counts) - share).argmin()]))


def threshold_for_size(matches: Iterable[Matches], counts: Int64[np.ndarray, " entries"], size: float) -> float:
    """Return the threshold that keeps `size` texts in expectation; it need not be whole.

    Args:
        matches: Of all texts, in as many parts as they came in, such as a list of them; gone through anew, once for each of some fifty halvings.
        counts: N_e over all of them.
        size: Between what threshold 1 keeps and the number of texts that have an entry.

    Raises:
        ConfigError: If no threshold gives that size; names the smallest and the largest.
    """
    low, high = 1.0, float(max(1, counts.max(initial=1)))
    least, most = (expected_size(matches, counts, threshold) for threshold in (low, high))
    if not least <= size <= most:
        raise ConfigError(
            f"Thresholds keep between {least:,.1f} texts (threshold 1) and {most:,.0f} (all that have an entry), not {size:,}. Choose a size between "
            "them, or a list with other entries."
        )
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if expected_size(matches, counts, middle) < size else (low, middle)
    return high


def expected_size(matches: Iterable[Matches], counts: Int64[np.ndarray, " entries"], threshold: float) -> float:
    """Return how many texts a threshold keeps on average; the number varies by less than its square root."""
    probabilities = entry_probabilities(counts, threshold)
    return float(sum(keep_probabilities(part, probabilities).sum() for part in matches))


def language_thresholds(
    counts: Mapping[str, Int64[np.ndarray, " _entries"]], threshold: float, *, anchor: str = "en"
) -> dict[str, float]:
    """Return a threshold per language: `threshold` for the anchor, and for each other the one that gives its tail the anchor's share.

    Where the anchor has no tail, or nothing matched in a language, `threshold` is all there is to say.

    Raises:
        ConfigError: If the anchor is not among the languages.
        DataError: If nothing matched in the anchor.

    Source: Chuang et al. 2025, "Meta CLIP 2", and its official code.
    """
    if anchor not in counts:
        raise ConfigError(f"Thresholds follow from {anchor!r}, which is not among {', '.join(counts)}.")
    share = tail_share(counts[anchor], threshold)
    return {
        language: float(threshold_for_share(own, share) if language != anchor and share and own.any() else threshold)
        for language, own in counts.items()
    }


def row_uniforms(
    ids: pa.Array | pa.ChunkedArray | Int64[np.ndarray, " n"], seed: int, *, draw: int = 0
) -> Float64[np.ndarray, " n"]:
    """Return one number in [0, 1) per row, that depends on nothing but its id, the seed and the number of the draw.

    Keep a row if its number is below its probability: then a higher threshold keeps what a lower one keeps and more.

    Args:
        ids: Whole numbers or strings; unique, or equal rows share their fate.
        seed: Of the choice.
        draw: Number of the draw, from 0, where one row needs several.

    Raises:
        DataError: If ids are neither, or some are missing.
    """
    return (row_hashes(ids, seed, draw) >> np.uint64(11)) * 2.0**-53


def row_hashes(ids: pa.Array | pa.ChunkedArray | np.ndarray, seed: int = 0, draw: int = 0) -> UInt64[np.ndarray, " n"]:
    """Return 64 well mixed bits per row, that depend on nothing but its id, the seed and the number of the draw.

    Raises:
        DataError: As `row_uniforms`.
    """
    if isinstance(ids, np.ndarray):
        values = ids.astype(np.uint64)
    elif isinstance(ids, pa.ChunkedArray):
        parts = [row_hashes(chunk, seed, draw) for chunk in ids.chunks]
        return np.concatenate(parts) if parts else np.empty(0, np.uint64)
    elif ids.null_count:
        raise DataError(f"{ids.null_count:,} rows have no id, so no draw of theirs could be repeated. Give each one.")
    elif pa.types.is_integer(ids.type):
        values = ids.to_numpy(zero_copy_only=False).astype(np.uint64)
    else:
        values = _string_hashes(*text_bytes(ids))
    salt = _mixed(_mixed(np.array([seed]).astype(np.uint64)) + np.uint64(draw))
    return _mixed(_mixed(values) ^ salt)


def _string_hashes(data: np.ndarray, offsets: Int64[np.ndarray, " n_plus_1"]) -> UInt64[np.ndarray, " n"]:
    """Return a hash of each string: eight bytes at a time, for all of those that are long enough."""
    length = np.diff(offsets)
    hashes = _mixed(length.astype(np.uint64))
    padded = np.concatenate([data[offsets[0] : offsets[-1]], np.zeros(8, np.uint8)])
    begin, done = offsets[:-1] - offsets[0], 0
    while len(left := np.flatnonzero(length > done)):
        piece = padded[begin[left, None] + done + np.arange(8)]
        piece[np.arange(8) >= (length[left] - done)[:, None]] = 0
        hashes[left] = _mixed(hashes[left] ^ piece.view("<u8")[:, 0])
        done += 8
    return hashes


def _mixed(values: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Return well mixed bits of each value, one to one.

    Source: Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators" (SplitMix64).
    """
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64[np.ndarray, " n"] = values ^ (values >> np.uint64(31))
    return mixed


def rows_and_ids(matches: Matches) -> tuple[Int64[np.ndarray, " texts_plus_1"], Int64[np.ndarray, " matches"]]:
    """Return where in the ids each text's begin and the last's end, and the ids."""
    whole = matches.combine_chunks() if isinstance(matches, pa.ChunkedArray) else matches
    if not len(whole):
        return np.zeros(1, np.int64), np.empty(0, np.int64)
    offsets = whole.offsets.to_numpy().astype(np.int64)
    ids = whole.values.to_numpy()[offsets[0] : offsets[-1]].astype(np.int64)
    return offsets - offsets[0], ids


def _total(counts: Int64[np.ndarray, " entries"]) -> int:
    if not counts.sum():
        raise DataError(
            f"No text has an entry of the word list, which holds {len(counts):,}, so there is no tail whose share could be taken. Compare texts and "
            "list: language, upper and lower case (match.fold_case), and whether earlier steps left any text. match.words names another list."
        )
    return int(counts.sum())
