import json

import numpy as np
import pytest
from PIL import Image

from diptych.data.class_masks import UNKNOWN, class_map, class_masks, shown_classes
from diptych.data.images import decode
from diptych.data.scenes import SceneConfig, scenes
from diptych.data.sources import Listed, open_source
from diptych.errors import DataError
from diptych.types import Sample


@pytest.fixture
def bundles(tmp_path, monkeypatch):
    """Make two tiny bundles of the form of the real ones."""
    monkeypatch.setenv("DIPTYCH_DATA", str(tmp_path))
    for name in ("camvid", "coco-mini"):
        for part in ("images", "masks"):
            (tmp_path / name / part).mkdir(parents=True)
    street = np.array([[0, 0, 2], [2, 11, 2]], dtype=np.uint8)
    things = np.array([[0, 5, 5], [90, 255, 0]], dtype=np.uint8)
    for name, mask in (("camvid", street), ("coco-mini", things)):
        Image.fromarray(mask).save(tmp_path / name / "masks" / "a.png")
        Image.new("RGB", (3, 2)).save(tmp_path / name / "images" / "a.jpg")
    (tmp_path / "camvid" / "labels.csv").write_text("image,mask,split\nimages/a.jpg,masks/a.png,train\n")
    (tmp_path / "camvid" / "classes.json").write_text('{"0": "sky", "1": "car", "2": "road", "11": "unlabelled"}')
    (tmp_path / "coco-mini" / "boxes.json").write_text(json.dumps([{"image": "images/a.jpg", "mask": "masks/a.png"}]))
    (tmp_path / "coco-mini" / "classes.json").write_text('{"5": "airplane", "90": "toothbrush"}')
    return tmp_path


def test_every_pixel_of_a_street_has_a_class_or_nobody_knows(bundles):
    (sample,) = open_source("camvid-classes")
    assert [shown.phrase for shown in sample.regions] == ["sky", "road"]
    assert sample.mask.tolist() == [[1, 1, 2], [2, 255, 2]] and sample.regions[0].box == (0, 0, 2, 1)
    found = class_map(sample, ("car", "road", "sky"), background=False)
    assert found.tolist() == [[2, 2, 1], [1, UNKNOWN, 1]]
    assert class_map(sample, ("road",), background=True).tolist() == [[0, 0, 1], [1, UNKNOWN, 1]]


def test_objects_have_a_background(bundles):
    (sample,) = class_masks("coco-classes")
    assert sample.mask.tolist() == [[0, 1, 1], [2, 255, 0]]
    assert class_map(sample, ("toothbrush", "dog"), background=True).tolist() == [[0, 0, 0], [1, UNKNOWN, 0]]
    assert class_map(sample, ("airplane",), background=False).tolist() == [[-1, 0, 0], [-1, -1, -1]]
    assert shown_classes(class_masks("coco-classes")) == ("airplane", "toothbrush")


def test_halves_share_nothing(bundles):
    parts = [len(open_source(f"coco-classes:{part}")) for part in ("validation", "test")]
    assert sorted(parts) == [0, 1]


@pytest.mark.parametrize(
    ("name", "split", "complaint"), [("camvid-classes", "x", "no split"), ("y", None, "no bundle")]
)
def test_wrong_names(bundles, name, split, complaint):
    with pytest.raises(DataError, match=complaint):
        class_masks(name, split)


def test_sources_without_regions_have_no_classes():
    with pytest.raises(DataError, match="Name labels"):
        shown_classes(Listed([Sample("a", None, (), "a")]))


def test_scenes_are_known_by_their_nouns():
    source = scenes("test", count=6, config=SceneConfig(nouns=4, things=(2, 2), tint_rate=1.0))
    names = shown_classes(source)
    assert set(names) <= {"cat", "dog", "horse", "cow"}
    for sample in source:
        labels = class_map(sample, names, background=True)
        for number, shown in enumerate(sample.regions, 1):
            assert (labels[sample.mask == number] == 1 + names.index(shown.attributes["noun"])).all()
        assert ((labels == 0) == (sample.mask == 0)).all()


@pytest.mark.data
@pytest.mark.parametrize(("name", "count", "classes"), [("camvid-classes", 285, 11), ("coco-classes", 231, 80)])
def test_the_real_bundles(data, name, count, classes):
    source = open_source(name)
    assert len(source) == count and len(source.classes) == classes
    sample = source[3]
    assert decode(sample.image).size == sample.mask.shape[::-1] and sample.regions
    assert len(open_source(f"{name}:validation")) + len(open_source(f"{name}:test")) == count
