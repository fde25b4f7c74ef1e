import re

import pytest
from PIL import Image

from diptych.types import Interval
from diptych.use.gallery import Candidate, Card
from diptych.use.report import Comparison, RunSummary, curves, render_report, write_report

EVIL = "<script>alert(1)</script>"
ROWS = [
    {"step": 10, "loss": 3.0, "lr": 1e-3, "scale": 14.0, "grad_norm": 2.0, "samples_per_second": 100.0},
    {"step": 10, "evaluation": {"image_to_text/recall@1": 0.1}},
    {"step": 20, "loss": 1.5, "lr": 5e-4, "scale": 15.0, "grad_norm": 1.0, "samples_per_second": 110.0},
    {"step": 20, "evaluation": {"image_to_text/recall@1": 0.4, "zeroshot/top1": 0.3, "guard/shapes": 0.8}},
    {"step": 30, "evaluation": {"image_to_text/recall@1": 0.5, "zeroshot/top1": 0.6, "guard/shapes": 0.7}},
]


def summary(text: str = "a red cat", **more) -> RunSummary:
    image = Image.new("RGB", (8, 8), "red")
    cards = (Card(text, image, (Candidate(0.5, text, right=True),)),)
    back = (Card(text, None, (Candidate(0.5, text, image, right=False),)),)
    metrics = [("image_to_text/recall@1", Interval(0.5, 0.4, 0.6), 0.01)]
    return RunSummary(text, text, metrics, ROWS, cards, back, {text: [(text, text)]}, [text], **more)


def test_everything_is_on_the_page():
    html = render_report(summary())
    for part in ("<h1>a red cat</h1>", "0.400 to 0.600", "Image to text", "Text to image", "Loss", "HIT", "MISS"):
        assert part in html
    assert "<h2>Notes</h2><ul><li>a red cat</li></ul>" in html
    assert "<h2>a red cat</h2><table><tr><th>a red cat</th>" in html


def test_text_of_users_is_escaped_and_nothing_is_fetched():
    html = render_report(summary(EVIL))
    assert "<script" not in html and html.count("&lt;script&gt;") >= 10
    assert not re.search(r"https?://|<link|@import", html)
    assert set(re.findall(r'src="(.{10})', html)) == {"data:image"}


def test_sections_without_content_are_left_out():
    html = render_report(RunSummary("t", "l", [], []))
    assert "Image to text" not in html and "Text to image" not in html and "Notes" not in html
    assert "<svg" not in html and "None" not in html


def test_a_comparison_has_its_section():
    rows = [("whole", Interval(0.5, 0.4, 0.6), None), (EVIL, Interval(0.3, 0.2, 0.4), Interval(-0.2, -0.25, -0.15))]
    html = render_report(summary(comparison=Comparison(EVIL, EVIL, rows)))
    assert "<script" not in html and "<h2>&lt;script&gt;alert(1)&lt;/script&gt;</h2><p class='lead'>&lt;script" in html
    assert "<td>whole</td>" in html and "<strong>-0.200</strong> <small>-0.250 to -0.150</small>" in html


def test_curves_follow_the_rows():
    charts = dict(zip(("loss", "held", "guard", "lr", "scale", "norm", "speed"), curves(ROWS), strict=True))
    assert "loss: 1.5 at step 20" in charts["loss"]
    assert "image_to_text/recall@1: 0.5 at step 30" in charts["held"]
    assert "zeroshot/top1: 0.6 at step 30" in charts["held"]
    assert "guard/shapes: 0.7 at step 30" in charts["guard"] and "guard/" not in charts["held"]
    assert "learning rate: 0.0005 at step 20" in charts["lr"]
    assert "scale: 15 at step 20" in charts["scale"]
    assert "norm before clipping: 1 at step 20" in charts["norm"]
    assert "samples per second: 110 at step 20" in charts["speed"]
    assert curves([]) == curves(ROWS[:2]) == [""] * 7


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.html"
    write_report(path, summary("חתול 🐈"))
    before = path.read_text(encoding="utf-8")
    assert before == render_report(summary("חתול 🐈"))
    monkeypatch.setattr("diptych.use.report.render_report", lambda run: "half a page \ud83d")  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        write_report(path, summary())
    assert path.read_text(encoding="utf-8") == before
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
