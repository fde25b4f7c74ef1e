import pyarrow as pa
import pytest

from diptych.data.columns import Columns, role_of, sniff
from diptych.errors import ColumnError

CAPTION, CAPTION_2 = "a dog runs over the grass", "two cats sit on a wall"


def table(**columns) -> pa.Table:
    return pa.table({name: values if isinstance(values, list) else [values] for name, values in columns.items()})


@pytest.mark.parametrize(
    "image", ["image", "Image Path", "file_name", "FILENAME", "img", "filepath", "photo", "jpg", "image_url"]
)
@pytest.mark.parametrize(
    "text", ["caption", "TEXT", "Title", "alt-text", "description", "txt", "org_caption", "caption_1", " comment"]
)
def test_usual_names(image, text):
    found = sniff(table(**{"width": "10", text: CAPTION, image: "a.jpg"}), Columns())
    assert found == Columns(image=image, texts=(text,))


def test_the_better_name_wins_whatever_the_order():
    found = sniff(table(url="https://x.org/page", file="log", image="a.jpg", caption=CAPTION), Columns())
    assert found.image == "image"


def test_all_meanings():
    found = sniff(
        table(image="a.jpg", caption="x y", label="dog", id="7", group="g", domain="photo", split="train", lang="de"),
        Columns(),
    )
    assert found == Columns("image", ("caption",), "label", "id", "group", "domain", "split", "lang")


@pytest.mark.parametrize("image", ["x/a.JPG", b"\xff\xd8", {"bytes": b"", "path": None}, "https://x.org/a.png?size=9"])
def test_odd_names_are_told_by_content(image):
    found = sniff(table(c0="17", c1="kitchen", c2=CAPTION, c3=image), Columns())
    assert found == Columns(image="c3", texts=("c2",))


def test_what_is_not_text():
    columns = {
        "caption_id": "d41d",
        "text_url": "https://x.org",
        "mask": "masks/a.png",
        "caption_length": 5,
        "title_number": "3",
    }
    assert sniff(table(image="a.jpg", **columns), Columns()).texts == ()


def test_an_unnamed_column_beside_a_label_is_text_only_when_it_is_long():
    assert sniff(table(image="a.jpg", label="dog", wnid="n01443537"), Columns()).texts == ()
    assert sniff(table(image="a.jpg", label="dog", remark=CAPTION), Columns()).texts == ("remark",)


def test_several_texts_with_roles_and_languages():
    given = {
        "caption": CAPTION,
        "caption_de": "ein Hund",
        "fr": "un chien",
        "rewritten": "x y",
        "negative_caption": "no dog",
    }
    given |= {"synthetic_text": "a b", "text_id": "seekor anjing"}
    texts = sniff(table(image="a.jpg", **given), Columns()).texts
    assert {column: role_of(column) for column in texts} == {
        "caption": ("caption", None),
        "caption_de": ("translation", "de"),
        "fr": ("translation", "fr"),
        "rewritten": ("rewrite", None),
        "negative_caption": ("hard_negative", None),
        "synthetic_text": ("synthetic", None),
        "text_id": ("translation", "id"),
    }


def test_list_columns():
    assert sniff(table(image="a.jpg", captions=[[CAPTION, CAPTION_2]], label=[["x", "y"]]), Columns()).texts == (
        "captions",
    )


def test_given_columns_are_kept_and_the_rest_is_guessed():
    given = Columns(texts=("image",), image="caption")
    assert sniff(table(image=CAPTION, caption="a.jpg", label="dog"), given) == Columns(
        image="caption", texts=("image",), label="label"
    )


@pytest.mark.parametrize("given", [Columns(image="pictur"), Columns(texts=("pictur",)), Columns(language="pictur")])
def test_missing_column(given):
    with pytest.raises(ColumnError, match=r"no column 'pictur'. Did you mean 'picture'\? Known: picture, text."):
        sniff(table(picture="a.jpg", text=CAPTION), given)
