from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from diptych.data.bundles import BUNDLES, bundle, class_names, half, prompts_of
from diptych.data.columns import Columns
from diptych.data.images import decode
from diptych.data.sources import from_table, open_source
from diptych.errors import ColumnError, DataError


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Put a bundle of four rows where DIPTYCH_DATA points."""
    (tmp_path / "clothing").mkdir()
    rows = ["image,label,split", "1.jpg,shoe,train", "2.jpg,hat,train", "3.jpg,hat,test", "4.jpg,bag,test"]
    (tmp_path / "clothing" / "labels.csv").write_text("\n".join(rows))
    for number in range(1, 5):
        (tmp_path / "clothing" / f"{number}.jpg").write_bytes(b"picture %d" % number)
    monkeypatch.setenv("DIPTYCH_DATA", str(tmp_path))


def test_a_part_by_name(small):
    for source in (bundle("clothing", "test"), open_source("clothing:test"), open_source("clothing", split="test")):
        assert source.name == "clothing:test"
        assert [(source[i].label, source[i].image) for i in range(2)] == [("hat", b"picture 3"), ("bag", b"picture 4")]
        assert source.notes[0] == "Bundle clothing: CC0 1.0 (public domain)."


def test_class_names(small):
    assert class_names(bundle("clothing")) == ("bag", "hat", "shoe")
    with pytest.raises(DataError, match=r"captions has no labels"):
        class_names(from_table(pa.table({"caption": ["a"]}), Path(), "captions"))


@pytest.mark.parametrize(
    ("source", "prompts"),
    [("pacs:train", "style"), ("nwpu-resisc12", "overhead"), ("flickr8k-1k:test", "photo"), ("my photos", "photo")],
)
def test_prompts_suit_the_source(source, prompts):
    assert prompts_of(source) == prompts


def test_columns_in_place_of_its_own(small):
    source = open_source("clothing:train", columns=Columns(texts=("label",), split="split"))
    assert source.texts(0)[0].role == "caption"


def test_errors(small, monkeypatch):
    with pytest.raises(DataError, match=r"no bundle 'clothings'. Did you mean 'clothing'"):
        bundle("clothings")
    with pytest.raises(DataError, match=r"No row has 'dev' in column 'split'. Known: test, train."):
        bundle("clothing", "dev")
    with pytest.raises(DataError, match=r"pacs has no labels.csv; DIPTYCH_DATA must name the folder"):
        bundle("pacs")
    monkeypatch.delenv("DIPTYCH_DATA")
    with pytest.raises(DataError, match=r"DIPTYCH_DATA is unset"):
        open_source("clothing")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "samples", "classes"),
    [
        ("brain-92-objects", 92, 6),
        ("camvid", 285, 0),
        ("chest-radiographs", 253, 0),
        ("cifar10", 3000, 10),
        ("clothing", 786, 10),
        ("coco-mini", 175, 0),
        ("flickr8k-1k", 700, 0),
        ("imagenet-1k-samples", 650, 649),  # two classes share a name
        ("magnetic-tile", 737, 6),
        ("nwpu-resisc12", 840, 12),
        ("oasis-affect", 473, 0),
        ("omniglot", 1360, 5),
        ("pacs", 1120, 7),
    ],
)
def test_every_bundle(data, name, samples, classes):
    source = open_source(name)
    assert len(source) == samples
    assert len({source[i].key for i in range(samples)}) == samples
    assert all(min(decode(source[i].image).size) >= 16 for i in (0, samples // 2, samples - 1))
    if classes:
        assert len(class_names(source)) == classes


def test_every_bundle_is_tested():
    listed = {parameters[0] for parameters in test_every_bundle.pytestmark[0].args[1]}
    assert listed == set(BUNDLES)


@pytest.mark.data
def test_what_is_in_them(data):
    assert [len(bundle("flickr8k-1k", part)) for part in ("train", "dev")] == [600, 100]
    captions = bundle("flickr8k-1k", "dev")
    assert Counter(len(captions.texts(i)) for i in range(100)) == {5: 100}
    pacs = bundle("pacs")
    found = Counter((pacs[i].domain, pacs[i].label) for i in range(len(pacs)))
    assert len(found) == 28 and set(found.values()) == {40}
    chest = bundle("chest-radiographs")
    assert chest[0].group == chest[1].group == chest[2].group == "p0716d970"
    with pytest.raises(ColumnError, match=r"no column tells parts apart"):
        bundle("pacs", "train")


def test_halves_are_all_together_and_keep_what_belongs_together():
    items = [f"{thing}-{photo}" for thing in range(40) for photo in range(3)]
    halves = {split: half(items, "things", split, lambda item: item.split("-")[0]) for split in ("validation", "test")}
    assert [name for _, name in halves.values()] == ["things:validation", "things:test"]
    first, second = ({item.split("-")[0] for item in found} for found, _ in halves.values())
    assert not first & second and len(first) > 5 and len(second) > 5
    assert sorted(halves["validation"][0] + halves["test"][0]) == sorted(items)
    alone, _ = half(items[:3], "things", "test", lambda item: item.split("-")[0])
    assert alone == (items[:3] if "0" in second else [])  # whatever the others are
    assert half(items, "things", None, str) == (items, "things")
    with pytest.raises(DataError, match="things has no split 'train'"):
        half(items, "things", "train", str)
