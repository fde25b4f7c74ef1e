import io
import math

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from diptych.curate.normalise import NO_TEXT
from diptych.curate.pictures import NO_IMAGE, UNREADABLE
from diptych.curate.scores import LOW_SCORE, ScoreConfig, ScoreFilter
from diptych.errors import ConfigError
from diptych.models.embedding import embed_images, embed_texts
from diptych.types import Sample


def picture(colour: str) -> bytes:
    Image.new("RGB", (20, 20), colour).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


@pytest.fixture
def table():
    """Return 13 pairs: twelve of four images, one of them damaged and one missing, and one pair with blanks for a caption."""
    images = {"red": picture("red"), "green": picture("green"), "damaged": picture("red")[:40], "missing": None}
    rows = [(f"{name}#{i}", name, image, f"a {name} square {i}") for name, image in images.items() for i in range(3)]
    rows.append(("red#3", "red", images["red"], "  "))
    keys, groups, cells, captions = zip(*rows, strict=True)
    return pa.table({"key": keys, "group": groups, "image": pa.array(cells, pa.binary()), "caption": captions})


@pytest.fixture
def filtered(monkeypatch, make_model):
    """Return a function that curates with a tiny random model: {key: (reason, score)}."""
    model = make_model()
    monkeypatch.setattr("diptych.curate.scores.opened", lambda spec: model)

    def run(parts: list[pa.Table], **settings):
        step = ScoreFilter(ScoreConfig(on=True, **settings))
        curator = step.informed(step.merge([step.survey(part) for part in parts]))
        rows = [row for part in parts for row in curator.curate(part).to_pylist()]
        return {row["key"]: (row["reason"], row["score"]) for row in rows}

    return run


def test_scores_are_the_cosines_of_the_model(filtered, table, make_model):
    found, model = filtered([table], fraction=1.0), make_model()
    for row in table.to_pylist():
        reason, score = found[row["key"]]
        if row["group"] in ("red", "green") and row["caption"].strip():
            image = embed_images(model, [Sample("", row["image"], (), "")])
            assert reason is None and score == pytest.approx(
                float(embed_texts(model, [row["caption"]])[0] @ image[0]), abs=1e-5
            )
        else:
            expected = {"damaged": UNREADABLE, "missing": NO_IMAGE, "red": NO_TEXT}[row["group"]]
            assert (reason, score) == (expected, None)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.6, 1.0])
def test_a_fraction_keeps_the_best(filtered, table, fraction):
    found = filtered([table], fraction=fraction)
    best = {key: score for key, (reason, score) in found.items() if reason is None}
    rest = [score for reason, score in found.values() if reason == LOW_SCORE]
    assert len(best) == math.ceil(fraction * 6) and len(best) + len(rest) == 6
    assert min(best.values()) >= max(rest, default=-1)


def test_a_threshold(filtered, table):
    every = sorted(score for _, score in filtered([table], fraction=1.0).values() if score is not None)
    middle = (every[2] + every[3]) / 2
    found = filtered([table], fraction=None, threshold=middle)
    assert sum(reason is None for reason, _ in found.values()) == 3
    assert all((score < middle) == (reason == LOW_SCORE) for reason, score in found.values() if score is not None)


def test_equal_scores_at_the_end_are_chosen_by_key_and_not_by_place():
    keys = [f"{number}" for number in range(40)]
    scores = pa.table({"key": keys, "score": pa.array(np.zeros(40, np.float32)), "fault": pa.nulls(40, pa.string())})
    step = ScoreFilter(ScoreConfig(fraction=0.25))

    def kept_of(parts: list[pa.Table]) -> set[str]:
        return {row["key"] for row in step.merge(parts).to_pylist() if row["reason"] is None}

    chosen = kept_of([scores])
    assert len(chosen) == 10 and chosen != set(keys[:10])
    shuffled = scores.take(np.random.default_rng(0).permutation(40))
    assert kept_of([shuffled.slice(0, 7), shuffled.slice(7)]) == chosen


def test_rows_that_are_gone_and_no_rows(filtered, table):
    gone = table.append_column("reason", pa.array(["too short"] * table.num_rows))
    assert set(filtered([gone]).values()) == {("too short", None)}
    assert filtered([table.slice(0, 0)]) == {} and ScoreFilter().merge([]).num_rows == 0


@pytest.mark.parametrize("wrong", [{"fraction": None}, {"threshold": 0.2}, {"fraction": 0.0}, {"fraction": 1.5}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match="either a fraction"):
        ScoreConfig(**wrong)
