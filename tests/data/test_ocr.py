from types import SimpleNamespace

import pytest
from PIL import Image

from diptych.data import ocr
from diptych.data.ocr import read_line, read_lines, read_text


@pytest.fixture
def engine(monkeypatch):
    """Return a function that puts an engine in place which finds these lines, and reads `whole` where it need not look for any."""

    def put(lines, whole=None):
        seen = []

        def read(pixels, **options):
            seen.append(pixels)
            return SimpleNamespace(txts=whole if options else lines)

        monkeypatch.setattr(ocr, "_engine", lambda: read)
        return seen

    return put


@pytest.mark.parametrize(
    ("size", "padded"),
    [((64, 64), (64, 64)), ((40, 10), (40, 10)), ((41, 10), (41, 11)), ((3, 900), (225, 900)), ((900, 3), (900, 225))],
)
def test_strips_are_padded_before_they_are_read(engine, size, padded):
    seen = engine(("b", "r"))
    assert read_lines(Image.new("RGB", size, (10, 20, 30))) == ("b", "r")
    assert seen[0].shape == (padded[1], padded[0], 3) and seen[0][0, 0].tolist() == [30, 20, 10]
    assert seen[0][-1, -1].tolist() == ([30, 20, 10] if size == padded else [255] * 3)


@pytest.mark.parametrize(
    ("lines", "whole", "text"), [(("one", "two"), ("x",), "one two"), (None, ("x",), "x"), (None, None, "")]
)
def test_where_no_line_is_found_the_whole_is_read_as_one(engine, lines, whole, text):
    engine(lines, whole)
    image = Image.new("L", (9, 9))
    assert read_text(image) == text and read_line(image) == (whole or ("",))[0]
    assert read_lines(image) == (lines or ())
