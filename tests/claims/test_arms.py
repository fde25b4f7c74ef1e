from dataclasses import replace
from pathlib import Path

import pytest

from diptych.claims.arms import compare, markdown, marks, told_apart, update_arms
from diptych.claims.ledger import read_all, write_results
from diptych.types import Interval

ROOT = Path(__file__).parents[2]


def test_every_arm_beside_the_method_by_hand(result):
    comparison = compare(replace(result, arms=result.arms | {"frozen": [0.51, 0.59, 0.55]}))
    names, values, differences = zip(*comparison.rows, strict=True)
    assert names == ("Fake", "CLIP", "shuffled", "frozen")
    assert [value.value for value in values] == pytest.approx([0.55, 0.45, 0.1, 0.55])
    assert values[0].high - 0.55 == pytest.approx(4.303 * 0.05 / 3**0.5, abs=1e-4)  # t(2) s / sqrt(3)
    assert differences[0] is None
    assert (differences[1].low, differences[1].high) == pytest.approx((-0.1, -0.1))  # every seed of CLIP is 0.1 below
    assert differences[2].value == pytest.approx(-0.45)
    assert differences[3].low == pytest.approx(-4.303 * 0.01 / 3**0.5, abs=1e-5) and differences[3].value == 0
    assert comparison.title == "fake, scenes"
    assert comparison.lead == (
        '6,000 drawn scenes. Metric: recall at 1; mean over 3 seeds, and the difference to "Fake", paired over seeds, with 95 % intervals. '
        "Worse: CLIP; shuffled. Not told apart: frozen. Command: diptych reproduce fake; 8 minutes."
    )


def test_what_is_worse_turns_with_the_direction():
    one = Interval(0.5, 0.4, 0.6)
    rows = [
        ("method", one, None),
        ("a", one, Interval(-0.2, -0.3, -0.1)),
        ("b", one, Interval(0.2, 0.1, 0.3)),
        ("c", one, Interval(0.1, 0.0, 0.2)),  # an interval that ends at 0 holds it
    ]
    assert told_apart(rows) == "Worse: a. Better: b. Not told apart: c."
    assert told_apart(rows, higher_is_better=False) == "Worse: b. Better: a. Not told apart: c."
    assert told_apart(rows[:1]) == ""


def test_the_table_of_a_page(result):
    lower = replace(result, higher_is_better=False)
    lead, _, table = markdown(lower).partition("\n\n")
    assert (
        lead.startswith("**fake, scenes.** 6,000 drawn scenes. Metric: recall at 1, lower is better;")
        and "Better: CLIP" in lead
    )
    assert table.splitlines() == [
        "| arm | recall at 1 | difference to the method |",
        "| --- | --- | --- |",
        "| Fake | 0.550 [0.426, 0.674] |  |",
        "| CLIP | 0.450 [0.326, 0.574] | -0.100 [-0.100, -0.100] |",
        "| shuffled | 0.100 [0.100, 0.100] | -0.450 [-0.574, -0.326] |",
        "| frozen | 0.300 [0.300, 0.300] | -0.250 [-0.374, -0.126] |",
    ]


def test_pages_show_one_method_or_all_that_have_further_arms(result, tmp_path):
    page, results = tmp_path / "page.md", tmp_path / "results"
    page.write_text("\n".join(("before", *marks("all"), *marks("fake"), *marks("narrow"), "after")))
    update_arms(page, results)
    assert "No claim has been run yet." in page.read_text()
    narrow = replace(result, slug="narrow", arms={key: v for key, v in result.arms.items() if key != "frozen"})
    write_results([result], results)
    write_results([narrow], results)
    for _ in range(2):
        update_arms(page, results)
        parts = [
            page.read_text().split(marks(name)[0])[1].split(marks(name)[1])[0] for name in ("all", "fake", "narrow")
        ]
        assert [("fake, scenes" in part, "narrow, scenes" in part) for part in parts] == [(1, 0), (1, 0), (0, 1)]
    assert page.read_text().startswith("before\n") and page.read_text().endswith("after")
    update_arms(tmp_path / "none.md", results)
    assert not (tmp_path / "none.md").exists()


def test_the_page_on_claims_shows_the_results_of_this_repository():
    start, end = marks("all")
    wide = [result for result in read_all(ROOT / "results") if len(result.arms) > 3]
    tables = "\n\n".join(map(markdown, wide))
    assert f"{start}\n\n{tables}\n\n{end}" in (ROOT / "docs" / "claims.md").read_text()
