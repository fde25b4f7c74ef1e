import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from diptych.types import Interval
from diptych.use.page import Line, difference_table, facts, interval_table, line_chart, page, thumbnail, ticks, words

EVIL = "<script>alert(1)</script> & \"x\" 'y'"
VOID = {"meta", "img", "br", "rect", "line", "circle", "polyline"}


class Balance(HTMLParser):
    """Checks that every element is closed, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.feed(html)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.stack.pop() == tag


def test_a_page_needs_nothing_else():
    html = page(
        "A & B",
        thumbnail(Image.new("RGB", (9, 9)), "x") + line_chart("Loss", [Line("loss", ((0, 1), (1, 0.5)))]),
    )
    assert html.startswith("<!doctype html>") and "<title>A &amp; B</title>" in html and 'charset="utf-8"' in html
    assert not re.search(r"https?://|<script|<link|@import|url\(|javascript:", html)
    assert all(source.startswith("data:image/webp;base64,") for source in re.findall(r'src="([^"]*)"', html))
    Balance(html)


@pytest.mark.parametrize(
    "html",
    [
        words(EVIL),
        facts([(EVIL, EVIL)]),
        interval_table([(EVIL, Interval(0.5, 0.4, 0.6), None)]),
        difference_table(
            [("a", Interval(0.5, 0.4, 0.6), None), (EVIL, Interval(0.4, 0.3, 0.5), Interval(-0.1, -0.2, 0.0))]
        ),
        line_chart(EVIL, [Line(EVIL, ((0, 1), (1, 2))), Line("b", ((0, 1), (1, 2)))], x_name=EVIL),
        thumbnail(Image.new("RGB", (4, 4)), EVIL),
        page(EVIL, ""),
    ],
)
def test_text_of_users_is_escaped(html):
    assert "<script" not in html and "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in html
    Balance(html)


def test_thumbnail_is_the_picture_made_small_and_leaves_it_alone():
    image = Image.new("RGB", (400, 100), (200, 30, 40))
    html = thumbnail(image, 'a "red" bar', side=50)
    assert image.size == (400, 100) and 'alt="a &quot;red&quot; bar"' in html
    small = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])))
    assert small.size in ((50, 12), (50, 13))
    assert all(abs(a - b) < 12 for a, b in zip(small.convert("RGB").getpixel((25, 6)), (200, 30, 40), strict=True))
    assert Image.open(
        io.BytesIO(base64.b64decode(thumbnail(Image.new("RGB", (5, 3)), "").split(",")[1].split('"')[0]))
    ).size == (5, 3)


def test_text_runs_in_its_own_direction():
    assert words("חתול") == '<span dir="auto">חתול</span>'
    assert '<td><span dir="auto">قطة</span></td>' in facts([("name", "قطة")])


def test_differences_are_drawn_around_zero():
    whole = ("whole", Interval(0.5, 0.4, 0.6), None)
    html = difference_table(
        [whole, ("a", whole[1], Interval(-0.2, -0.4, 0.0)), ("b", whole[1], Interval(0.1, 0.05, 0.15))]
    )
    assert html.count("<svg") == 2 and '<line x1="6.0" x2="100.0"' in html  # the longest reach takes 94 of 100
    assert '<circle cx="53.0" cy="8" r="4" fill="var(--paper)"' in html  # an interval that ends at 0 holds it
    assert '<circle cx="123.5" cy="8" r="4" fill="var(--right)"' in html
    assert "<strong>+0.100</strong> <small>+0.050 to +0.150</small>" in html
    assert "<svg" not in difference_table([whole])
    assert '<circle cx="100.0"' in difference_table([whole, ("same", whole[1], Interval(0.0, 0.0, 0.0))])


def test_bars_show_value_and_interval():
    html = interval_table([("r", Interval(0.5, 0.25, 0.75), 0.1), ("s", Interval(1, 1, 1), None)])
    assert "<strong>0.500</strong> <small>0.250 to 0.750</small>" in html
    assert '<line x1="50.0" x2="150.0"' in html and '<circle cx="100.0"' in html and '<circle cx="200.0"' in html
    assert re.findall(r'<td class="number soft">([^<]*)</td>', html) == ["0.100", ""]
    assert "at chance" in html and "at chance" not in interval_table([("s", Interval(1, 1, 1), None)])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 5, [0, 1, 2, 3, 4, 5]),
        (0, 7, [0, 2, 4, 6, 8]),
        (0.3, 3.2, [0, 1, 2, 3, 4]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (-3.4, -0.9, [-3.5, -3, -2.5, -2, -1.5, -1, -0.5]),
        (0, 11, [0, 2.5, 5, 7.5, 10, 12.5]),
        (0, 1e-3, [0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3]),
        (2000, 4000, [2000, 2500, 3000, 3500, 4000]),
        (3, 3, [3]),
        (0, 0, [0]),
    ],
)
def test_ticks_by_hand(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def points(html: str) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, pair.split(","))) for pair in line.split()] for line in re.findall(r'points="([^"]*)"', html)
    ]


def test_one_point_is_no_curve():
    assert line_chart("Loss", [Line("loss", ((1, 2.0),))]) == line_chart("Loss", []) == ""
    both = line_chart("Loss", [Line("one", ((1, 2.0),)), Line("two", ((0, 1.0), (2, 3.0)))])
    assert len(points(both)) == 1 and ">two: 3 at step 2<" in both


def test_a_curve_fills_the_chart():
    (curve,) = points(line_chart("Loss", [Line("loss", ((0, 1.0), (5, 0.5), (10, 0.0)))]))
    assert curve == [(44, 15), (227, 97.5), (410, 180)]


def test_equal_values_are_a_level_line_inside_the_chart():
    for value in (0.0, 14.0, -2.0):
        (curve,) = points(line_chart("Scale", [Line("scale", ((0, value), (10, value)))]))
        assert curve[0][1] == curve[1][1] and 15 <= curve[0][1] <= 180
        assert [x for x, _ in curve] == [44, 410]
    (curve,) = points(line_chart("Scale", [Line("scale", ((3, 1.0), (3, 2.0)))]))  # one step, logged twice
    assert [x for x, _ in curve] == [44, 44]


def test_negative_values_stay_inside_the_chart():
    html = line_chart("Bias", [Line("bias", ((0, -10.0), (1, -2.5), (2, 4.0)))])
    (curve,) = points(html)
    assert all(15 <= y <= 180 for _, y in curve)
    assert curve[0][1] > curve[1][1] > curve[2][1]
    assert ">-10</text>" in html and ">5</text>" in html
    Balance(html)


def test_a_legend_only_where_there_are_several_curves():
    one, two = Line("alpha", ((0, 1.0), (1, 2.0))), Line("beta", ((0, 1.0), (1, 2.0)))
    assert "■" not in line_chart("t", [one]) and line_chart("t", [one, two]).count("■") == 2
