import io

import numpy as np
import pytest
from PIL import Image

from diptych.data.corruptions import CORRUPTIONS, SEVERITIES, brightness, contrast, corrupt, gaussian_blur, pixelate
from diptych.errors import ConfigError

DRAWS = ("gaussian_noise", "shot_noise", "impulse_noise")


@pytest.fixture
def pixels():
    """Return a picture of random squares, 112 high and 84 wide."""
    squares = np.random.default_rng(5).integers(20, 200, (16, 12, 3))
    return squares.repeat(7, 0).repeat(7, 1).astype(np.uint8)


def flat(level: int, side: int = 224) -> np.ndarray:
    return np.full((side, side, 3), level, dtype=np.uint8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_size_and_type_stay_and_equal_seeds_give_equal_pictures(kind, pixels):
    before = pixels.copy()
    found = corrupt(pixels, kind, 3, rng())
    assert found.shape == pixels.shape and found.dtype == np.uint8
    assert np.array_equal(pixels, before) and not np.array_equal(found, pixels)
    assert np.array_equal(found, corrupt(pixels, kind, 3, rng()))
    assert np.array_equal(found, corrupt(pixels, kind, 3, rng(1))) == (kind not in DRAWS)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_each_severity_moves_the_picture_further(kind, pixels):
    moved = [np.abs(corrupt(pixels, kind, s, rng()).astype(float) - pixels).mean() for s in SEVERITIES]
    assert moved == sorted(moved) and moved[0] > 0


def test_noises_have_the_variance_that_they_should():
    gaussian = corrupt(flat(128), "gaussian_noise", 1, rng()) / 255
    assert gaussian.mean() == pytest.approx(128 / 255, abs=0.001) and gaussian.std() == pytest.approx(0.08, rel=0.02)
    shot = corrupt(flat(102), "shot_noise", 1, rng()) / 255  # of a mean of 0.4 * 60 quanta the variance is as large
    assert shot.mean() == pytest.approx(0.4, abs=0.002) and shot.std() == pytest.approx((0.4 / 60) ** 0.5, rel=0.02)
    impulse = corrupt(flat(128), "impulse_noise", 5, rng())
    assert set(np.unique(impulse)) == {0, 128, 255}
    assert (impulse == 0).mean() == pytest.approx(0.135, abs=0.005) and (impulse == 255).mean() == pytest.approx(
        0.135, abs=0.005
    )


def test_shot_noise_leaves_black_black():
    assert not corrupt(flat(0), "shot_noise", 5, rng()).any()


def test_blur_is_the_convolution_with_a_normal_density():
    side = 56  # a quarter of 224: severity 5 has a standard deviation of 1.5 pixels
    picture = np.zeros((side, side, 3), dtype=np.uint8)
    picture[28, 28] = 255
    steps = np.arange(-6, 7)
    kernel = np.exp(-(steps**2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    expected = np.zeros((side, side))
    for dy in steps:
        for dx in steps:
            expected[28 + dy, 28 + dx] = kernel[dy + 6] * kernel[dx + 6]
    found = corrupt(picture, "gaussian_blur", 5, rng())
    assert np.abs(found[..., 1] - (255 * expected).round()).max() <= 1
    assert np.array_equal(
        gaussian_blur(flat(77, 20), 6, rng()), flat(77, 20)
    )  # what is beyond the edge is like the edge


def test_brightness_raises_the_value_and_keeps_hue_and_saturation():
    colours = np.array([[[200, 100, 50], [0, 0, 0], [255, 255, 255], [10, 20, 20]]], dtype=np.uint8)
    found = brightness(colours, 51 / 255, rng())
    assert found.tolist() == [
        [[251, 126, 63], [51, 51, 51], [255, 255, 255], [36, 71, 71]]
    ]  # e.g. 100 * 251 / 200 = 125.5


def test_contrast_draws_to_the_mean_colour():
    colours = np.array([[[0, 10, 100], [200, 30, 100]]], dtype=np.uint8)
    assert contrast(colours, 0.1, rng()).tolist() == [[[90, 19, 100], [110, 21, 100]]]


def test_pixels_become_means_of_blocks():
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    picture[:2, :2] = 100  # the first of 4 x 4 blocks of 2 x 2 at half the size
    picture[2, 2] = 100
    found = pixelate(picture, 0.5, rng())
    assert (found[:2, :2] == 100).all() and (found[2:4, 2:4] == 25).all() and not found[4:].any()


def test_jpeg_is_that_of_the_quality(pixels):
    Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", quality=18)
    assert np.array_equal(corrupt(pixels, "jpeg", 2, rng()), np.array(Image.open(file)))


def test_unknown_kinds_and_severities_are_refused(pixels):
    with pytest.raises(ConfigError, match="gaussian_blur"):
        corrupt(pixels, "gausian_blur", 1, rng())
    with pytest.raises(ConfigError, match="1 to 5, not 6"):
        corrupt(pixels, "jpeg", 6, rng())
