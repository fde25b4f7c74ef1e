import math
from collections import Counter

import numpy as np
import pytest

from diptych.data.loader import TextColumn
from diptych.data.texts import ShuffledTexts, WithTexts, choose_text
from diptych.errors import ConfigError, DataError
from diptych.types import Sample, Text


def captions(source) -> list[str]:
    return [source.texts(i)[0].text for i in range(len(source))]


@pytest.mark.parametrize(
    ("rewrite", "min_words", "count_spaces", "kept"),
    [
        ("tree", 2, False, False),
        ("", 2, False, False),
        (" taxi", 2, False, False),
        (" taxi", 2, True, True),
        ("a  ", 2, True, True),
        ("", 2, True, False),
        ("a tree", 2, False, True),
        ("a tree", 3, False, False),
        ("tree", 1, False, True),
    ],
)
def test_a_text_of_too_few_words_gives_way_to_the_original(rewrite, min_words, count_spaces, kept):
    texts = [Text("moon"), Text(rewrite, "rewrite")]
    assert choose_text(texts, 1, min_words=min_words, count_spaces=count_spaces) is texts[kept]


def test_the_original_may_be_short():
    assert choose_text([Text("moon"), Text("a full moon", "rewrite")], 0, min_words=2).text == "moon"


def test_a_column_may_draw_every_text_equally_often():
    texts = (Text("t0 original"), *(Text(f"t{i} rewrite", "rewrite") for i in range(1, 5)), Text("no", "hard_negative"))
    column, rng, draws = TextColumn(("caption", "rewrite"), by="text"), np.random.default_rng(0), 100_000
    found = Counter(column.draw(Sample("x", None, texts, "x"), rng) for _ in range(draws))
    assert set(found) == {text.text for text in texts[:5]}
    spread = 3 * math.sqrt(draws * 0.2 * 0.8)
    assert all(abs(count - draws / 5) < spread for count in found.values())


def test_a_column_replaces_short_texts_by_the_first_of_its_first_role():
    sample = Sample("x", None, (Text("tree", "rewrite"), Text("an oak in the park")), "x")
    column, rng = TextColumn(("caption", "rewrite"), by="text", min_words=2), np.random.default_rng(0)
    assert {column.draw(sample, rng) for _ in range(50)} == {"an oak in the park"}


def test_drawing_by_text_takes_no_weights():
    with pytest.raises(ConfigError, match="weights"):
        TextColumn(("caption", "rewrite"), (1.0, 2.0), by="text")


def test_added_texts_come_last_and_the_rest_stays(drawings):
    source = drawings(3)
    more = WithTexts(source, [[Text(f"made {i}", "synthetic")] for i in range(3)])
    assert [text.text for text in more.texts(1)] == ["a green circle 0", "made 1"]
    assert more[1].texts == more.texts(1) and more[1].image == source[1].image and more[1].key == "s1"
    assert more.fingerprint != source.fingerprint
    with pytest.raises(DataError, match=r"3 samples; texts came for 2"):
        WithTexts(source, [[], []])


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_exactly_the_share_has_the_captions_of_others(drawings, share):
    source = drawings(12)
    shuffled = ShuffledTexts(source, share, seed=3)
    own, found = captions(source), captions(shuffled)
    changed = [a != b for a, b in zip(own, found, strict=True)]
    assert sum(changed) == round(12 * share) and changed == shuffled.moved
    assert sorted(found) == sorted(own)  # nothing is lost or doubled
    assert [sample.image for sample in shuffled] == [sample.image for sample in source]
    assert [sample.key for sample in shuffled] == [sample.key for sample in source]


def test_shuffling_repeats_itself_and_grows(drawings):
    source = drawings(12)
    half = ShuffledTexts(source, 0.5, seed=3)
    assert (
        captions(half) == captions(ShuffledTexts(source, 0.5, seed=3)) != captions(ShuffledTexts(source, 0.5, seed=4))
    )
    more = ShuffledTexts(source, 0.75, seed=3)
    assert all(after for before, after in zip(half.moved, more.moved, strict=True) if before)


def test_other_roles_stay_with_their_image(drawings):
    source = WithTexts(drawings(12), [[Text(f"made {i}", "synthetic")] for i in range(12)])
    shuffled = ShuffledTexts(source, 1.0)
    assert [shuffled.texts(i)[-1].text for i in range(12)] == [f"made {i}" for i in range(12)]
    other = ShuffledTexts(source, 1.0, roles=("synthetic",))
    assert sorted(t.text for i in range(12) for t in other.texts(i) if t.role == "caption") == sorted(captions(source))
    assert all(other[i].texts[0].text != f"made {i}" for i in range(12))


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_out_of_range_is_refused(drawings, share):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        ShuffledTexts(drawings(2), share)
