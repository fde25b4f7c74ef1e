import pytest
import torch

from diptych.models.tiles import Tiles


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
