import copy
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from diptych.claims import train
from diptych.claims.claim import Arm, Claim, Control
from diptych.claims.reproduce import check, reproduce_method, seeds_of
from diptych.claims.train import train_quietly
from diptych.claims.trials import Bench, Log
from diptych.claims.verdict import paired_over_seeds
from diptych.config import fingerprint, override
from diptych.errors import ConfigError, TrainingError
from diptych.methods import METHODS, clip, load_method, siglip

PARTS = ("baseline", "method", "control", "further")
VERSIONS = {"python": "3", "torch": "2"}


def reproduce(module, tmp_path, *, versions=VERSIONS, seeds=None, console=None):
    (result,) = reproduce_method(
        "fake",
        lambda slug: module,
        log=tmp_path / "log" / "fake.jsonl",
        command="diptych reproduce fake",
        versions=versions,
        console=console or Console(quiet=True),
        seeds=seeds,
    )
    return result


def without_time(result):
    return replace(result, minutes=0.0)


def test_grid_on_validation_with_the_first_seed_then_arms_by_seeds_on_test(fake, calls, tmp_path):
    result = reproduce(fake(), tmp_path)
    expected = [f"{part} 0 validation {bonus}" for part in PARTS for bonus in (0.0, 0.5, 0.25)]
    expected += [f"{part} {seed} test 0.5" for seed in (0, 1, 2) for part in PARTS]
    assert calls() == expected
    assert result.search.tries == 3 and result.search.seed == 0
    assert result.search.chosen == {key: {"bonus": 0.5} for key in result.arms}
    assert result.search.scores["method"] == [0.1, 0.6, 0.35]


def test_the_result(fake, tmp_path):
    result = reproduce(fake(), tmp_path)
    assert result.arms["baseline"] == result.arms["control"] == [0.5, 1.5, 2.5]
    assert result.arms["method"] == [0.6, 1.601, 2.6]
    assert list(result.arms) == ["baseline", "method", "control", "further arm"]
    assert result.names["method"] == "method arm" and result.names["further arm"] == "further arm"
    assert result.difference == paired_over_seeds(result.arms["baseline"], result.arms["method"])
    assert result.difference.value == pytest.approx(0.1 + 0.001 / 3)
    assert result.control_check.passed and result.control_check.expected == "No better than the baseline."
    assert (result.verdict, result.seeds, result.metric) == ("reproduced", (0, 1, 2), "sum")
    assert (result.command, result.versions) == ("diptych reproduce fake", VERSIONS)
    assert set(result.hashes.code) == {"fake"} and result.hashes.recipes["method"] == []


def test_further_numbers_stand_beside_the_metric(fake, tmp_path):
    for result in (reproduce(fake(), tmp_path), reproduce(fake(), tmp_path)):  # run, and from the log
        assert result.noted == {"twice": {key: [0.0, 2.0, 4.0] for key in ("baseline", "method", "further arm")}}


def test_where_lower_is_better_the_lowest_is_chosen_and_a_gain_is_a_loss(fake, tmp_path):
    result = reproduce(fake(("HIGHER = True", "HIGHER = False")), tmp_path)
    assert result.search.chosen["method"] == {"bonus": 0.0}
    assert result.difference.value > 0 and result.verdict == "not reproduced"


def test_a_control_that_works_too_spoils_the_claim(fake, tmp_path):
    result = reproduce(fake(('"control": 0.0', '"control": 0.1')), tmp_path)
    assert result.difference.low > 0 and not result.control_check.passed and result.verdict == "not reproduced"


def test_without_a_choice_nothing_is_run_on_validation(fake, calls, tmp_path):
    one = 'GRID = ({"bonus": 0.0}, {"bonus": 0.5}, {"bonus": 0.25})'
    result = reproduce(fake((one, 'GRID = ({"bonus": 0.0},)')), tmp_path)
    assert all("test" in call for call in calls())
    assert result.search.tries == 1 and result.search.scores["method"] == []


def test_what_is_logged_is_not_run_again(fake, calls, tmp_path):
    first = reproduce(fake(), tmp_path)
    assert len(calls()) == 24
    again = reproduce(fake(), tmp_path)
    assert calls() == [] and again == first
    more = reproduce(fake(), tmp_path, seeds=5)
    assert Counter(call.split()[1] for call in calls()) == {"3": 4, "4": 4}
    assert more.seeds == (0, 1, 2, 3, 4) and more.arms["method"][:3] == first.arms["method"]
    fewer = reproduce(fake(), tmp_path, seeds=3)
    assert calls() == [] and without_time(fewer) == without_time(first)


@pytest.mark.parametrize(
    ("change", "runs"),
    [
        (("A method whose arms are sums", "The result was 0.1"), 0),
        (('"method": 0.1', '"method": 0.2'), 24),
        (('{"bonus": 0.25})', '{"bonus": 0.3})'), 24),  # code is code: it does not know which arm a change concerns
    ],
)
def test_other_code_is_run_again(fake, calls, tmp_path, change, runs):
    reproduce(fake(), tmp_path)
    calls()
    reproduce(fake(change), tmp_path)
    assert len(calls()) == runs


def test_other_packages_are_run_again(fake, calls, tmp_path):
    reproduce(fake(), tmp_path)
    calls()
    reproduce(fake(), tmp_path, versions=VERSIONS | {"torch": "3"})
    assert len(calls()) == 24


def test_other_data_is_run_again(fake, calls, tmp_path):
    table = tmp_path / "pairs.csv"
    table.write_text("image,caption\na.png,a cat\n")
    module = fake(("SOURCES = ()", f"SOURCES = ({str(table)!r},)"))
    first = reproduce(module, tmp_path)
    reproduce(module, tmp_path)
    assert len(calls()) == 24
    table.write_text("image,caption\na.png,a dog\n")
    second = reproduce(module, tmp_path)
    assert len(calls()) == 24
    assert first.hashes.sources.keys() == {str(table)} and first.hashes.sources != second.hashes.sources


@pytest.mark.parametrize("left", [5, 23])
def test_a_line_cut_short_is_run_again(fake, calls, tmp_path, left):
    first = reproduce(fake(), tmp_path)
    calls()
    log = tmp_path / "log" / "fake.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:left]) + lines[left][:40])
    again = reproduce(fake(), tmp_path)
    assert len(calls()) == 24 - left and without_time(again) == without_time(first)
    assert len([json.loads(line) for line in log.read_text().splitlines()]) == 24


def test_lines_of_another_kind_are_passed_over(fake, calls, tmp_path):
    reproduce(fake(), tmp_path)
    calls()
    log = tmp_path / "log" / "fake.jsonl"
    log.write_text('{"slug": "fake", "old": 1}\n' + log.read_text())
    reproduce(fake(), tmp_path)
    assert calls() == []


RUNNER = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from rich.console import Console
from diptych.claims.reproduce import reproduce_method

folder = Path(sys.argv[1])
spec = spec_from_file_location("fake", folder / "fake.py")
module = module_from_spec(spec)
spec.loader.exec_module(module)
reproduce_method("fake", lambda slug: module, log=folder / "log" / "fake.jsonl", command="", versions={}, console=Console(quiet=True))
"""


def test_kill_9_in_the_middle_and_go_on(fake, calls, tmp_path):
    module = fake(("    def run(trial):", "    import time\n\n    def run(trial):\n        time.sleep(0.05)"))
    log = tmp_path / "log" / "fake.jsonl"
    process = subprocess.Popen([sys.executable, "-c", RUNNER, str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text().count("\n") >= 4):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = log.read_text().count("\n")
    assert 4 <= done < 24
    calls()
    result = reproduce(module, tmp_path, versions={})
    assert len(calls()) == 24 - done
    assert result.verdict == "reproduced" and log.read_text().count("\n") == 24


BROKEN = ("    def run(trial):", "    from diptych.errors import TrainingError\n\n    def run(trial):\n        {}")


def test_a_point_that_breaks_down_on_validation_is_not_chosen(fake, calls, tmp_path):
    body = "if trial.changes['bonus'] == 0.5:\n            raise TrainingError('the loss is nan')"
    result = reproduce(fake((BROKEN[0], BROKEN[1].format(body))), tmp_path)
    assert result.search.scores["baseline"] == [0.0, None, 0.25]
    assert result.search.chosen["baseline"] == {"bonus": 0.25}
    again = reproduce(fake((BROKEN[0], BROKEN[1].format(body))), tmp_path)
    assert again == result  # a breakdown is an answer, and is logged


def test_a_metric_that_is_not_finite_is_a_breakdown(fake, tmp_path):
    with pytest.raises(TrainingError, match=r"All 3 tries of baseline arm \(fake, sums\) broke down"):
        reproduce(fake((BROKEN[0], BROKEN[1].format("return float('nan')"))), tmp_path)


def test_a_breakdown_on_test_stops_and_names_the_trial(fake, tmp_path):
    body = "if (part, trial.seed) == ('method', 1):\n            raise TrainingError('the loss is nan')"
    with pytest.raises(TrainingError, match="The trial method arm, seed 1, test broke down: the loss is nan"):
        reproduce(fake((BROKEN[0], BROKEN[1].format(body))), tmp_path)


def test_progress_is_one_line_per_trial_in_a_file(fake, tmp_path):
    with (tmp_path / "out.txt").open("w") as file:
        reproduce(fake(), tmp_path, console=Console(file=file, width=200))
        reproduce(fake(), tmp_path, console=Console(file=file, width=200))
    lines = (tmp_path / "out.txt").read_text().splitlines()
    assert len(lines) == 48
    assert lines[0].startswith("  sums: baseline arm {'bonus': 0.0}, seed 0, validation: 0.0000 (")
    assert lines[47] == "  sums: further arm {'bonus': 0.5}, seed 2, test: 2.5500 (from the log)"


def test_progress_on_a_terminal_is_one_bar_that_says_what_runs(fake, tmp_path):
    with (tmp_path / "out.txt").open("w") as file:
        reproduce(fake(), tmp_path, console=Console(file=file, width=200, force_terminal=True))
    shown = (tmp_path / "out.txt").read_text()
    assert "fake, sums: further arm, seed 2, test" in shown and "24/24" in shown


def claim_with(*arms: Arm, **more) -> Claim:
    control = Control("Fails.", lambda numbers: True)
    return Claim("fake", "one", "Says.", "Here.", "metric", arms, control, **more)


def arm(part, name=None, grid=({},)) -> Arm:
    return Arm(name or f"{part} arm", part, lambda trial: 0.0, grid)


THREE = tuple(arm(part) for part in PARTS[:3])


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ((), "must return claims of different names; it returned 0"),
        ((claim_with(*THREE), claim_with(*THREE)), "must return claims of different names"),
        ((replace(claim_with(*THREE), slug="other"),), "says that it is of 'other'"),
        ((claim_with(*THREE[:2]),), "needs one arm that is its control; it has 0"),
        ((claim_with(*THREE, arm("baseline", "second")),), "needs one arm that is its baseline; it has 2"),
        ((claim_with(*THREE, arm("further", "method arm")),), "needs arms of different names"),
        ((claim_with(*THREE, arm("further", "control")),), "no further one called baseline, method, control"),
        ((claim_with(*THREE[1:], arm("baseline", grid=({"lr": 1.0}, {"lr": 1.0}))),), "as many points"),
        (
            (claim_with(*(arm(part, grid=({"lr": 1.0}, {"lr": 1.0})) for part in PARTS)),),
            "a point twice in the grid of baseline arm",
        ),
        ((claim_with(*THREE, arm("further", "f", ({}, {"lr": 1.0}))),), "as many points to choose from.*'f': 2"),
        ((claim_with(*(arm(part, grid=()) for part in PARTS)),), "as many points to choose from.*: 0"),
        ((claim_with(*THREE, seeds=(0, 1)),), "at least 3 different seeds"),
        ((claim_with(*THREE, seeds=(0, 1, 1)),), "at least 3 different seeds"),
        ((claim_with(*THREE, seeds=(0, 1, 2, 2)),), "at least 3 different seeds"),
    ],
)
def test_claims_that_are_not_on_equal_terms(claims, message):
    with pytest.raises(ConfigError, match=message):
        check(claims, "fake")


def test_a_claim_that_is_fine():
    check((claim_with(*THREE[1:], arm("baseline", "baseline"), arm("further"), arm("further", "another")),), "fake")


def test_seeds():
    claim = claim_with(*THREE, seeds=(5, 7, 6, 9))
    assert seeds_of(claim, None) == (5, 7, 6, 9)
    assert seeds_of(claim, 3) == (5, 7, 6)
    assert seeds_of(claim, 6) == (5, 7, 6, 9, 10, 11)
    with pytest.raises(ConfigError, match="at least 3 seeds, not 2"):
        seeds_of(claim, 2)


def test_every_claim_of_a_method_is_on_equal_terms():
    for slug, method in METHODS.items():
        module = None if method.state == "planned" else load_method(slug)
        if hasattr(module, "claim"):
            check(module.claim(), slug)


TINY = {
    "epochs": 2,
    "model": {
        "architecture": {
            "vision": {"image_size": 16, "width": 16, "depth": 1, "heads": 2, "mlp_width": 32},
            "text": {"width": 16, "depth": 1, "heads": 2, "mlp_width": 32},
            "image_head": {"dim": 8},
            "text_head": {"dim": 8},
            "image_policy": {"size": 16},
            "text_policy": {"length": 16},
        },
        "vocabulary": 300,
    },
    "data": {"batch_size": 8, "texts": [{}]},
}


def test_a_trial_that_trains(drawings, tmp_path, monkeypatch, capsys):
    """Two arms that differ in their loss, trained for real by the harness."""
    source, seen = drawings(20), []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def run(trial):
        model = trial.train(override(trial.mini(trial.changes["method"]), TINY), source)
        assert not model.training
        seen.append(model)
        return model.log_scale.item()

    bench = Bench(load_method, {})
    claim = replace(claim_with(*THREE), slug="clip")
    trained = Arm("trained", "further", run)
    first, again, other_seed, other_loss = (
        bench.run(claim, trained, seed, "test", {"method": slug})
        for seed, slug in ((0, "clip"), (0, "clip"), (1, "clip"), (0, "siglip"))
    )
    assert [first.samples, other_loss.samples] == [32, 32]  # two epochs of two batches of eight
    weights = [torch.cat([p.flatten() for p in model.vision.parameters()]) for model in seen]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert first.value == again.value
    assert first.recipes == other_seed.recipes == (fingerprint(override(clip.mini(), TINY)),) != other_loss.recipes
    assert first.data == (source.fingerprint,)
    assert set(first.code) == {"clip"} and set(other_loss.code) == {"clip", "siglip"}
    assert list(tmp_path.glob("tmp*")) == []  # no run directory stays
    assert capsys.readouterr() == ("", "")


def test_arms_of_one_seed_start_from_equal_weights_and_see_equal_batches(drawings, monkeypatch):
    started, seen = [], []

    def fit(objective, loader, recipe, folder, *, console):
        started.append(torch.cat([p.detach().flatten() for p in objective.model.vision.parameters()]))
        seen.append(next(iter(loader)).keys)
        assert console.quiet and recipe.evaluate_every == 0 and folder.is_dir()

    monkeypatch.setattr("diptych.claims.train.fit", fit)
    for module, seed in ((clip, 3), (siglip, 3), (clip, 4)):
        train_quietly(override(module.mini(), TINY), drawings(20), module, seed=seed)
    assert torch.equal(started[0], started[1]) and seen[0] == seen[1]
    assert not torch.equal(started[0], started[2]) and seen[0] != seen[2]


def test_the_log_survives_a_second_reader(fake, tmp_path):
    """A log that is only read leaves the file as it was."""
    reproduce(fake(), tmp_path)
    log: Path = tmp_path / "log" / "fake.jsonl"
    before = log.read_text()
    Log(log)
    assert log.read_text() == before


def test_arms_of_one_seed_may_share_what_they_train(drawings, tmp_path, monkeypatch):
    source, seen, runs = drawings(20), [], []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    quietly = train.train_quietly
    monkeypatch.setattr(
        train, "train_quietly", lambda *rest, **more: runs.append(more["seed"]) or quietly(*rest, **more)
    )

    def run(trial):
        model = trial.train(override(trial.mini("clip"), TINY), source, shared=True)
        seen.append(copy.deepcopy(model))
        with torch.no_grad():
            model.log_scale.zero_()  # each arm has a model of its own
        return seen[-1].log_scale.item()

    bench = Bench(load_method, {})
    claim = replace(claim_with(*THREE), slug="clip")
    outcomes = [
        bench.run(claim, Arm(name, "further", run), seed, "test", {})
        for seed, name in ((0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a"), (0, "c"))
    ]
    assert runs == [0, 1, 2, 0]  # only the latest two are kept
    assert [outcome.samples for outcome in outcomes] == [32] * 6 and len({o.recipes for o in outcomes}) == 1
    assert [o.value for o in outcomes][:2] == [outcomes[5].value] * 2 != [o.value for o in outcomes][2:4]
    weights = [torch.cat([p.flatten() for p in model.vision.parameters()]) for model in seen]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[5])
