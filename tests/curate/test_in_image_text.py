import io
from types import SimpleNamespace

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from diptych.curate.in_image_text import (
    WRITTEN,
    TextInImage,
    TextInImageConfig,
    pieces,
    read_with_rapidocr,
    repeated_share,
)
from diptych.curate.pictures import NO_IMAGE, UNREADABLE
from diptych.data import ocr
from diptych.errors import ConfigError


def poster(*lines: str) -> bytes:
    image = Image.new("RGB", (420, 60 + 70 * len(lines)), "white")
    canvas = ImageDraw.Draw(image)
    for place, line in enumerate(lines):
        canvas.text((20, 30 + 70 * place), line, fill="black", font=ImageFont.load_default(40))
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("caption", "written", "share"),
    [
        ("Summer sale", "SUMMER SALE!", 1),
        ("Summer sale", "sale\nsummersale now", 1),
        ("Summer sale", "a dog", 0),
        ("abcd", "xbcd", 1 / 2),  # abc, bcd
        ("ab", "ab", 1),
        ("ab", "abc", 0),
        ("夏季大减价", "大减价", 1 / 3),
        ("", "anything", 0),
        ("anything", "", 0),
        ("?!", "?!", 0),
    ],
)
def test_shares(caption, written, share):
    assert repeated_share(caption, written) == pytest.approx(share)


@given(st.text(max_size=40), st.text(max_size=40))
def test_shares_lie_between_none_and_all(caption, written):
    assert 0 <= repeated_share(caption, written) <= 1
    assert repeated_share(caption, f"{caption} {written}") in (0, 1)


def test_pieces():
    assert pieces("abcde") == {"abc", "bcd", "cde"}
    assert pieces("ab") == {"ab"} and pieces("") == set()


def test_rows_are_judged_by_their_caption_and_an_image_is_read_once():
    read = []

    def reader(image: Image.Image) -> str:
        read.append(image.size)
        return "Grand opening today"

    sign = poster("x")
    rows = [
        ("a#0", "a", sign, "grand opening", None),
        ("a#1", "a", sign, "a shop window", None),
        ("a#2", "a", sign, None, None),
        ("b", "b", None, "grand opening", None),
        ("c", "c", sign[:60], "grand opening", None),
        ("d", "d", sign, "grand opening", "too short"),
    ]
    keys, groups, images, captions, reasons = zip(*rows, strict=True)
    table = pa.table({"key": keys, "group": groups, "image": images, "caption": captions, "reason": reasons})
    found = TextInImage(reader=reader).curate(table)
    assert found["reason"].to_pylist() == [WRITTEN, None, None, NO_IMAGE, UNREADABLE, "too short"]
    assert found["written"].to_pylist() == ["Grand opening today"] * 3 + [None] * 3
    assert len(read) == 1


def test_the_share_that_drops():
    table = pa.table({"key": ["a"], "image": [poster("x")], "caption": ["abcdef"]})  # abc, bcd, cde, def
    for share, reason in ((0.75, WRITTEN), (0.76, None)):
        step = TextInImage(TextInImageConfig(share=share), reader=lambda _: "abcde")
        assert step.curate(table)["reason"].to_pylist() == [reason]


@pytest.mark.parametrize("share", [0, 1.1])
def test_a_share_out_of_range(share):
    with pytest.raises(ConfigError, match=r"\(0, 1\]"):
        TextInImageConfig(share=share)


@pytest.mark.slow
def test_planted_words_are_read_by_rapidocr():
    pytest.importorskip("rapidocr")
    signs = [
        ("Fresh bread", "every morning"),
        ("No entry", "after dark"),
        ("Museum of", "modern art"),
        ("Platform", "nine"),
    ]
    rows = [(poster(*lines), " ".join(lines)) for lines in signs]
    rows += [(poster(*lines), "a white poster with black letters on it") for lines in signs]
    rows += [(poster(), "fresh bread every morning")]
    images, captions = zip(*rows, strict=True)
    table = pa.table({"key": [f"{i}" for i in range(9)], "image": images, "caption": captions})
    found = TextInImage().curate(table)
    assert found["reason"].to_pylist() == [WRITTEN] * 4 + [None] * 5  # precision 1, recall 1
    for size in ((64, 64), (1, 1), (900, 3)):  # the last took all of the memory before it was padded
        assert read_with_rapidocr(Image.new("RGB", size, "white")) == ""


def test_lines_are_put_below_each_other(monkeypatch):
    monkeypatch.setattr(ocr, "_engine", lambda: lambda pixels: SimpleNamespace(txts=("b", "r")))
    assert read_with_rapidocr(Image.new("RGB", (9, 9))) == "b\nr"
