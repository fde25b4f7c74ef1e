import io
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from diptych.data.columns import Columns
from diptych.data.images import decode
from diptych.data.order import Ordered, per_group
from diptych.data.sources import (
    AbstractSource,
    Joined,
    Listed,
    Subset,
    WithChances,
    describe,
    expand_braces,
    from_datasets,
    from_table,
    open_source,
)
from diptych.errors import ColumnError, DataError, ImageError, MissingExtraError
from diptych.types import Sample, Text

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def png(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Return a folder of three pictures."""
    for name, colour in (("r.png", RED), ("g.png", GREEN), ("b.png", BLUE)):
        (tmp_path / name).write_bytes(png(colour))
    return tmp_path


def colours(source: AbstractSource) -> list[tuple[int, ...]]:
    return [decode(source[i].image).getpixel((0, 0)) for i in range(len(source))]


def captions(source: AbstractSource) -> list[list[str]]:
    return [[text.text for text in source.texts(i)] for i in range(len(source))]


def test_folder_of_pairs(pairs):
    (pairs / "r.txt").write_text("red\nrot")
    (pairs / "b.txt").write_text("blue")
    source = open_source(pairs)
    assert (source.name, captions(source), colours(source)) == (
        pairs.name,
        [["blue"], [], ["red", "rot"]],
        [BLUE, GREEN, RED],
    )
    assert source.notes == (
        "Images with text files of the same name: 2 of 3 have one.",
        "Columns: image = 'image', texts = ('caption',).",
        "1 of 3 samples have no text in caption.",
    )


def test_csv_with_odd_names(pairs):
    (pairs / "data.csv").write_text("nr,bild,was\n1,r.png,a red square picture\n2,b.png,a blue square picture\n")
    source = open_source(pairs / "data.csv")
    assert source[1] == Sample("b.png", png(BLUE), (Text("a blue square picture"),), group="b.png")
    assert source.notes == ("Columns: image = 'bild', texts = ('was',).",)


def test_one_caption_per_line(pairs):
    lines = ["image,caption", "r.png,one", "b.png,two", "r.png,three", "r.png,", ",text alone"]
    (pairs / "captions.csv").write_text("\n".join(lines))
    source = open_source(pairs)
    assert captions(source) == [["one", "three"], ["two"], ["text alone"]]
    assert [source[i].key for i in range(3)] == ["r.png", "b.png", "row-2"]
    assert source[2].image is None
    assert "5 rows name 3 images: rows with one image are its several captions." in source.notes


def test_parts_of_a_path(pairs):
    path = pairs / "x.jsonl"
    path.write_text(
        '{"image": "r.png", "split": "train", "text": "red"}\n{"image": "g.png", "split": "val", "text": "green"}'
    )
    for source in (open_source(f"{path}:val"), open_source(path, split="val")):
        assert (source.name, captions(source)) == ("x.jsonl:val", [["green"]])
    assert "All parts of column 'split' are read (train, val); name one with `name:split`." in open_source(path).notes
    with pytest.raises(DataError, match=r"No row has 'test' in column 'split'"):
        open_source(f"{path}:test")


@pytest.mark.parametrize("image", ["bytes", "struct", "paths"])
def test_parquet(pairs, image):
    cells = {
        "bytes": [png(RED), png(BLUE)],
        "struct": [{"bytes": png(RED), "path": None}, {"bytes": None, "path": "b.png"}],
        "paths": ["r.png", "b.png"],
    }
    folder = pairs / "shards"
    folder.mkdir()
    table = pa.table({"image": cells[image], "text": [["red", ""], ["blue"]]})
    pq.write_table(table[:1], pairs / "0.parquet")
    pq.write_table(table, pairs / "x.parquet")
    assert colours(open_source(pairs / "x.parquet")) == [RED, BLUE]
    joined = open_source(str(pairs / "*.parquet"))
    assert (colours(joined), captions(joined)) == ([RED, RED, BLUE], [["red"], ["red"], ["blue"]])
    assert len({joined[i].key for i in range(3)}) == 3


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("s-{008..011}.tar", ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]),
        ("{0..1}/{train,val}-{9..10}", [f"{n}/{part}-{k}" for n in "01" for part in ("train", "val") for k in (9, 10)]),
        ("a{,b}", ["a", "ab"]),
        ("{a}-{}-{1..}", ["{a}-{}-{1..}"]),
        ("{2..1}", []),
    ],
)
def test_braces_are_a_shell_s(pattern, names):
    assert expand_braces(pattern) == names


def test_shards_named_by_a_range(pairs):
    for number in range(3):
        table = pa.table({"image": [f"{'rgb'[number]}.png"], "text": [f"t{number}"], "split": ["train"]})
        pq.write_table(table, pairs / f"x-{number:03}.parquet")
    source = open_source(f"{pairs}/x-{{000..001}}.parquet:train")
    assert captions(source) == [["t0"], ["t1"]]
    assert captions(open_source(f"{pairs}/x-{{002,000}}.parquet")) == [["t2"], ["t0"]]
    assert captions(open_source(f"{pairs}/x-*{{1,2}}.parquet:train")) == [["t1"], ["t2"]]
    with pytest.raises(DataError, match=r"stands for 5 names, of which 2 are not there: .*x-003.parquet, .*x-004"):
        open_source(f"{pairs}/x-{{000..004}}.parquet")
    with pytest.raises(DataError, match=r"There is no file or folder .*y-\{0\.\.4\}"):
        open_source(f"{pairs}/y-{{0..4}}.parquet")
    (pairs / "{0..1}.csv").write_text("image,caption\nr.png,a file with braces\n")
    assert captions(open_source(pairs / "{0..1}.csv")) == [["a file with braces"]]


def test_roles_languages_and_scripts(pairs):
    row = {
        "image": "r.png",
        "caption": "red 🟥",
        "caption_he": "אדום",
        "text_ar": ["أحمر", "  ", None],
        "negative": "not red",
    }
    source = from_table(pa.table({name: [value] for name, value in row.items()}), pairs, "x")
    assert source.texts(0) == (
        Text("red 🟥"),
        Text("אדום", "translation", "he"),
        Text("أحمر", "translation", "ar"),
        Text("not red", "hard_negative"),
    )


def test_a_language_per_row_and_a_translation_alone(pairs):
    table = pa.table({"image": ["r.png", "b.png"], "text": ["rouge", "blau"], "lang": ["fr", "de"]})
    assert from_table(table, pairs, "x").texts(1) == (Text("blau", "caption", "de"),)
    table = pa.table({"image": ["r.png"], "text_fr": ["rouge"]})
    assert from_table(table, pairs, "x").texts(0) == (Text("rouge", "caption", "fr"),)


def test_labels_stand_in_for_texts(pairs):
    table = pa.table({"image": ["r.png"], "label": ["fire_truck"], "domain": ["photo"], "group": [7]})
    assert from_table(table, pairs, "x")[0] == Sample(
        "r.png", png(RED), (Text("fire truck", "label"),), group="7", label="fire_truck", domain="photo"
    )


def test_missing_images_are_found_out_on_reading(pairs):
    table = pa.table({"image": ["r.png", "absent.png", "nul\0.png"], "caption": ["a", "b", "c"]})
    source = from_table(table, pairs, "x")
    assert source.texts(1) == (Text("b"),)
    for index in (1, 2):
        with pytest.raises(ImageError, match=r"cannot be read: .*Correct the path or drop the row"):
            source[index]
    with pytest.raises(ImageError, match=str(pairs / "absent.png")):
        source[1]


def test_addresses(pairs):
    table = pa.table({"url": [(pairs / "r.png").as_uri(), "memory://absent.png"], "caption": ["a", "b"]})
    source = from_table(table, pairs, "x")
    assert source[0].image == png(RED)
    with pytest.raises(ImageError, match=r"memory://absent.png cannot be read"):
        source[1]


def test_columns_override(pairs):
    table = pa.table({"image": ["wrong.png"], "other": ["r.png"], "caption": ["a"], "remark": ["b"]})
    source = from_table(table, pairs, "x", columns=Columns(image="other", texts=("remark",)))
    assert (source[0].image, source.texts(0)) == (png(RED), (Text("b"),))
    with pytest.raises(ColumnError, match=r"no column 'capt'. Did you mean 'caption'"):
        from_table(table, pairs, "x", columns=Columns(texts=("capt",)))


def test_pickled_and_read_by_workers(pairs):
    (pairs / "labels.csv").write_text("image,label\nr.png,red\ng.png,green\nb.png,blue\n")
    source = open_source(pairs)
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in range(3)] == [source[i] for i in range(3)]
    loader = DataLoader(source, batch_size=None, num_workers=2, sampler=[2, 0, 1])
    assert [sample.label for sample in loader] == ["blue", "red", "green"]


def test_subset_and_joined(pairs):
    first = from_table(pa.table({"image": ["r.png", "g.png"], "caption": ["a", "b"]}), pairs, "one", notes=("N.",))
    second = from_table(pa.table({"image": ["r.png"], "caption": ["c"]}), pairs, "two")
    part = Subset(first, [1], "part")
    assert (len(part), part[0], part.texts(0), part.notes) == (1, first[1], first.texts(1), first.notes)
    both = Joined([first, second])
    assert (len(both), both.name, captions(both)) == (3, "one+two", [["a"], ["b"], ["c"]])
    assert [both[i].key for i in range(3)] == ["one/r.png", "one/g.png", "two/r.png"]
    assert both[2].group == "two/r.png"


def test_sources_of_one_name_stay_apart(drawings):
    first, second = drawings(2), drawings(3)
    both = Joined([first, second, first, drawings(1)])
    names = [
        "drawings",
        "drawings",
        "drawings (2)",
        "drawings (2)",
        "drawings (2)",
        "drawings",
        "drawings",
        "drawings (3)",
    ]
    for row, (name, own) in enumerate(zip(names, [0, 1, 0, 1, 2, 0, 1, 0], strict=True)):
        assert both[row].key == both.without_image(row).group == f"{name}/s{own}"


def test_a_source_with_an_order_is_not_joined(drawings):
    ordered = Ordered(drawings(4), lambda rng: rng.permutation(4))
    with pytest.raises(
        DataError, match=r"epochs of drawings follow an order of their own.*Join the sources first and order"
    ):
        Joined([drawings(2), ordered])
    joined = per_group(Joined([grouped(drawings(4)), grouped(drawings(2))]), 2)
    runs = joined.order(np.random.default_rng(0)).reshape(-1, 2).tolist()
    assert sorted(map(sorted, runs)) == [[0, 1], [2, 3], [4, 5]]


def grouped(source: Listed) -> Listed:
    """Return samples of which every two are a group."""
    return Listed([replace(sample, group=f"g{row // 2}") for row, sample in enumerate(source)], "grouped")


def test_plus_joins(pairs):
    for name in ("a", "b"):
        (pairs / f"{name}.csv").write_text(f"image,caption,split\nr.png,{name},train\ng.png,no,test\n")
    source = open_source(f"{pairs / 'a.csv'}:train+{pairs / 'b.csv'}:train")
    assert captions(source) == [["a"], ["b"]]
    again = open_source(f"{pairs / 'a.csv'}:train+{pairs / 'a.csv'}:train")
    assert again[0].key == again[1].key  # the same samples twice
    (pairs / "a+b.csv").write_text("image,caption\nr.png,a file with a plus\n")
    assert captions(open_source(pairs / "a+b.csv")) == [["a file with a plus"]]


def test_fingerprint_follows_the_texts(pairs):
    one, same, other = (from_table(pa.table({"caption": [t]}), pairs, "x").fingerprint for t in ("a b", "a b", "a c"))
    assert one == same != other


@pytest.mark.parametrize(
    "changed",
    [
        {"key": "other"},
        {"texts": (Text("a dog", "synthetic"),)},
        {"texts": (Text("a dog", "caption", "de"),)},
        {"texts": (Text("a"), Text("dog"))},
        {"group": "other"},
        {"label": "dog"},
        {"domain": "photo"},
    ],
)
def test_fingerprint_follows_all_but_the_images(changed):
    first, second = Sample("a", None, (Text("a dog"),), "a"), Sample("b", None, (), "b")
    whole = Listed([first, second]).fingerprint
    assert whole == Listed([replace(first, image=b"pixels"), second]).fingerprint
    assert whole != Listed([replace(first, **changed), second]).fingerprint
    moved = [replace(first, texts=()), replace(second, texts=first.texts)]  # a text that goes to its neighbour
    assert whole != Listed(moved).fingerprint


def test_describe(pairs):
    table = pa.table(
        {"image": ["r.png", "gone.png", None, "b.png"], "caption": [["x" * 200, "y"], ["dog"], [], ["unseen"]]}
    )
    *said, first, second, third = describe(from_table(table, pairs, "pets"))
    assert said[:3] == [
        "pets: 4 samples.",
        "Columns: image = 'image', texts = ('caption',).",
        "1 of 4 samples have no text in caption.",
    ]
    assert first == f"  sample 0: an image of 2 x 2 pixels, '{'x' * 99}…' as caption (and 1 more)"
    assert second.startswith("  sample 1: an image that cannot be read (") and second.endswith("), 'dog' as caption")
    assert third == "  sample 2: no image, no text"


@pytest.mark.parametrize("spec", ["absent.csv", "some/folder", "shards/*.tar", "", "a.csv:train"])
def test_nothing_there(spec):
    with pytest.raises(DataError, match=r"There is no file or folder"):
        open_source(spec)


def test_unknown_name():
    with pytest.raises(DataError, match=r"Did you mean 'openmoji'"):
        open_source("openmojis")


# The datasets library


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets")


def dataset(datasets):
    features = datasets.Features({
        "image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "blue"]), "text": datasets.Value("string")
    })  # fmt: skip
    rows = {"image": [{"bytes": png(RED)}, {"bytes": png(BLUE)}, {"bytes": b"no image"}], "label": [0, 1, -1]}
    return datasets.Dataset.from_dict({**rows, "text": ["a", "b", None]}, features=features)


def test_datasets_in_memory(datasets):
    source = from_datasets(dataset(datasets).select([1, 0, 2]))
    assert (captions(source), [source[i].label for i in range(3)]) == ([["b"], ["a"], []], ["blue", "red", None])
    assert (source[0].image, source[2].image) == (png(BLUE), b"no image")  # handed over as they are, not decoded


def test_datasets_stay_on_the_disk(datasets, tmp_path):
    images = [{"bytes": bytes([n]) * 20_000} for n in range(60)]
    many = datasets.Dataset.from_dict({"image": images, "text": ["a"] * 60}).cast_column("image", datasets.Image())
    many.save_to_disk(tmp_path / "many")
    source = from_datasets(datasets.load_from_disk(tmp_path / "many").select(range(59, -1, -1)))
    assert source.table.nbytes + len(pickle.dumps(source)) < 30_000
    assert [sample.image[:1] for sample in pickle.loads(pickle.dumps(source))] == [
        bytes([n]) for n in range(59, -1, -1)
    ]
    alone = from_datasets(dataset(datasets).select_columns(["image"]))
    assert [alone[i].image for i in range(3)] == [png(RED), png(BLUE), b"no image"]


def test_datasets_folder(datasets, tmp_path):
    dataset(datasets).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset(datasets), test=dataset(datasets).select([1])).save_to_disk(tmp_path / "parts")
    assert captions(open_source(f"hf:{tmp_path / 'one'}")) == [["a"], ["b"], []]
    assert captions(open_source(f"hf:{tmp_path / 'parts'}:test")) == [["b"]]
    assert captions(open_source(f"hf:{tmp_path / 'parts'}", split="test")) == [["b"]]
    with pytest.raises(DataError, match=r"needs a split, as in hf:.*:train. Known: test, train."):
        open_source(f"hf:{tmp_path / 'parts'}")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"is no folder that `save_to_disk` wrote"):
        open_source(f"hf:{tmp_path / 'none'}")


def test_datasets_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'diptych\[hf\]'"):
        open_source("hf:someone/something")


def test_chances_go_with_their_samples(drawings):
    source = drawings(4)
    drawn = WithChances(source, np.array([0.1, 0.2, 0.3, 1.0]))
    assert drawn[2] == source[2] and drawn.texts(1) == source.texts(1) and len(drawn) == 4
    assert drawn.without_image(0).image is None
    assert source.chances is None and drawn.fingerprint != source.fingerprint
    assert drawn.fingerprint != WithChances(source, np.array([0.1, 0.2, 0.3, 0.9])).fingerprint
    assert Subset(drawn, [3, 0], "some").chances.tolist() == [1.0, 0.1]
    assert Subset(source, [3, 0], "some").chances is None
    assert Joined([Subset(source, [0], "one"), Subset(drawn, [1], "two")]).chances.tolist() == [1.0, 0.2]
    assert Joined([source, source]).chances is None


def test_chances_and_an_order_exclude_each_other(drawings):
    source, chances = drawings(4), np.full(4, 0.5)
    with pytest.raises(
        DataError, match=r"drawings follow an order of their own.*Give chances to the source without it"
    ):
        WithChances(Ordered(source, lambda rng: rng.permutation(4)), chances)
    with pytest.raises(DataError, match=r"grouped draws .* by chance.*leave data\.per_group at 1"):
        per_group(WithChances(grouped(source), chances), 2)


@pytest.mark.parametrize("chances", [[0.5] * 3, [0.5, 1.5, 0, 0], [-0.1, 0, 0, 0], [np.nan, 0, 0, 0]])
def test_chances_that_cannot_be(drawings, chances):
    with pytest.raises(DataError, match=f"4 samples, so it needs as many chances between 0 and 1; {len(chances)} came"):
        WithChances(drawings(4), np.array(chances))
