import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diptych.evaluation.attack import Hits
from diptych.evaluation.robustness import Answers, Audit, Picture, Row, Score
from diptych.types import Interval
from diptych.use.audit import audit_markdown, audit_page, lead

METRIC = "zeroshot/top1"


def score(value: float) -> dict[str, Score]:
    return {
        METRIC: Score(Interval(value, value - 0.05, value + 0.05), Interval(value - 0.8, value - 0.85, value - 0.75))
    }


def pixels(level: int) -> np.ndarray:
    return np.full((8, 8, 3), level, dtype=np.uint8)


@pytest.fixture
def found() -> Audit:
    return Audit(
        (
            Row("clean", "clean", score(0.8)),
            Row("noise", "noise, eps 4", score(0.79)),
            Row("pgd", "PGD, eps 4", score(0.1)),
            Row("box", "empty box", score(0.7)),
            Row("words", "wrong words", score(0.3)),
            *(Row("corruption", "jpeg", score(0.8 - s / 10), s) for s in range(1, 6)),
            Row("corruption", "all corruptions", score(0.5)),
            Row("corruption", "jpeg", score(0.5)),
        ),
        {METRIC: 0.25},
        {"model": "runs/<one>", "source": "photos", "images": 40, "robustness": {"kind": "X", "eps": [4.0]}},
        ("A note with <brackets>.",),
        (Picture("<key>", {"clean": pixels(100), "PGD, eps 4": pixels(104)}),),
    )


def test_the_lead_names_clean_attacked_and_baseline(found):
    assert lead(found) == (
        "runs/<one> on 40 images of photos. Zero-shot classification, top 1, is 0.800 on clean images (0.250 at chance); 0.100 under PGD, eps 4 of "
        "255 levels, where random noise of that size leaves 0.790; 0.300 with wrong words written over the image, 0.700 with the empty box; 0.500 "
        "under common corruptions, the mean of all."
    )


def test_the_page_has_every_number_and_is_safe(found):
    html = audit_page(found)
    for row in found.rows:
        assert f"{row.scores[METRIC].value.value:.3f}" in html
    assert "<strong>-0.700</strong>" in html  # PGD minus clean
    assert "<key>" not in html and "&lt;key&gt;" in html and "<one>" not in html and "<brackets>" not in html
    assert html.count("<img ") == 3 and "its change, times 31" in html
    assert "Mean corruption error 0.500 [0.450, 0.550]; beside clean images +0.300 [+0.250, +0.350]" in html
    assert re.findall(r"<td>robustness.eps</td>|robustness\.eps", html)
    assert not re.search(r"(src|href)=\"http", html)


def test_markdown_has_the_same_numbers_in_tables(found):
    text = audit_markdown(found)
    assert "| PGD, eps 4 | 0.100 [0.050, 0.150] | -0.700 [-0.750, -0.650] |" in text
    assert "| clean | 0.800 [0.750, 0.850] |  |" in text
    assert "| jpeg | 0.700 | 0.600 | 0.500 | 0.400 | 0.300 |" in text
    assert "- robustness.eps: [4.0]" in text and "- A note with <brackets>." in text


def test_another_model_stands_beside_it(found):
    def answers(rows, right: tuple[float, ...]) -> tuple[Answers, ...]:
        hits = {METRIC: Hits(np.array(right), np.arange(len(right)))}
        return tuple(Answers(row.family, row.name, hits, row.severity) for row in rows)

    settings = dict(found.settings, seed=0)
    mine = replace(found, settings=settings, answers=answers(found.rows, (1.0, 1.0, 0.0, 1.0)))
    other = replace(mine, settings=settings | {"model": "<two>"}, answers=answers(found.rows, (1.0, 0.0, 0.0, 0.0)))
    html, text = audit_page(mine, other), audit_markdown(mine, other)
    assert (
        "<two>" not in html and "&lt;two&gt; on the same images" in html and html.count("<strong>+0.500</strong>") == 7
    )
    assert "<two> on the same images" in text
    assert re.search(r"\| PGD, eps 4 \| 0\.100 \[0\.050, 0\.150\] \| \+0\.500 \[\+0\.000, \+1\.000\] \|", text)


def test_an_audit_of_nothing_but_clean_images_has_no_empty_tables(found):
    bare = Audit(found.rows[:1], found.chance, found.settings, (), ())
    for made in (audit_page(bare), audit_markdown(bare)):
        assert "severity" not in made and "corruption error" not in made and "Notes" not in made
    assert lead(bare).endswith("(0.250 at chance).")


def test_what_pgd_changed_is_enlarged_around_grey(found, tmp_path: Path):
    from diptych.use.audit import _shown

    shown = dict(_shown(found.pictures[0]))
    assert (shown["its change, times 31"] == 128 + 31 * 4).all()
