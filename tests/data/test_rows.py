import pyarrow as pa
import pytest

from diptych.data.columns import Columns
from diptych.data.rows import count_without_text, image_folder, join_captions, only_part, with_keys, without_categories
from diptych.errors import ColumnError, DataError


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_captions_of_one_image_are_joined(kind):
    image = pa.chunked_array([["b", "a", None], ["b", None, "a", "b"]], kind)
    table = pa.table({"n": range(7), "image": image, "caption": pa.array(list("pqrstuv"), kind), "box": [{"x": 1}] * 7})
    found = join_captions(table, Columns(image="image", texts=("caption",)))
    assert found.drop(["box"]).to_pydict() == {
        "n": [0, 1, 2, 4],
        "image": ["b", "a", None, None],
        "caption": [["p", "s", "v"], ["q", "u"], ["r"], ["t"]],
    }
    assert found["box"][0].as_py() == {"x": 1}


@pytest.mark.parametrize(
    "table",
    [
        {"image": ["a", "b"], "caption": ["x", "y"]},
        {"image": ["a", "a"], "caption": [["x"], ["y", "z"]]},
        {"image": [b"a", b"a"], "caption": ["x", "y"]},
    ],
    ids=["no repeats", "lists already", "bytes"],
)
def test_nothing_to_join(table):
    table = pa.table(table)
    assert join_captions(table, Columns(image="image", texts=("caption",))) is table


def test_unique_keys_are_left_alone():
    table = pa.table({"image": ["a", "b"], "id": [2, 1]})
    for given, key in ((Columns(image="image"), "image"), (Columns(image="image", key="id"), "id"), (Columns(), None)):
        assert with_keys(table, given) == (table, Columns(image=given.image, key=key), ())


def test_repeated_and_absent_keys():
    table = pa.table({"id": ["x", None, "x", "x#2", "x", "y", None, "x#2"]})
    found, columns, notes = with_keys(table, Columns(key="id"))
    assert found[columns.key].to_pylist() == ["x", "row-1", "x#2", "x#2#2", "x#3", "y", "row-6", "x#2#3"]
    assert len(notes) == 1 and "'id' repeats or lacks values" in notes[0]


def test_many_repeats_take_linear_time():
    found, columns, _ = with_keys(pa.table({"id": ["x"] * 50_000}), Columns(key="id"))
    assert found[columns.key][49_999].as_py() == "x#50000"


def test_rows_that_share_an_image_are_one_group():
    table = pa.table({"image": ["a", "a", "b"], "label": ["x", "y", "z"]})
    found, columns, _ = with_keys(table, Columns(image="image", label="label"))
    assert columns.group == "image"
    assert found[columns.key].to_pylist() == ["a", "a#2", "b"]


def test_parts():
    table = pa.table({"part": ["train", "test", None, "train"], "n": [0, 1, 2, 3], "fold": [1, 2, 2, 2]})
    assert only_part(table, "part", "train")["n"].to_pylist() == [0, 3]
    assert only_part(table, "fold", "1")["n"].to_pylist() == [0]
    with pytest.raises(
        DataError, match=r"No row has 'trian' in column 'part'. Did you mean 'train'\? Known: test, train."
    ):
        only_part(table, "part", "trian")
    with pytest.raises(ColumnError, match=r"no column tells parts apart"):
        only_part(table, None, "train")


def test_rows_without_text():
    table = pa.table({
        "a": ["x", "", "\u2003 ", None, None, None],
        "b": [[], None, ["", " "], ["", "y"], [None], ["z"]],
        "n": [None, None, None, None, 7, None],
    })  # fmt: skip
    assert count_without_text(table, ("a",)) == 5
    assert count_without_text(table, ("a", "b")) == 3
    assert count_without_text(table, ("a", "b", "n")) == 2


def test_categories_are_spelled_out():
    table = pa.table({"label": pa.array(["dog", "cat", "dog"]).dictionary_encode(), "n": [1, 2, 3]})
    found = without_categories(table)
    assert found.schema.field("label").type == pa.string()
    assert found.to_pydict() == {"label": ["dog", "cat", "dog"], "n": [1, 2, 3]}


def test_images_may_lie_one_folder_below(tmp_path):
    for name in ("Images/a.jpg", "masks/b.jpg", "c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    table = pa.table({"x": [None, "a.jpg"], "y": ["c.jpg", "a.jpg"], "z": ["absent.jpg", "a.jpg"], "w": [b"", b""]})
    assert image_folder(table, "x", tmp_path) == tmp_path / "Images"
    assert [image_folder(table, column, tmp_path) for column in ("y", "z", "w", None)] == [tmp_path] * 4
