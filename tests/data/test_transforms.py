import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

from diptych.data.transforms import Augment, ImagePolicy, augment, preprocess, random_box, uncut
from diptych.errors import ConfigError, ImageError

SIZES = [(37, 53), (53, 37), (31, 31), (224, 101), (7, 200), (64, 64), (1, 1), (2, 1)]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("side", "fraction"), [(32, 1.0), (33, 1.0), (32, 0.875), (28, 0.9)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
def test_crop_is_torchvision_s_to_the_bit(size, side, fraction, interpolation):
    image = noise(*size)
    resize = Resize(round(side / fraction), InterpolationMode(interpolation), antialias=True)
    expected = Compose([resize, CenterCrop(side), PILToTensor()])(image)
    policy = ImagePolicy(side, crop_fraction=fraction, interpolation=interpolation)
    found = preprocess(image, policy)
    assert found.dtype == torch.uint8 and torch.equal(found, expected)


@pytest.mark.parametrize("size", SIZES)
def test_squash_is_torchvision_s_to_the_bit(size):
    resize = Resize((30, 30), InterpolationMode.BICUBIC, antialias=True)
    expected = PILToTensor()(resize(noise(*size)))
    for fraction in (1.0, 0.5):  # only `crop` uses it
        assert torch.equal(preprocess(noise(*size), ImagePolicy(30, resize="squash", crop_fraction=fraction)), expected)


@pytest.mark.parametrize(("size", "inner"), [((40, 20), (16, 8)), ((20, 40), (8, 16)), ((3, 48), (1, 16))])
def test_pad_keeps_everything_and_fills_with_the_background(size, inner):
    policy = ImagePolicy(16, resize="pad", background=(9, 8, 7))
    found = preprocess(noise(*size), policy).permute(1, 2, 0).numpy()
    expected = Image.new("RGB", (16, 16), (9, 8, 7))
    left, top = round((16 - inner[0]) / 2), round((16 - inner[1]) / 2)
    expected.paste(noise(*size).resize(inner, Image.Resampling.BICUBIC), (left, top))
    assert np.array_equal(found, np.asarray(expected))


def test_an_image_of_the_right_size_is_left_alone():
    image = noise(24, 24)
    for resize in ("crop", "squash", "pad"):
        found = preprocess(image, ImagePolicy(24, resize=resize))
        assert torch.equal(found.permute(1, 2, 0), torch.from_numpy(np.array(image)))


def test_one_pixel_fills_the_square():
    image = Image.new("RGB", (1, 1), (10, 20, 30))
    for resize in ("crop", "squash", "pad"):
        found = preprocess(image, ImagePolicy(8, resize=resize))
        assert torch.equal(found, torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None].expand(3, 8, 8))
    change = Augment(crop_scale=(0.1, 0.5), flip_rate=0.5, jitter=0.2, hue=0.1, gray_rate=0.5, blur_rate=1)
    assert augment(image, ImagePolicy(8), change, np.random.default_rng(0)).shape == (3, 8, 8)


def test_of_a_very_wide_image_the_centre_is_kept():
    image = Image.new("RGB", (4000, 2))
    image.paste((255, 255, 255), (2000, 0, 4000, 2))
    found = preprocess(image, ImagePolicy(32)).float()[0, 16]
    assert found[0] == 0 and found[-1] == 255 and found.mean() == pytest.approx(127.5, abs=1)
    tall = preprocess(image.transpose(Image.Transpose.ROTATE_90), ImagePolicy(32)).float()[0, :, 16]
    assert tall[0] == 255 and tall[-1] == 0


def test_an_absurdly_wide_image_is_refused_before_it_fills_the_memory():
    image = Image.new("RGB", (100_000, 1))
    with pytest.raises(ImageError, match=r"100000 x 1 pixels becomes 6400000 x 64 .* at most 100,000,000"):
        preprocess(image, ImagePolicy(64))
    assert preprocess(image, ImagePolicy(64, resize="squash")).shape == (3, 64, 64)
    assert augment(image, ImagePolicy(64), Augment(crop_scale=(0.5, 1)), np.random.default_rng(0)).shape == (3, 64, 64)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("fraction", [1.0, 0.875])
def test_no_change_is_the_evaluation_path(size, resize, fraction):
    policy = ImagePolicy(32, resize=resize, crop_fraction=fraction)
    found = augment(noise(*size), policy, Augment(), np.random.default_rng(0))
    assert torch.equal(found, preprocess(noise(*size), policy))


def test_flip_gray_and_jitter():
    image, policy = noise(40, 30), ImagePolicy(16)
    rng = np.random.default_rng(0)
    flipped = augment(image, policy, Augment(flip_rate=1), rng)
    assert torch.equal(flipped, preprocess(ImageOps.mirror(image), policy))
    gray = augment(image, policy, Augment(gray_rate=1), rng)
    assert torch.equal(gray, preprocess(ImageOps.grayscale(image).convert("RGB"), policy))
    plain = Image.new("RGB", (16, 16), (100, 100, 100))  # has no contrast and no colour: only brightness can change
    levels = [augment(plain, policy, Augment(jitter=0.4), rng).unique() for _ in range(200)]
    assert all(len(level) == 1 for level in levels)
    assert 60 <= min(levels) < 65 and 135 < max(levels) <= 140


def test_the_hue_turns_and_comes_round():
    red, policy = Image.new("RGB", (4, 4), (255, 0, 0)), ImagePolicy(4)
    rng = np.random.default_rng(0)
    seen = torch.stack([augment(red, policy, Augment(hue=0.5), rng)[:, 0, 0] for _ in range(300)])
    assert (seen.max(1).values == 255).all() and (seen.min(1).values == 0).all()  # as bright and as pure as before
    assert all((seen[:, channel] == 255).float().mean() > 0.2 for channel in range(3))
    near = torch.stack([augment(red, policy, Augment(hue=0.1), rng)[:, 0, 0] for _ in range(300)])
    assert (near[:, 0] == 255).all() and 100 < near[:, 1:].max() <= 160  # a tenth of a turn towards green or blue
    gray = Image.new("RGB", (4, 4), (90, 90, 90))
    assert torch.equal(augment(gray, policy, Augment(hue=0.5), rng), preprocess(gray, policy))


def test_blur_is_of_the_finished_square_and_keeps_the_mean():
    image, policy = noise(64, 48), ImagePolicy(32)
    change = Augment(blur_rate=1.0, blur_sigma=(1.0, 1.0))
    found = augment(image, policy, change, np.random.default_rng(0))
    square = Image.fromarray(preprocess(image, policy).permute(1, 2, 0).numpy())
    expected = torch.from_numpy(np.array(square.filter(ImageFilter.GaussianBlur(1.0)))).permute(2, 0, 1)
    assert torch.equal(found, expected)
    assert found.float().std() < 0.6 * preprocess(image, policy).float().std()
    assert found.float().mean() == pytest.approx(preprocess(image, policy).float().mean().item(), abs=1)


def test_jitter_and_blur_have_rates():
    image, policy = noise(8, 8), ImagePolicy(8)
    rng, plain = np.random.default_rng(0), preprocess(image, policy)
    for change, rate in (
        (Augment(jitter=0.4, hue=0.1, jitter_rate=0.8), 0.8),
        (Augment(hue=0.3, jitter_rate=0.8), 0.8),
        (Augment(blur_rate=0.5, blur_sigma=(1.0, 2.0)), 0.5),
    ):
        changed = sum(int(not torch.equal(augment(image, policy, change, rng), plain)) for _ in range(1000))
        assert changed == pytest.approx(1000 * rate, abs=4 * (1000 * rate * (1 - rate)) ** 0.5 + 5)


def test_what_is_off_draws_nothing():
    streams = []
    for change in (Augment(), Augment(jitter_rate=1.0, blur_rate=0.0, blur_sigma=(3.0, 4.0))):
        rng = np.random.default_rng(0)
        augment(noise(8, 8), ImagePolicy(8), change, rng)
        streams.append(rng.random())
    assert streams[0] == streams[1] == np.random.default_rng(0).random(3)[2]  # one for the flip, one for gray


def test_rates_are_rates():
    image, policy = Image.new("RGB", (8, 8)), ImagePolicy(8)
    image.paste((255, 0, 0), (0, 0, 4, 8))
    rng = np.random.default_rng(0)
    views = [augment(image, policy, Augment(flip_rate=0.3, gray_rate=0.2), rng) for _ in range(1000)]
    flipped = sum(int(view[0, 0, 0] == 0) for view in views)
    gray = sum(int(torch.equal(view[0], view[1])) for view in views)
    assert flipped == pytest.approx(300, abs=60) and gray == pytest.approx(200, abs=52)  # four standard deviations


@pytest.mark.parametrize("crop_scale", [(1.0, 1.0), (0.2, 0.6)])
def test_a_view_of_another_size_is_that_of_a_policy_of_that_size(crop_scale):
    change = Augment(crop_scale=crop_scale, size=12)
    found = augment(noise(50, 40), ImagePolicy(16), change, np.random.default_rng(0))
    expected = augment(noise(50, 40), ImagePolicy(12), replace(change, size=None), np.random.default_rng(0))
    assert found.shape == (3, 12, 12) and torch.equal(found, expected)


def test_equal_generators_give_equal_views():
    change = Augment(crop_scale=(0.2, 1), flip_rate=0.5, jitter=0.5, hue=0.2, gray_rate=0.3, blur_rate=0.5)
    views = [augment(noise(50, 40), ImagePolicy(16), change, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 2000),
    st.integers(1, 2000),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    st.tuples(st.floats(0.25, 4), st.floats(0.25, 4)),
    st.integers(0, 2**32),
)
def test_a_random_box_is_inside_with_area_and_ratio_in_range(width, height, scale, ratio, seed):
    (low, high), (narrow, wide) = sorted(scale), sorted(ratio)
    change = Augment(crop_scale=(low, high), crop_ratio=(narrow, wide))
    x0, y0, x1, y1 = random_box((width, height), change, np.random.default_rng(seed))
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    w, h = x1 - x0, y1 - y0
    share, found = w * h / (width * height), w / h
    assert share <= high * (1 + 1e-6)
    if w < width * (1 - 1e-9) and h < height * (1 - 1e-9):  # it was not shrunk
        assert low * (1 - 1e-6) <= share and narrow * (1 - 1e-6) <= found <= wide * (1 + 1e-6)


def test_boxes_are_spread_evenly():
    rng = np.random.default_rng(0)
    change = Augment(crop_scale=(0.25, 0.64), crop_ratio=(1 / 1.5, 1.5))
    boxes = np.array([random_box((100, 100), change, rng) for _ in range(4000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (w * h / 1e4).mean() == pytest.approx(0.445, abs=0.008)  # uniform in area
    assert np.log(w / h).mean() == pytest.approx(0, abs=0.016)  # as often wide as tall
    assert np.abs(np.log(w / h)).max() > math.log(1.45)
    assert (boxes[:, 0] / (100 - w)).mean() == pytest.approx(0.5, abs=0.02)  # as often left as right
    assert (boxes[:, 1] / (100 - h)).mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("size", [(37, 53), (53, 37), (31, 31), (224, 101)])
def test_uncut_keeps_all_of_an_image(size):
    image = noise(*size)
    found = uncut(image, ImagePolicy(32, resize="squash", crop_fraction=0.5))
    short = Resize(32, InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(found, PILToTensor()(short(image)))
    square = preprocess(image, ImagePolicy(32))
    left, top = (round((side - 32) / 2) for side in reversed(found.shape[1:]))
    assert torch.equal(found[:, top : top + 32, left : left + 32], square)


def test_uncut_refuses_a_thread():
    with pytest.raises(ImageError, match="becomes 64 x 640000000; at most"):
        uncut(Image.new("RGB", (1, 10_000_000)), ImagePolicy(64))


@pytest.mark.parametrize(
    ("field", "value", "needed"),
    [
        ("size", 0, "a side of 1 pixel or more"),
        ("size", -64, "a side of 1 pixel or more"),
        ("crop_fraction", 0.0, "a share above 0 and at most 1"),
        ("crop_fraction", 87.5, "a share above 0 and at most 1"),
        ("std", (0.2, 0.0, 0.2), "numbers above 0"),
        ("background", (0, 0, 256), "levels from 0 to 255"),
    ],
)
def test_policies_that_cannot_work_are_refused(field, value, needed):
    with pytest.raises(ConfigError, match=rf"ImagePolicy\.{field} is to be {needed}, not {re.escape(str(value))}"):
        ImagePolicy(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "needed"),
    [
        *(("crop_scale", value, "two shares above 0.*smaller first") for value in ((0.5, 1.5), (1.0, 0.5), (0.0, 1.0))),
        *(("crop_ratio", value, "two numbers above 0.*smaller first") for value in ((0.0, 1.0), (1.5, 0.75))),
        *((name, value, "from 0 to 1") for name in ("flip_rate", "jitter_rate", "gray_rate") for value in (-0.1, 1.1)),
        *(("blur_rate", value, "from 0 to 1") for value in (-0.1, 50, math.nan)),
        ("jitter", 1.5, "from 0 to 1"),
        ("hue", 0.6, r"from 0 to 0\.5"),
        *(("blur_sigma", value, "two numbers of 0 or more") for value in ((-1.0, 1.0), (2.0, 1.0))),
        ("size", 0, "a side of 1 pixel or more, or None"),
    ],
)
def test_changes_that_cannot_work_are_refused(field, value, needed):
    with pytest.raises(ConfigError, match=rf"Augment\.{field} is to be {needed}.*not {re.escape(str(value))}"):
        Augment(**{field: value})


def test_the_ends_of_every_range_are_allowed():
    ImagePolicy(size=1, crop_fraction=1.0, background=(0, 255, 0))
    rates = dict.fromkeys(("flip_rate", "jitter", "jitter_rate", "gray_rate", "blur_rate"), 1.0)
    Augment(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hue=0.5, blur_sigma=(0.0, 0.0), size=1, **rates)
