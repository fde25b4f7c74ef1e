import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from diptych.data.sources import Listed
from diptych.errors import EvaluationError
from diptych.evaluation.languages import evaluate_languages, evaluate_translations, languages_of
from diptych.evaluation.run import evaluate_model
from diptych.types import Sample, Text


@pytest.fixture
def source(drawings) -> Listed:
    """Return twelve drawings: all with English, nine with German, of which one twice, and a hard negative in French."""
    samples = []
    for i, sample in enumerate(drawings(12)):
        texts = [Text(f"drawing {i}", "caption", "en"), Text("faux", "hard_negative", "fr")]
        if i < 9:
            texts.append(Text(f"Bild {i}", "translation", "de"))
        if i == 4:
            texts.append(Text("Bild vier", "translation", "de"))
        samples.append(replace(sample, texts=tuple(texts)))
    return Listed(samples, "drawings")


@pytest.fixture
def model(make_model):
    return make_model(texts=("drawing 0 1 2", "Bild 3 4 vier"))


def test_each_language_is_measured_as_by_itself(model, source):
    found = evaluate_languages(model, source, seed=3)
    assert languages_of(source) == tuple(found.retrieval) == ("en", "de")
    for language, retrieval in found.retrieval.items():
        alone = evaluate_model(model, source, language=language, seed=3).retrieval
        for ours, theirs in zip(
            (retrieval.image_to_text, retrieval.text_to_image), (alone.image_to_text, alone.text_to_image), strict=True
        ):
            assert ours.recall == theirs.recall and ours.chance == theirs.chance
            assert np.array_equal(ours.ranks, theirs.ranks)


def test_mean_recall_is_the_mean_of_six_and_the_mean_that_of_languages(model, source):
    found = evaluate_languages(model, source)
    for language, retrieval in found.retrieval.items():
        six = [d.recall[k].value for d in (retrieval.image_to_text, retrieval.text_to_image) for k in (1, 5, 10)]
        chance = [d.chance[k] for d in (retrieval.image_to_text, retrieval.text_to_image) for k in (1, 5, 10)]
        interval = found.mean_recall[language]
        assert interval.value == pytest.approx(np.mean(six))
        assert found.chance[language] == pytest.approx(np.mean(chance))
        assert interval.low < interval.value < interval.high
    values = [interval.value for interval in found.mean_recall.values()]
    assert found.mean.value == pytest.approx(np.mean(values))
    assert found.mean_recall[found.lowest].value == min(values)


def test_images_are_resampled_with_their_texts_in_all_languages(model, source):
    """A language twice under two names tells nothing new: the interval is as wide as with one."""
    doubled = Listed(
        [replace(s, texts=(s.texts[0], replace(s.texts[0], role="translation", language="xx"))) for s in source]
    )
    found = evaluate_languages(model, doubled)
    assert found.mean == found.mean_recall["en"] == found.mean_recall["xx"]


def test_chosen_languages_and_the_table(model, source):
    found = evaluate_languages(model, source, ["de"])
    assert list(found.retrieval) == ["de"] and found.lowest == "de"
    lines = evaluate_languages(model, source).lines()
    assert len(lines) == 5 and {lines[2][2:4], lines[3][2:4]} == {"en", "de"} and lines[4].startswith("| mean |")
    assert {line.count("|") for line in lines} == {6}
    record = json.loads(json.dumps(found.to_json()))
    assert record["lowest"] == "de" and record["languages"]["de"]["image_to_text"]["recall@1"].keys() == {
        "value",
        "low",
        "high",
    }


def test_what_cannot_be_measured(model, source, drawings):
    with pytest.raises(EvaluationError, match=r"drawings has no texts in 'dee'. Did you mean 'de'\? Known: de, en"):
        evaluate_languages(model, source, ["en", "dee"])
    with pytest.raises(EvaluationError, match=r"No text of drawings has a language. Name columns caption_de"):
        evaluate_languages(model, drawings(3))
    with pytest.raises(EvaluationError, match=r"No sample of drawings has texts in both en and it. It has: en, de"):
        evaluate_translations(model, source, "it")


def test_translations_by_hand(monkeypatch, model):
    """Three sentences whose translations are known to be right, wrong, and equal to another's."""
    rows = [("a", "A"), ("b", "B"), ("c", "b-like"), ("d", None)]
    texts = [(Text(en, "caption", "en"), *([Text(de, "translation", "de")] if de else [])) for en, de in rows]
    source = Listed([Sample(f"{i}", None, pair, f"{i}") for i, pair in enumerate(texts)])
    points = {
        "a": (1, 0, 0),
        "A": (1, 0.1, 0),
        "b": (0, 1, 0),
        "B": (0.9, 0.5, 0),
        "c": (0, 0, 1),
        "b-like": (0, 1, 0.2),
    }

    def embed(model, texts):
        return normalize(torch.tensor([points[text] for text in texts], dtype=torch.float32), dim=-1)

    monkeypatch.setattr("diptych.evaluation.languages.embed_texts", embed)
    found = evaluate_translations(model, source, "de")
    assert found.image_to_text.ranks.tolist() == [0, 1, 0]  # "b" is nearer to "b-like" than to "B"
    assert found.text_to_image.ranks.tolist() == [0, 1, 1]
    assert found.image_to_text.candidates == 3


@pytest.mark.data
def test_real_sentences_without_images(model, data):
    from diptych.data.sources import Columns, open_source

    table = data / "raw-captions" / "multi30k_parallel_val.jsonl"
    source = open_source(table, columns=Columns(texts=("en", "de", "fr", "cs")))
    assert languages_of(source) == ("en", "de", "fr", "cs")
    found = evaluate_translations(model, Listed([source[i] for i in range(60)], "some"), "fr")
    assert found.image_to_text.candidates == 60
