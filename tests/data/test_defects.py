import numpy as np
import pytest

from diptych.data.defects import DEFECTS, defects
from diptych.data.images import decode
from diptych.data.sources import open_source
from diptych.errors import DataError


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "samples", "faulty"), [("magnetic-tile", 737, 234), ("road-cracks", 438, 351), ("pcb-pairs", 320, 160)]
)
def test_every_bundle_with_masks(data, name, samples, faulty):
    source = open_source(name)
    assert len(source) == samples and len({sample.key for sample in source}) == samples
    marked = 0
    for sample in source:
        if sample.mask is None:  # faulty, and nobody marked where
            assert name == "magnetic-tile" and sample.label == "uneven"
            continue
        assert sample.mask.dtype == np.uint8 and sample.mask.shape == decode(sample.image).size[::-1]
        assert (sample.label == "free") == (not sample.mask.any()) == (not sample.regions)
        for number, region in enumerate(sample.regions, 1):
            x0, y0, x1, y1 = map(int, region.box)
            assert (sample.mask[y0:y1, x0:x1] > 0).any() and number <= int(sample.mask.max())
        marked += sample.mask.any()
    assert marked == faulty


@pytest.mark.data
@pytest.mark.parametrize("name", DEFECTS)
def test_photos_of_one_thing_are_in_one_split(data, name):
    whole, parts = defects(name), [defects(name, split) for split in ("validation", "test")]
    assert sum(map(len, parts)) == len(whole)
    groups = [{photo.group for photo in part.photos} for part in parts]
    assert not groups[0] & groups[1]
    assert all(0.3 < len(part) / len(whole) < 0.7 for part in parts)


@pytest.mark.data
def test_masks_lie_where_the_tables_say(data):
    tile = next(sample for sample in defects("magnetic-tile") if sample.key == "images/blowhole_exp6_num_51771.jpg")
    assert (
        tile.mask.sum() == 47 and tile.label == "blowhole" and tile.domain == "magnetic tile" and tile.group == "51771"
    )
    assert tile.regions[0].phrase == "blowhole"
    board = defects("pcb-pairs")[0]
    assert {region.phrase for region in board.regions} <= {
        "open",
        "short",
        "mousebite",
        "spur",
        "spurious copper",
        "pin-hole",
    }


def test_what_is_not_there():
    with pytest.raises(DataError, match=r"no bundle with masks of faults 'pcb'.*pcb-pairs"):
        defects("pcb")
    with pytest.raises(DataError, match="magnetic-tile has no split 'train'"):
        defects("magnetic-tile", "train")
