import json
from dataclasses import replace
from pathlib import Path

import pytest

from diptych.claims.ledger import (
    END,
    START,
    ControlCheck,
    read_results,
    state_of,
    table,
    update_readme,
    write_results,
)
from diptych.errors import ConfigError
from diptych.methods import METHODS

ROOT = Path(__file__).parents[2]


def test_one_claim_is_a_record_and_several_are_a_list(result, tmp_path):
    path = write_results([result], tmp_path)
    assert path == tmp_path / "fake.json"
    record = json.loads(path.read_text())
    assert {
        "slug", "claim", "setting", "metric", "higher_is_better", "seeds", "arms", "difference", "control_check", "verdict", "minutes",
        "command", "versions", "hashes",
    } <= set(record)  # fmt: skip
    assert record["arms"]["control"] == [0.1, 0.1, 0.1] and record["arms"]["frozen"] == [0.3, 0.3, 0.3]
    assert record["difference"] == {"value": 0.1, "low": 0.05, "high": 0.15}
    assert record["control_check"] == {"expected": "At chance.", "passed": True}
    assert read_results(path) == (result,)

    both = (result, replace(result, name="photos", verdict="inconclusive"))
    assert write_results(both, tmp_path) == path
    assert [record["name"] for record in json.loads(path.read_text())] == ["scenes", "photos"]
    assert read_results(path) == both
    assert [file.name for file in tmp_path.iterdir()] == ["fake.json"]


def test_files_that_are_no_results(result, tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ConfigError, match=r"a.json cannot be read as JSON.*Run `diptych reproduce` again"):
        read_results(tmp_path / "a.json")
    path = write_results([result], tmp_path)
    path.write_text(path.read_text().replace('"inconclusive"', "").replace('"reproduced"', '"proven"'))
    with pytest.raises(ConfigError, match=r"fake.json\[0\].verdict is 'proven'. .*inconclusive, not reproduced"):
        read_results(path)


def test_the_row_of_a_result(result, tmp_path):
    write_results([result], tmp_path)
    head, rule, row = table(tmp_path).splitlines()
    assert head.count("|") == rule.count("|") == row.count("|") == 11
    assert row.split(" | ") == [
        "| `fake`",
        "Recall &#124; at 1 rises from 40 to 43 (table 2).",
        "6,000 drawn scenes. Metric: recall at 1; 3 seeds.",
        "CLIP: 0.450",
        "Fake: 0.550",
        "shuffled: 0.100 (as expected)",
        "+0.100 [+0.050, +0.150]",
        "reproduced",
        "8.2",
        "`diptych reproduce fake` |",
    ]
    failed = replace(result, control_check=ControlCheck("At chance.", False), higher_is_better=False)
    write_results([failed], tmp_path)
    (tmp_path / "fake.png").touch()
    assert "(not as expected)" in table(tmp_path) and "recall at 1, lower is better" in table(tmp_path)
    assert f"[reproduced]({tmp_path.name}/fake.png)" in table(tmp_path)


def test_the_ledger_is_put_between_its_comments(result, tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    assert not update_readme(readme, results) and not readme.exists()
    readme.write_text("# Mine\n")
    assert not update_readme(readme, results) and readme.read_text() == "# Mine\n"
    readme.write_text(f"# Mine\n\n{START}\nold\n{END}\n\nafter\n")
    assert update_readme(readme, results)
    assert readme.read_text() == f"# Mine\n\n{START}\n\nNo claim has been run yet.\n\n{END}\n\nafter\n"
    write_results([replace(result, claim=r"a \1 backslash")], results)
    assert update_readme(readme, results) and update_readme(readme, results)
    assert readme.read_text() == f"# Mine\n\n{START}\n\n{table(results)}\n\n{END}\n\nafter\n"


@pytest.mark.parametrize(
    ("verdicts", "state"),
    [
        (["reproduced"], "reproduced"),
        (["reproduced", "reproduced"], "reproduced"),
        (["reproduced", "not reproduced"], "not reproduced"),
        (["inconclusive", "not reproduced"], "not reproduced"),
        (["reproduced", "inconclusive"], "works"),
        (["inconclusive"], "works"),
    ],
)
def test_the_state_of_a_method_after_its_claims(result, verdicts, state):
    found = [replace(result, verdict=verdict) for verdict in verdicts]
    assert state_of(found) == state
    assert state_of([*found, replace(result, verdict="not reproduced", ours=True)]) == state
    assert state_of([replace(each, ours=True) for each in found]) == "works"


def test_the_readme_shows_the_results_of_this_repository():
    assert f"{START}\n\n{table(ROOT / 'results')}\n\n{END}" in (ROOT / "README.md").read_text()


def test_the_table_of_methods_agrees_with_the_results_of_this_repository():
    found = {path.stem: read_results(path) for path in (ROOT / "results").glob("*.json")}
    assert all(result.slug == slug for slug, results in found.items() for result in results)
    for slug, method in METHODS.items():
        expected = {state_of(found[slug])} if slug in found else {"planned", "works"}
        assert method.state in expected, f"{slug} is {method.state!r} in the table, {expected} by results/{slug}.json"
