import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.data.sources import Listed, Subset, open_source
from diptych.errors import EvaluationError
from diptych.evaluation.retrieval import retrieval
from diptych.evaluation.run import compare, compare_details, evaluate_model, measure_retrieval
from diptych.evaluation.stats import paired_difference
from diptych.models.dual import DualEncoder
from diptych.models.embedding import embed_source
from diptych.types import Sample, Text

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 210)}


def squares(count: int, *, captions: bool = True, labels: bool = True, seed: int = 0) -> Listed:
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        name = list(COLOURS)[i % 3]
        pixels = (np.array(COLOURS[name]) + rng.integers(-25, 25, (16, 16, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
        texts = (Text(f"{name} number {i}"), Text(f"a square {i}")) if captions else ()
        domain = "even" if i % 2 == 0 else "odd"
        samples.append(Sample(f"s{i}", file.getvalue(), texts, f"s{i}", name if labels else None, domain))
    return Listed(samples, "squares")


WORDS = ("red green blue square number",)


@pytest.fixture(scope="module")
def model(make_model) -> DualEncoder:
    return make_model(0, WORDS)


@pytest.fixture(scope="module")
def everything(model):
    return evaluate_model(model, squares(24), probe_source=squares(30, seed=1), name="tiny", seed=5)


def test_retrieval_has_exactly_the_documented_form(everything):
    record = json.loads(json.dumps(everything.to_json(), allow_nan=False))
    assert set(record["retrieval"]) == {"image_to_text", "text_to_image"}
    for direction in record["retrieval"].values():
        assert set(direction) == {"recall@1", "recall@5", "recall@10"}
        for number in direction.values():
            assert set(number) == {"value", "low", "high"}
            assert 0 <= number["low"] <= number["value"] <= number["high"] <= 1
    assert set(record["seconds"]) == {"data", "train", "evaluate", "total"}
    assert record["seconds"]["train"] == 0 and record["seconds"]["total"] > 0


def test_the_record_says_how_it_came_about(everything):
    record = everything.to_json()
    expected = {
        "model": "tiny",
        "source": "squares",
        "images": 24,
        "captions": 48,
        "skipped": 0,
        "seed": 5,
        "classes": 3,
    }
    assert expected.items() <= record["settings"].items()
    assert record["settings"]["fingerprint"] == squares(24).fingerprint
    assert record["settings"]["prompts"] == "photo" and len(record["settings"]["prompts_hash"]) == 16
    assert record["settings"]["probe_images"] == 30
    assert record["settings"]["precision"] in ("fp32", "bf16")
    assert record["notes"] == []


def test_chance_is_stated_for_every_headline_number(everything):
    chance = everything.to_json()["chance"]
    assert set(chance) == set(everything.headline())
    assert chance["zeroshot/top1"] == chance["linear_probe/accuracy"] == pytest.approx(1 / 3)
    assert chance["text_to_image/recall@5"] == pytest.approx(5 / 24)
    assert chance["image_to_text/recall@5"] == pytest.approx(1 - math.comb(46, 5) / math.comb(48, 5))


def many(count: int = 28) -> Listed:
    """Return squares of seven classes, so that there is a top-5, in two domains."""
    samples = [replace(sample, label=f"name {i % 7}") for i, sample in enumerate(squares(count, captions=False))]
    return Listed(samples, "many")


def test_details_are_the_further_numbers_of_zero_shot(model, everything):
    found = evaluate_model(model, many())
    scores, ranks, correct = found.details(), found.zeroshot.ranks, found.zeroshot.correct
    assert list(scores) == ["zeroshot/top5", "zeroshot/mean_per_class", "zeroshot/top1/even", "zeroshot/top1/odd"]
    assert scores["zeroshot/top5"].value == (ranks < 5).mean()
    assert scores["zeroshot/mean_per_class"].value == pytest.approx(correct.reshape(4, 7).mean(0).mean())
    assert scores["zeroshot/top1/odd"].value == correct[1::2].mean()
    assert [found.chance(name) for name in scores] == pytest.approx([5 / 7, 1 / 7, 1 / 7, 1 / 7])
    assert "zeroshot/top5" not in everything.details()  # of three classes
    assert evaluate_model(model, squares(6, labels=False)).details() == {}


def test_details_are_compared_over_the_same_items(make_model, model):
    first, second = (evaluate_model(one, many()) for one in (make_model(1, WORDS), model))
    found = compare_details(first, second, seed=2)
    assert list(found) == list(first.details())
    for name, difference in found.items():
        assert difference.value == pytest.approx(second.details()[name].value - first.details()[name].value)
        assert difference.low <= difference.value <= difference.high
    hits = (second.zeroshot.ranks < 5).astype(float), (first.zeroshot.ranks < 5).astype(float)
    assert found["zeroshot/top5"] == paired_difference(hits[1], hits[0], seed=2)
    assert all((d.value, d.low, d.high) == (0, 0, 0) for d in compare_details(first, first).values())
    with pytest.raises(EvaluationError, match="differ in images"):
        compare_details(first, evaluate_model(model, many(21)))
    captions = evaluate_model(model, squares(6, labels=False))
    assert compare_details(captions, captions) == {}


def test_retrieval_is_that_of_the_embeddings(model, everything):
    found = embed_source(model, squares(24), precision="auto")
    plain = retrieval(found.images, found.texts, torch.tensor(found.owner), seed=5)
    assert everything.retrieval.image_to_text.recall == plain.image_to_text.recall
    assert everything.retrieval.text_to_image.ranks.tolist() == plain.text_to_image.ranks.tolist()


def test_a_random_image_tower_still_tells_colours(everything):
    assert everything.linear_probe.accuracy.value == everything.nearest_neighbours.accuracy.value == 1.0


def test_what_is_measured_follows_from_the_samples(model):
    captions, labels = squares(6, labels=False), squares(6, captions=False)
    assert set(evaluate_model(model, captions).to_json()) & {"retrieval", "zeroshot"} == {"retrieval"}
    assert set(evaluate_model(model, labels).to_json()) & {"retrieval", "zeroshot"} == {"zeroshot"}
    assert evaluate_model(model, squares(6), tasks=("zeroshot",)).retrieval is None
    assert set(evaluate_model(model, labels).zeroshot.by_domain) == {"even", "odd"}
    assert evaluate_model(model, Subset(squares(6), [0, 3], "red")).zeroshot is None  # one class only


def test_what_the_samples_do_not_allow_is_refused(model):
    one_class = Subset(squares(6, captions=False), [0, 3], "red")
    with pytest.raises(EvaluationError, match="neither captions nor labels of two classes"):
        evaluate_model(model, one_class)
    with pytest.raises(EvaluationError, match="at least two classes"):
        evaluate_model(model, one_class, tasks=("zeroshot",))
    with pytest.raises(EvaluationError, match="no sample has one"):
        evaluate_model(model, squares(6, captions=False), tasks=("retrieval",))
    with pytest.raises(EvaluationError, match=r"3 known labels \(blue, green, red, ...\); found \['None'\]"):
        some = squares(6)
        some.samples[2] = replace(some.samples[2], label=None)
        evaluate_model(model, some, tasks=("zeroshot",))
    with pytest.raises(EvaluationError, match=r"2 known labels \(green, red, ...\); found \['blue'\]"):
        evaluate_model(model, squares(6), probe_source=Subset(squares(6), [0, 1, 3, 4], "some"))


def test_notes_say_what_is_left_out_or_means_nothing(model):
    source = squares(6)
    source.samples[1] = replace(source.samples[1], image=b"")
    source.samples[2] = replace(source.samples[2], texts=())
    notes = evaluate_model(model, source).notes
    assert notes[0].startswith("1 images could not be read and were left out. First: 1: 's1'")
    assert notes[1] == "1 images without a caption take no part in retrieval."
    assert "image_to_text: there are only 8 candidates, so recall@10 is 1 for every model." == notes[2]
    assert "text_to_image: there are only 4 candidates, so recall@5, recall@10 is 1 for every model." == notes[3]


def test_equal_captions_and_groups_are_right_answers(model):
    source = squares(3)
    for i, text in enumerate(["A  red cat", "a red cat", "a dog"]):
        source.samples[i] = replace(source.samples[i], texts=(Text(text),))
    found = measure_retrieval(embed_source(model, source))
    assert found.image_to_text.chance[1] == pytest.approx((2 + 2 + 1) / 9)
    grouped = Listed([replace(sample, group="all") for sample in source.samples])
    assert measure_retrieval(embed_source(model, grouped)).image_to_text.recall[1].value == 1.0


def test_another_language_gives_other_numbers_on_the_same_images(model):
    source = squares(4)
    source.samples = [
        replace(s, texts=(*s.texts, Text(f"Quadrat {i}", "translation", "de"))) for i, s in enumerate(source.samples)
    ]
    found = evaluate_model(model, source, tasks=("retrieval",), language="de")
    assert found.settings["captions"] == 4 and found.settings["language"] == "de"
    assert found.embedded.captions[0] == "Quadrat 0"


def test_the_difference_of_two_models_is_paired(make_model, everything):
    other = evaluate_model(make_model(1, WORDS), squares(24), probe_source=squares(30, seed=1), seed=5)
    found = compare(everything, other)
    assert set(found) == set(everything.headline())
    for name, difference in found.items():
        assert difference.value == pytest.approx(other.headline()[name].value - everything.headline()[name].value)
    assert all((d.value, d.low, d.high) == (0, 0, 0) for d in compare(everything, everything).values())


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (squares(21), {}, "differ in images, captions, labels"),
        (squares(24, captions=False), {}, "differ in captions"),
        (squares(24), {"prompts": "name"}, "differ in prompts"),
        (squares(24), {"probe_source": squares(27)}, "differ in probe training samples"),
    ],
)
def test_different_items_are_not_compared(model, everything, source, options, message):
    with pytest.raises(EvaluationError, match=message):
        compare(everything, evaluate_model(model, source, **options))


def test_numbers_only_one_of_two_has_are_left_out(model, everything):
    found = compare(everything, evaluate_model(model, squares(24), tasks=("zeroshot",), seed=5))
    assert set(found) == {"zeroshot/top1"}


@pytest.mark.data
@pytest.mark.parametrize(
    ("spec", "parts"),
    [("flickr8k-1k:dev", {"retrieval"}), ("pacs", {"zeroshot"}), ("nwpu-resisc12", {"zeroshot"})],
)
def test_real_samples_go_all_the_way(model, data, spec, parts):
    del data  # skips when there is none
    whole = open_source(spec)
    source = Subset(whole, range(0, len(whole), max(1, len(whole) // 60)), spec)
    found = evaluate_model(model, source)
    assert set(found.to_json()) & {"retrieval", "zeroshot"} == parts
    if spec == "pacs":
        assert len(found.zeroshot.by_domain) == 4 and len(found.zeroshot.classes) == 7
