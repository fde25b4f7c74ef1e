"""Images as 64 bits that hardly change when an image is scaled or compressed again, and its mean colour, which those bits do not see.

The grey image is scaled to 32 x 32; of its cosine transform C = D X D^T the 8 x 8 lowest frequencies count, one bit each: above their median or
not. Two images are near if few bits differ. The transform is one of whole numbers (cosines times 4096, rounded), so the bits of flat images, too,
are the same on every machine.

Source: Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.1, as ImageHash computes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt64
from PIL import Image

from diptych.curate.similar import Neighbours, Rows, sharing_a_band
from diptych.errors import ConfigError

_SIDE, _LOW = 32, 8
_ANGLES = np.pi * np.outer(np.arange(_LOW), 2 * np.arange(_SIDE) + 1) / (2 * _SIDE)
_COSINES = np.round(4096 * np.cos(_ANGLES)).astype(np.int64)
_ONES = np.array([value.bit_count() for value in range(1 << 16)], np.uint8)


@dataclass(frozen=True)
class Looks:
    """What images look like, row by row.

    Attributes:
        bits: Perceptual hashes.
        colour: Mean red, green and blue.
    """

    bits: UInt64[np.ndarray, " n"]
    colour: UInt8[np.ndarray, "n 3"]

    @classmethod
    def of(cls, images: Sequence[tuple[int, tuple[int, int, int]]]) -> "Looks":
        """Return the record of images whose hashes and colours were taken one by one."""
        bits, colour = [one for one, _ in images], [one for _, one in images]
        return cls(np.array(bits, np.uint64), np.array(colour, np.uint8).reshape(-1, 3))


def perceptual_hash(image: Image.Image) -> int:
    """Return the 64 bits of an image; those of two unrelated images differ in 32 on average."""
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), np.int64)
    low = (_COSINES @ grey @ _COSINES.T).flatten()
    return int(np.packbits(low > np.median(low)).view(">u8")[0])


def mean_colour(image: Image.Image) -> tuple[int, int, int]:
    """Return the mean red, green and blue of an RGB image, 0 to 255."""
    red, green, blue = np.asarray(image.resize((1, 1), Image.Resampling.BOX))[0, 0].tolist()
    return red, green, blue


def bits_apart(one: UInt64[np.ndarray, " m"], other: UInt64[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
    """Return in how many bits hashes differ, row by row."""
    found: Int64[np.ndarray, " m"] = _ONES[(one ^ other).view(np.uint16).reshape(-1, 4)].sum(1, dtype=np.int64)
    return found


def segments(bits: UInt64[np.ndarray, " n"], radius: int) -> UInt64[np.ndarray, "n radius_plus_1"]:
    """Return hashes cut into radius + 1 segments. Two that differ in at most `radius` bits are equal in at least one of them.

    Source: Norouzi et al. 2012, "Fast Search in Hamming Space with Multi-Index Hashing", section 3.
    """
    edges = [64 * part // (radius + 1) for part in range(radius + 2)]
    parts = [(bits >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1) for low, high in pairwise(edges)]
    return np.stack(parts, 1)


def looking_alike(looks: Looks, radius: int, colour: int) -> Neighbours:
    """Return the neighbours that differ in at most `radius` bits and in each mean colour by at most `colour`: exactly, without all pairs.

    Raises:
        ConfigError: If the radius is below 0 or above 16, where segments say nothing any more.
    """
    if not 0 <= radius <= 16:
        raise ConfigError(f"The radius is a number of bits from 0 to 16, not {radius}; unrelated images differ in 32.")

    def similar(one: Rows, other: Rows) -> Bool[np.ndarray, " _m"]:
        near = bits_apart(looks.bits[one], looks.bits[other]) <= radius
        shade = np.abs(looks.colour[one].astype(np.int16) - looks.colour[other]).max(1, initial=0) <= colour
        found: Bool[np.ndarray, " _m"] = near & shade
        return found

    return sharing_a_band(segments(looks.bits, radius), similar)
