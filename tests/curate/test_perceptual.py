import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diptych.curate.perceptual import (
    Looks,
    bits_apart,
    looking_alike,
    mean_colour,
    perceptual_hash,
    segments,
)
from diptych.data.images import decode
from diptych.data.sources import open_source
from diptych.errors import ConfigError


def cloud(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Return a smooth random image, as photos are."""
    rough = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    image.save(file := io.BytesIO(), "JPEG", quality=quality)
    return decode(file.getvalue())


def test_hash_of_the_transform_written_out():
    image = cloud(0)
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
    low = [
        sum(
            grey[y, x] * math.cos(math.pi * v * (2 * y + 1) / 64) * math.cos(math.pi * u * (2 * x + 1) / 64)
            for y in range(32)
            for x in range(32)
        )
        for v in range(8)
        for u in range(8)
    ]
    expected = sum(int(value > np.median(low)) << (63 - place) for place, value in enumerate(low))
    assert perceptual_hash(image) == expected


@pytest.mark.parametrize("grey", [1, 128, 255])
def test_flat_images_have_one_bit(grey):
    assert perceptual_hash(Image.new("RGB", (50, 40), (grey,) * 3)) == 1 << 63


def test_scaled_and_compressed_images_stay_near_and_others_do_not():
    images = [cloud(seed) for seed in range(60)]
    bits = np.array([perceptual_hash(image) for image in images], np.uint64)
    for change in (lambda image: as_jpeg(image, 30), lambda image: image.resize((80, 60))):
        changed = np.array([perceptual_hash(change(image)) for image in images], np.uint64)
        assert bits_apart(bits, changed).max() <= 4
    one, other = np.triu_indices(60, 1)
    apart = bits_apart(bits[one], bits[other])
    assert apart.min() > 8 and 30 < apart.mean() < 34


def test_colour():
    assert mean_colour(Image.new("RGB", (9, 5), (1, 2, 250))) == (1, 2, 250)
    half = Image.new("RGB", (10, 10), "white")
    half.paste((255, 5, 0), (0, 0, 5, 10))
    assert mean_colour(half) == (255, 130, 127)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20), st.integers(0, 2**64 - 1))
def test_bits_apart(values, other):
    found = bits_apart(np.array(values, np.uint64), np.full(len(values), other, np.uint64))
    assert found.tolist() == [(value ^ other).bit_count() for value in values]


@pytest.mark.parametrize("radius", [0, 3, 4, 8, 16])
def test_segments_put_together_are_the_hash(radius):
    bits = np.random.default_rng(0).integers(2**64, size=50, dtype=np.uint64)
    edges = [64 * part // (radius + 1) for part in range(radius + 2)]
    joined = sum(int(part) << edge for part, edge in zip(segments(bits[:1], radius)[0], edges[:-1], strict=True))
    assert segments(bits, radius).shape == (50, radius + 1) and joined == int(bits[0])


@given(st.integers(0, 60), st.integers(0, 16), st.integers(0, 60), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_the_search_finds_exactly_the_pairs_within_the_radius(count, radius, colour, seed):
    rng = np.random.default_rng(seed)
    bits = rng.integers(2**64, size=max(1, count // 6), dtype=np.uint64)[rng.integers(max(1, count // 6), size=count)]
    for _ in range(radius + 2):  # far enough that some pairs are just within and some just beyond
        bits ^= np.uint64(1) << rng.integers(64, size=count, dtype=np.uint64)
    shades = rng.integers(100, 100 + 2 * colour + 2, (count, 3)).astype(np.uint8)
    everything = np.arange(count)
    pairs = looking_alike(Looks(bits, shades), radius, colour)(everything, everything)
    found = {pair for one, other in pairs for pair in zip(one.tolist(), other.tolist(), strict=True)}
    expected = {
        (i, j)
        for i in range(count)
        for j in range(count)
        if i != j
        and (int(bits[i]) ^ int(bits[j])).bit_count() <= radius
        and max(abs(int(a) - int(b)) for a, b in zip(shades[i], shades[j], strict=True)) <= colour
    }
    assert found == expected


@pytest.mark.parametrize("radius", [-1, 17])
def test_a_radius_out_of_range(radius):
    with pytest.raises(ConfigError, match="from 0 to 16"):
        looking_alike(Looks.of([]), radius, 0)


@pytest.mark.data
def test_photos():
    photos = [decode(sample.image) for sample, _ in zip(open_source("flickr8k-1k:dev"), range(60), strict=False)]
    bits = np.array([perceptual_hash(photo) for photo in photos], np.uint64)
    small = np.array([perceptual_hash(as_jpeg(p.resize((p.width // 2, p.height // 2)), 50)) for p in photos], np.uint64)
    assert bits_apart(bits, small).max() <= 4
    one, other = np.triu_indices(60, 1)
    assert bits_apart(bits[one], bits[other]).min() > 4
