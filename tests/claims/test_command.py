import json
import sys
from dataclasses import replace

import pytest

import diptych
from diptych import commands
from diptych.claims.arms import marks
from diptych.claims.ledger import END, START, write_results
from diptych.cli import main
from diptych.commands import reproducing, training
from diptych.commands.records import versions
from diptych.errors import ConfigError, PlannedMethodError
from diptych.methods import METHODS, load_method
from diptych.use.report import RunSummary


@pytest.fixture
def add(monkeypatch):
    """Return a function that makes a table of methods: these modules, one that states no claim, and one that is planned. All run in this process."""
    monkeypatch.setattr(reproducing, "_own_processes", lambda: 1)

    def put(**modules) -> None:
        working = {slug: replace(METHODS["siglip"], slug=slug) for slug in ("siglip", *modules)}
        planned = replace(METHODS["siglip"], slug="later", state="planned")
        monkeypatch.setattr(reproducing, "METHODS", working | {"later": planned})
        monkeypatch.setattr(reproducing, "load_method", lambda slug: modules.get(slug) or load_method(slug))

    return put


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_a_claim_from_end_to_end(add, fake, calls, folder, capsys):
    add(fake=fake())
    (folder / "README.md").write_text("\n".join((START, END, *marks("fake"))))
    (folder / "docs").mkdir()
    (folder / "docs" / "claims.md").write_text("\n".join(marks("all")))
    (result,) = diptych.reproduce("fake")
    assert result.verdict == "reproduced" and len(calls()) == 24
    record = json.loads((folder / "results" / "fake.json").read_text())
    assert record["command"] == "diptych reproduce fake" and record["versions"] == versions()
    assert (folder / "results" / "fake.png").exists() and (folder / "runs" / "claims" / "fake.jsonl").exists()
    assert "[reproduced](results/fake.png)" in (folder / "README.md").read_text()
    for page in ("README.md", "docs/claims.md"):
        assert "| further arm | 1.550 [" in (folder / page).read_text()
    out, err = capsys.readouterr()
    assert out == "" and "fake, sums: reproduced" in err
    assert "  control   control arm                      1.500  (0.500, 1.500, 2.500)" in err
    assert "method minus baseline, paired over 3 seeds: 0.100 [0.099, 0.102] sum (higher is better)" in err
    assert "  control as expected: No better than the baseline." in err


def test_the_command_line_goes_on_where_it_stopped(add, fake, calls, folder):
    add(fake=fake())
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            main(["reproduce", "fake", "--seeds", "4", "--out", "numbers"])
        assert stop.value.code == 0
    assert len(calls()) == 28
    assert json.loads((folder / "numbers" / "fake.json").read_text())["command"] == "diptych reproduce fake --seeds 4"


def test_without_matplotlib_there_are_results_but_no_plot(add, fake, folder, monkeypatch, capsys):
    add(fake=fake())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    commands.reproduce("fake")
    assert [path.name for path in (folder / "results").iterdir()] == ["fake.json"]
    assert "There is no plot" in (err := capsys.readouterr().err) and "pip install 'diptych[plot]'" in err


def test_all_runs_the_others_when_one_cannot_be_run(add, fake, folder, capsys):
    broken = fake(("def claim():", "def claim():\n    return ()\n\n\ndef was():"))
    add(broken=broken, fake=fake(), other=fake(('SLUG = "fake"', 'SLUG = "other"')))
    with pytest.raises(ConfigError, match="Could not be run: broken"):
        commands.reproduce(all=True)
    assert {path.stem for path in (folder / "results").glob("*.json")} == {"fake", "other"}
    assert "broken: claim() of broken must return claims of different names; it returned 0." in capsys.readouterr().err


def test_what_cannot_be_reproduced(add, fake, folder):
    planned = next(method for method in METHODS.values() if method.state == "planned")
    with pytest.raises(PlannedMethodError, match=f"{planned.slug}.*is planned: there is no code for it yet"):
        commands.reproduce(planned.slug)
    with pytest.raises(ConfigError, match="Did you mean 'siglip'"):
        commands.reproduce("siglib")
    add(fake=fake())
    with pytest.raises(ConfigError, match=r"siglip states no claim that could be run\. Methods that do: fake\."):
        commands.reproduce("siglip")
    for arguments in ({}, {"slug": "fake", "all": True}):
        with pytest.raises(ConfigError, match="Name one method, as in `diptych reproduce SLUG`, or say --all"):
            commands.reproduce(**arguments)
    with pytest.raises(ConfigError, match="at least 3 seeds, not 2"):
        commands.reproduce("fake", seeds=2)
    assert list(folder.iterdir()) == []


def test_the_full_profile_says_what_it_would_need(add, fake, folder):
    module = fake()
    module.recipe = load_method("siglip").recipe
    add(fake=module)
    recipe = module.recipe()
    with pytest.raises(ConfigError, match=rf"profile mini only.*\({recipe.epochs} epochs, batches of .*--method fake"):
        commands.reproduce("fake", profile="full")


def test_ctrl_c_says_how_to_go_on(add, fake, folder, capsys):
    add(fake=fake(("    def run(trial):", "    def run(trial):\n        raise KeyboardInterrupt")))
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", "fake"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "diptych reproduce: stopped. The same command goes on where it stopped.\n"


def test_the_demo_says_which_parts_of_its_recipe_help(result, folder, monkeypatch, capsys):
    def train(source, *, recipe, out, evaluate_on, overwrite):
        assert (source, evaluate_on, recipe.seed, overwrite) == ("openmoji:train", "openmoji:test", 5, True)
        return training.TrainedRun(out, None, None, RunSummary("a run", "", [], []))

    monkeypatch.setattr(training, "glyphs", lambda size, progress: None)
    monkeypatch.setattr(training, "train", train)
    run = commands.demo(out=folder / "demo", seed=5)
    assert (
        run.summary.comparison is None
        and "results/clip.json: `diptych reproduce clip` measures" in capsys.readouterr().err
    )

    write_results([replace(result, slug="clip")], folder / "results")
    commands.demo(out=folder / "demo", seed=5)
    page = (folder / "demo" / "report.html").read_text()
    assert "<h2>Which parts of the recipe help</h2>" in page and "Worse: CLIP; shuffled; frozen." in page
    assert "<strong>-0.250</strong> <small>-0.374 to -0.126</small>" in page
