"""Texts as small signatures whose agreement tells how many pieces of text they share.

A text is folded to lower-case words; its pieces are all runs of `size` characters. With J = shared pieces / all pieces of two texts, the smallest
of all pieces under a random order is the same for both with chance J. A signature holds the smallest under many orders, 8 bits of each, so

    share of equal bytes = J + (1 - J) / 256 in expectation.

Texts whose signatures agree in all `rows` bytes of one of the bands are candidates, which those with a Jaccard index of J miss with chance
(1 - J^rows)^bands.

Source: Broder 1997, "On the resemblance and containment of documents"; 8 bits: Li & Koenig 2010, "b-Bit Minwise Hashing".
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64, UInt8, UInt32, UInt64

from diptych.errors import ConfigError

ORDERS = 128
"""Bytes of a signature: the estimate of J is off by sqrt(J (1 - J) / 128), at most 0.045 (one standard deviation)."""

_TEXTS = 512  # whose pieces are hashed at once, so that they stay in a processor's cache
_ODD = np.random.default_rng(1997).integers(0, 2**31, ORDERS).astype(np.uint32) * np.uint32(2) + np.uint32(1)
_SHIFTS = np.random.default_rng(2010).integers(0, 2**32, ORDERS).astype(np.uint32)


def folded_words(text: str) -> list[str]:
    """Return the words of a text as comparison sees them: compatible characters made one, case and punctuation gone."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def signatures(texts: Sequence[str], *, size: int = 5) -> UInt8[np.ndarray, "n 128"]:
    """Return the signature of each text. A text of fewer than `size` characters is one piece; one without words is taken as it stands.

    Args:
        texts: Any; the empty text has a signature, too.
        size: Characters of a piece.
    """
    found = np.empty((len(texts), ORDERS), np.uint8)
    for start in range(0, len(texts), _TEXTS):
        folded = [" ".join(folded_words(text)) or text for text in texts[start : start + _TEXTS]]
        pieces, starts = _pieces(folded, size)
        for order in range(ORDERS):
            smallest = np.minimum.reduceat(pieces * _ODD[order] + _SHIFTS[order], starts)
            found[start : start + _TEXTS, order] = _mixed(smallest) >> np.uint32(24)
    return found


def _pieces(texts: list[str], size: int) -> tuple[UInt32[np.ndarray, " all"], Int64[np.ndarray, " n"]]:
    """Return a hash of each piece, text by text, and where those of each text begin."""
    lengths = np.array([max(len(text), size) for text in texts])
    joined = "".join(text.ljust(size, "\0") for text in texts)
    characters = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    hashes = np.zeros(len(characters) - size + 1, np.uint64)
    for place in range(size):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + characters[place : len(hashes) + place] + np.uint64(1)
    hashes = (hashes ^ (hashes >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    begin = lengths.cumsum() - lengths
    counts = lengths - size + 1
    starts = counts.cumsum() - counts
    inside = np.arange(counts.sum()) + np.repeat(begin - starts, counts)  # not what runs over from one text to the next
    return (hashes >> np.uint64(32)).astype(np.uint32)[inside], starts


def _mixed(values: UInt32[np.ndarray, " n"]) -> UInt32[np.ndarray, " n"]:
    """Return well mixed bits of each value; the smallest of many has none in front."""
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    mixed: UInt32[np.ndarray, " n"] = values ^ (values >> np.uint32(16))
    return mixed


def estimated_jaccard(one: UInt8[np.ndarray, "m 128"], other: UInt8[np.ndarray, "m 128"]) -> Float64[np.ndarray, " m"]:
    """Return the estimate of J for pairs of signatures, row by row; 0 in expectation for texts that share nothing."""
    equal = np.count_nonzero(one == other, axis=1) / ORDERS
    found: Float64[np.ndarray, " m"] = (equal - 1 / 256) / (1 - 1 / 256)
    return found


def rows_per_band(jaccard: float) -> int:
    """Return how long bands may be, at most 8, so that texts with this J become candidates in 99 of 100 cases.

    Raises:
        ConfigError: If J is so small that not even single bytes do.
    """
    for rows in range(8, 0, -1):
        if (1 - jaccard**rows) ** (ORDERS // rows) <= 0.01:
            return rows
    raise ConfigError(f"A Jaccard index of {jaccard} is too small to be found with {ORDERS} orders; take 0.1 or more.")


def bands(signed: UInt8[np.ndarray, "n 128"], rows: int) -> UInt64[np.ndarray, "n b"]:
    """Return the bytes of each band as one number; what is left over behind the last whole band is in none."""
    whole = signed[:, : ORDERS // rows * rows].reshape(len(signed), -1, rows)
    padded = np.zeros((*whole.shape[:2], 8), np.uint8)
    padded[..., :rows] = whole
    numbers: UInt64[np.ndarray, "n b"] = padded.view(np.uint64)[..., 0]
    return numbers
