from itertools import pairwise

import pytest
import torch

from diptych.errors import ConfigError
from diptych.models.tiles import Tiles, Windows, resized_for_windows, upsampled, whole


def test_a_square_is_one_tile():
    image = torch.rand(2, 3, 6, 6)
    assert Tiles(6, 6).corners == ((0, 0),)
    assert torch.equal(Tiles(6, 6).cut(image)[0], image)
    assert torch.equal(Tiles(6, 6).merge(image[:1]), image[0])


@pytest.mark.parametrize(("height", "width"), [(6, 7), (6, 12), (6, 13), (20, 6)])
def test_tiles_cover_the_image_and_come_together_again(height, width):
    tiles, image = Tiles(height, width), torch.rand(2, height, width)
    parts = tiles.cut(image)
    assert parts.shape == (-(-max(height, width) // 6), 2, 6, 6)
    torch.testing.assert_close(tiles.merge(parts), image)


def test_overlaps_are_averaged():
    tiles = Tiles(2, 3)
    assert tiles.corners == ((0, 0), (0, 1))
    merged = tiles.merge(torch.stack([torch.zeros(2, 2), torch.ones(2, 2)]))
    assert merged.tolist() == [[0, 0.5, 1]] * 2


def test_the_official_tiles(golden):
    case = {name: torch.from_numpy(value) for name, value in golden("anovl", "tiling").items()}
    tiles = Tiles(*case["image"].shape[-2:])
    assert torch.equal(tiles.cut(case["image"][0]), case["tiles"])
    torch.testing.assert_close(tiles.merge(case["tile_maps"]), case["merged"][0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("height", "width", "stride"), [(6, 6, 6), (6, 13, 4), (17, 9, 5), (12, 12, 6)])
def test_windows_cover_everything_and_come_together_again(height, width, stride):
    windows, image = Windows(height, width, 6, stride), torch.rand(2, height, width)
    torch.testing.assert_close(windows.merge(windows.cut(image)), image)
    rows = sorted({y for y, _ in windows.corners})
    assert rows[0] == 0 and rows[-1] == height - 6 and all(0 < b - a <= stride for a, b in pairwise(rows))
    assert list(windows.corners) == sorted(windows.corners)


def test_one_window_is_the_image():
    windows, image = Windows(6, 6, 6, 3), torch.rand(3, 6, 6)
    assert windows.corners == ((0, 0),) and torch.equal(windows.merge(windows.cut(image)), image)


@pytest.mark.parametrize(("side", "stride"), [(7, 3), (4, 5), (4, 0)])
def test_windows_that_do_not_fit(side, stride):
    with pytest.raises(ConfigError, match="0 < stride <= side"):
        Windows(6, 9, side, stride)


@pytest.mark.parametrize("fine", [1, 3])
def test_windows_of_an_image_are_windows_of_its_maps(fine):
    """A number per patch, repeated `fine` times along it, is cut as the image is."""
    windows, patches = Windows(24, 40, 16, 12), torch.rand(6, 10)
    image, maps = (patches.repeat_interleave(n, 0).repeat_interleave(n, 1) for n in (4, fine))
    of_maps = windows.of_maps(4, fine)
    expected = windows.cut(image)[:, ::4, ::4].repeat_interleave(fine, 1).repeat_interleave(fine, 2)
    assert torch.equal(of_maps.cut(maps), expected)


def test_images_are_resized_to_whole_patches_and_at_least_a_window():
    assert [whole(length, 8) for length in (0.5, 8, 8.1, 106.7)] == [8, 8, 16, 112]
    image = torch.full((3, 100, 30), 77, dtype=torch.uint8)
    resized = resized_for_windows(image, short_side=32, long_side=2048, side=24, patch=8)
    assert resized.shape == (3, 112, 32) and (resized == 77).all()  # 106.7 is 14 whole patches
    assert resized_for_windows(image, short_side=32, long_side=40, side=24, patch=8).shape == (3, 40, 24)
    step = torch.zeros(1, 8, 8, dtype=torch.uint8)
    step[..., 4:] = 255
    assert resized_for_windows(step, short_side=8, long_side=8, side=8, patch=8).equal(step)


def test_values_of_patches_are_spread_from_corner_to_corner():
    values = torch.tensor([[[0.0], [2.0], [4.0], [6.0]]])  # 2 x 2 patches of one tile of 3 x 3 pixels
    assert upsampled(values, (2, 2), Tiles(3, 3)).tolist() == [[[0.0, 1.0, 2.0], [2.0, 3.0, 4.0], [4.0, 5.0, 6.0]]]
    wide = upsampled(torch.tensor([[[1.0]], [[3.0]]]), (1, 1), Tiles(2, 3))  # two tiles that share a column
    assert wide.tolist() == [[[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]]
