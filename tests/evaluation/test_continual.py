import json
import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch.nn.functional import normalize

from diptych.errors import EvaluationError
from diptych.evaluation.continual import (
    ItemTrace,
    Trace,
    angles,
    average,
    backward_transfer,
    forgetting,
    inner_angles,
    last,
    read_trace,
    rotation_gap,
    seen_accuracy,
    transfer,
)

A = np.array([[0.8, 0.4, 0.5], [0.9, 0.7, 0.3], [0.6, 0.6, 0.9]])


def published(data) -> list[str]:
    with np.load(data.parent / "golden" / "zscl.npz") as archive:
        return sorted({name.partition(".")[0] for name in archive.files if name.startswith("metrics_")})


def test_the_published_matrices_give_the_published_numbers(data, golden):
    cases = published(data)
    assert len(cases) >= 3
    for case in cases:
        numbers = golden("zscl", case)
        scores = numbers["accuracy"]
        found = [round(metric(scores), 1) for metric in (transfer, average, last)]
        assert_allclose(found, numbers["transfer_avg_last_rounded"], rtol=0, atol=1e-9, err_msg=case)
        per_task = [scores[:task, task].mean() for task in range(1, len(scores))]
        assert_allclose(per_task, numbers["transfer_per_task"], rtol=1e-12, err_msg=case)
        assert_allclose(transfer(scores), np.mean(numbers["transfer_per_task"]), rtol=1e-12, err_msg=case)


def test_the_zero_shot_row_of_the_paper():
    row = [24.3, 88.4, 68.2, 44.6, 54.9, 71.0, 88.5, 59.4, 89.0, 64.7, 65.2]
    scores = np.tile(row, (11, 1))
    assert [round(metric(scores), 1) for metric in (transfer, average, last)] == [69.4, 65.3, 65.3]
    assert forgetting(scores) == backward_transfer(scores) == 0


def test_by_hand():
    assert transfer(A) == pytest.approx((0.4 + (0.5 + 0.3) / 2) / 2)
    assert average(A) == pytest.approx(5.7 / 9)
    assert last(A) == pytest.approx(0.7)
    assert forgetting(A) == pytest.approx(((0.9 - 0.6) + (0.7 - 0.6)) / 2)
    assert backward_transfer(A) == pytest.approx(((0.6 - 0.8) + (0.6 - 0.7)) / 2)


def test_classes_seen_so_far_by_hand():
    assert_allclose(seen_accuracy(A, [10, 30, 60]), [0.8, (9 + 21) / 40, (6 + 18 + 54) / 100])
    assert_allclose(seen_accuracy(A[:1, :1], [5]), [0.8])
    with pytest.raises(EvaluationError, match=r"3 tasks.*\[1, 2\]"):
        seen_accuracy(A, [1, 2])


@pytest.mark.parametrize(
    ("scores", "words"),
    [(A[:2], "2 x 3"), (A[:1, :1], "1 x 1"), (np.where(A > 0.8, np.nan, A), "2 missing")],
    ids=["not square", "one task", "missing"],
)
def test_a_matrix_that_is_none_is_refused(scores, words):
    for metric in (transfer, average, last, forgetting, backward_transfer):
        if metric in (average, last) and scores.shape == (1, 1):
            assert metric(scores) == 0.8
            continue
        with pytest.raises(EvaluationError, match=words):
            metric(scores)


@pytest.fixture
def trace() -> Trace:
    rows = ((0.3, 0.4, 0.5, 0.2), *((*row, probe) for row, probe in zip(A.tolist(), (0.2, 0.15, 0.05), strict=True)))
    return Trace("top-1", ("a", "b", "c"), ("a", "b", "c", "probe"), tuple(map(tuple, rows)))


def test_a_trace_sums_itself_up(trace):
    assert_allclose(trace.matrix, A)
    assert trace.summary["transfer"] == transfer(A) and trace.summary["last"] == last(A)
    assert trace.summary["retention/probe"] == pytest.approx(0.25)


def test_a_trace_on_the_disk_is_the_same(trace, tmp_path):
    trace.save(tmp_path / "trace.json")
    assert read_trace(tmp_path / "trace.json") == trace
    assert json.loads((tmp_path / "trace.json").read_text())["summary"]["average"] == pytest.approx(5.7 / 9)


def test_nothing_is_left_of_nothing(trace, tmp_path):
    rows = tuple((*row[:3], 0.0) for row in trace.scores)
    none = Trace(trace.metric, trace.stages, trace.tasks, rows)
    assert math.isnan(none.summary["retention/probe"])
    none.save(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["summary"]["retention/probe"] is None


def test_the_table(trace):
    lines = trace.table().splitlines()
    assert lines[0] == "| top-1 after | a | b | c | probe |"
    assert lines[2] == "| start | 30.0 | 40.0 | 50.0 | 20.0 |"
    assert lines[4] == "| b | 90.0 | **70.0** | 30.0 | 15.0 |"


def test_one_stage_is_saved_and_shown(tmp_path):
    once = Trace("top-1", ("a",), ("a", "probe"), ((0.3, 0.4), (0.8, 0.1)))
    assert once.summary == {"average": 0.8, "last": 0.8, "retention/probe": 0.25}
    once.save(tmp_path / "trace.json")
    assert read_trace(tmp_path / "trace.json") == once
    assert once.table().splitlines()[3] == "| a | **80.0** | 10.0 |"
    items = ItemTrace("top-1", ("a",), ("a",), (((0.0, 1.0),), ((1.0, 1.0),)))
    assert set(items.intervals()) == {"average", "last"}


@pytest.fixture
def item_trace() -> ItemTrace:
    """Return hits on 40, 25, 30 and 50 items, which later stages have in common with earlier ones."""
    rng, columns = np.random.default_rng(5), []
    for count in (40, 25, 30, 50):
        easy = rng.random(count)
        columns.append([tuple((rng.random(count) * 0.6 + easy * 0.4 < 0.6).astype(float).tolist()) for _ in range(4)])
    return ItemTrace("top-1", ("a", "b", "c"), ("a", "b", "c", "probe"), tuple(zip(*columns, strict=True)))


def test_intervals_are_those_of_a_loop_over_resamples(item_trace):
    found = item_trace.intervals(seed=3)
    metrics = {
        "transfer": transfer,
        "average": average,
        "last": last,
        "forgetting": forgetting,
        "backward_transfer": backward_transfer,
    }

    def resampled(columns):
        """Yield matrices of means over items that are drawn for all stages together."""
        rng = np.random.default_rng(3)
        draws = [rng.multinomial(len(each[0]), [1 / len(each[0])] * len(each[0]), size=2000) for each in columns]
        for drawn in zip(*draws, strict=True):
            rows = [
                [np.repeat(hits, times).mean() for hits in each] for each, times in zip(columns, drawn, strict=True)
            ]
            yield np.array(rows).T

    columns = list(zip(*item_trace.items, strict=True))
    matrices = [matrix[1:] for matrix in resampled(columns[:3])]
    for name, metric in metrics.items():
        expected = np.percentile([metric(matrix) for matrix in matrices], [2.5, 97.5])
        assert_allclose([found[name].low, found[name].high], expected, rtol=1e-9, err_msg=name)
    left = [matrix[-1, 0] / matrix[0, 0] for matrix in resampled(columns[3:])]
    assert_allclose([found["retention/probe"].low, found["retention/probe"].high], np.percentile(left, [2.5, 97.5]))


def test_their_values_are_the_numbers_themselves(item_trace, tmp_path):
    found, summary = item_trace.intervals(), item_trace.trace.summary
    assert {name: interval.value for name, interval in found.items()} == pytest.approx(summary, rel=1e-12)
    assert all(interval.low < interval.value < interval.high for interval in found.values())
    item_trace.save(tmp_path / "trace.json")
    assert read_trace(tmp_path / "trace.json") == item_trace.trace
    record = json.loads((tmp_path / "trace.json").read_text())
    assert record["intervals"]["transfer"] == found["transfer"].to_json()


def test_items_are_drawn_together_for_all_stages():
    """A model that never changes has forgotten nothing, for certain; items drawn anew for each stage would not show that."""
    hits = tuple(float(number % 3 == 0) for number in range(60))
    found = ItemTrace("top-1", ("a", "b"), ("a", "b", "probe"), ((hits,) * 3,) * 3).intervals()
    for name, value in (("forgetting", 0), ("backward_transfer", 0), ("retention/probe", 1)):
        assert (found[name].low, found[name].high) == (value, value)
    assert found["average"].high - found["average"].low > 0.1


def test_what_is_left_of_a_start_near_zero_has_no_interval():
    start, after = (1.0, *[0.0] * 9), (1.0,) * 10  # a third of the resamples have no hit at the start
    trace = ItemTrace("top-1", ("a", "b"), ("a", "b", "probe"), ((after, after, start), *((after,) * 3,) * 2))
    assert "retention/probe" in trace.trace.summary and "retention/probe" not in trace.intervals()


@pytest.mark.parametrize("second", [((1.0,),), ((1.0, 0.0, 1.0),), ((),)])
def test_other_items_after_a_stage_are_refused(second):
    with pytest.raises(EvaluationError, match="same items, at least one, after every stage"):
        ItemTrace("top-1", ("a",), ("a",), (((1.0, 0.0),), second))


def test_the_heat_map(trace, tmp_path):
    pytest.importorskip("matplotlib")
    trace.plot(tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("stages", "tasks", "rows", "words"),
    [(("a",), ("b",), 2, "first columns"), (("a",), ("a",), 3, "make 2 rows of 1")],
)
def test_a_trace_that_does_not_fit_is_refused(stages, tasks, rows, words):
    with pytest.raises(EvaluationError, match=words):
        Trace("top-1", stages, tasks, ((0.5,),) * rows)


def test_angles_by_hand():
    one = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    other = torch.tensor([[0.0, 2.0], [-1.0, 0.0], [1.0, 1.0], [1.0, 1e-9]])
    assert_allclose(angles(one, other), [math.pi / 2, math.pi, math.pi / 4, 1e-9], rtol=1e-6)


def test_turning_both_towers_alike_leaves_the_inner_angles_and_no_gap():
    generator = torch.Generator().manual_seed(0)
    image, text = normalize(torch.randn(2, 20, 6, generator=generator, dtype=torch.float64), dim=-1)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    assert_allclose(inner_angles(image @ turn), inner_angles(image), atol=1e-7)
    assert inner_angles(image)[0, 0] == 0
    assert rotation_gap((image, image), (text, text)) == 0
    assert rotation_gap((image, image @ turn), (text, text)) == pytest.approx(angles(image, image @ turn).mean().item())
