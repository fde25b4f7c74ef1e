import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diptych.data.tokenizer import TextPolicy, Tokenizer
from diptych.data.words import UniversalWord, placed_words, word_spans
from diptych.errors import ConfigError
from diptych.models import words
from diptych.models.embedding import embed_texts
from diptych.models.words import (
    UNKNOWN,
    KeyWords,
    attacked_places,
    embed_slots,
    key_words,
    nearest_row,
    reworded,
    word_importance,
    word_slots,
)

TEXTS = ("a red circle", "a blue square", "a small red square above a blue circle")


def counted(texts: list[str]) -> torch.Tensor:
    """Embed a text as how often it has certain words; what is unknown counts little."""
    known = ("red", "blue", UNKNOWN, "circle")
    counts = torch.tensor(
        [[text.split().count(word) * (0.1 if word == UNKNOWN else 1) for word in known] for text in texts]
    )
    return F.normalize(counts + 0.01, dim=-1)


@pytest.mark.data
def test_official_importance_and_choice_of_a_word(golden):
    numbers = golden("c_pgc", "text_steps")
    vocabulary = {word: row for row, word in enumerate(numbers["vocabulary"].tolist())}

    def embed(texts: list[str]) -> torch.Tensor:
        rows = [[numbers["token_table"].shape[0] - 2, *(vocabulary[word] for word in text.split())] for text in texts]
        weights = numbers["position_weight"]
        means = [(numbers["token_table"][ids] * weights[: len(ids), None]).mean(0) for ids in rows]
        return F.normalize(torch.from_numpy(np.stack(means) @ numbers["W_txt"].T), dim=-1)

    for texts, expected, places in zip(
        numbers["texts"], numbers["importance"], numbers["replaced_token_index"], strict=True
    ):
        spans = [word_spans(text) for text in texts.tolist()]
        found = word_importance(embed, texts.tolist(), spans)
        for row, scores in enumerate(found):
            np.testing.assert_allclose(scores, expected[row][: len(scores)], rtol=1e-8, atol=1e-14)
            assert (expected[row][len(scores) :] == -1).all()
        assert [key + 1 for key in key_words(embed, texts.tolist(), spans)] == places[:, 0].tolist()


@pytest.mark.data
def test_official_nearest_word(golden):
    numbers = golden("c_pgc", "word")
    table, spared = torch.from_numpy(numbers["word_table"]), {"w0", "w2"}
    allowed = [number for number in numbers["allowed_ids"].tolist() if f"w{number}" not in spared]
    for vector, chosen in zip(numbers["embedding"], numbers["chosen_ids"].tolist(), strict=True):
        assert allowed[nearest_row(torch.from_numpy(vector), table[allowed])] == chosen


def test_importance_is_the_divergence_of_softmaxes():
    text = "red circle"
    (found,) = word_importance(counted, [text], [word_spans(text)])
    p, *others = (
        F.softmax(row.double(), dim=0).tolist() for row in counted([text, f"{UNKNOWN} circle", f"red {UNKNOWN}"])
    )
    for score, q in zip(found.tolist(), others, strict=True):
        assert score == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert (found > 0.01).all()


def test_words_that_change_nothing_matter_nothing():
    (found,) = word_importance(lambda texts: torch.eye(3)[[0] * len(texts)], ["one two"], [[(0, 3), (4, 7)]])
    assert found.tolist() == [0, 0]
    assert word_importance(counted, ["red", "blue"], [[], [(0, 4)]])[0].shape == (0,)
    assert key_words(counted, ["red", "circle blue"], [[], word_spans("circle blue")])[0] is None


def test_texts_asked_together_are_asked_alone():
    spans = [word_spans(text) for text in TEXTS]
    together = word_importance(counted, TEXTS, spans)
    for row, text in enumerate(TEXTS):
        assert torch.equal(together[row], word_importance(counted, [text], [spans[row]])[0])


def test_stop_words_stay_and_equal_texts_are_asked_about_once(make_model, monkeypatch):
    asked: list[str] = []

    def embed(model, texts):
        asked.extend(texts)
        return counted(texts)

    monkeypatch.setattr(words, "embed_texts", embed)
    monkeypatch.setattr(words, "_TOGETHER", 2)
    texts = ["The red thing", "the", "blue, the red", "The red thing"]
    places = attacked_places(make_model(), texts, "en")
    assert places[0] == places[3] == (4, 7) and places[1] is None
    assert len(asked) == 3 + (2 + 0 + 2)  # each text, and each of its words that is no stop word
    assert reworded(texts, places, UniversalWord("xyz"))[:2] == ["The xyz thing", "the"]


def test_a_vector_in_a_slot_is_the_word_whose_vector_it_is(make_model):
    """The table's row of "blue" in place of "red" gives what the texts with "blue" give; also where no token begins a text."""
    for begin in (2, None):
        model = make_model(texts=list(TEXTS) * 4).eval()
        model.tokenizer = Tokenizer(model.tokenizer.engine, TextPolicy(length=16, begin=begin))
        blue = model.tokenizer.sequences(["blue"])[0][0 if begin is None else 1]
        texts = ["red circle above", "a square above a red circle"]
        places = [next(w for w in placed_words(model.tokenizer, t) if t[slice(*w.span)] == "red") for t in texts]
        slots = word_slots(model.tokenizer, texts, places)
        with torch.no_grad():
            found = embed_slots(model, slots, model.text.token_embeddings(torch.tensor([[blue]]))[0, 0])
            expected = embed_texts(model, [text.replace("red", "blue") for text in texts])
        torch.testing.assert_close(found, expected)


def test_a_slot_has_one_token_where_the_word_had_several(make_model):
    model = make_model()
    text = "a zebra red"
    place = placed_words(model.tokenizer, text)[1]
    assert len(place.tokens) > 1
    slots = word_slots(model.tokenizer, [text], [place])
    (ids,) = model.tokenizer.sequences([text])
    kept = ids[: place.tokens[0] + 1] + ids[place.tokens[-1] + 1 :]
    assert slots.tokens.ids[0].tolist() == kept and slots.tokens.mask.all()
    assert slots.place.tolist() == [place.tokens[0]]


def test_the_gradient_reaches_the_vector_and_the_texts_do_not_mix(make_model):
    model = make_model()
    texts = ["a red circle", "a blue square"]
    slots = word_slots(model.tokenizer, texts, [placed_words(model.tokenizer, text)[1] for text in texts])
    vector = torch.zeros(16, requires_grad=True)
    embedded = embed_slots(model, slots, vector)
    embedded[0, 0].backward(inputs=[vector])
    assert vector.grad.abs().max() > 0
    for row in range(2):
        alone = word_slots(model.tokenizer, texts[row : row + 1], [placed_words(model.tokenizer, texts[row])[1]])
        torch.testing.assert_close(embed_slots(model, alone, vector)[0], embedded[row])


def test_the_key_word_of_a_text_is_looked_for_once(make_model, monkeypatch):
    model, asked = make_model(), []
    monkeypatch.setattr(
        words, "embed_texts", lambda model, texts: asked.append(len(texts)) or embed_texts(model, texts)
    )
    texts = ["a red circle", " a  blue square "]
    found = KeyWords(model, [*texts, texts[0]])
    keys = model.tokenizer(texts).key.tolist()
    first = found.slots([keys[0], keys[0]])
    assert asked == [1 + 3]
    both = found.slots([keys[1], keys[0]])
    assert asked == [4, 4]
    again = found.slots([keys[1], keys[0]])
    assert asked == [4, 4]
    assert torch.equal(both.tokens.ids, again.tokens.ids) and torch.equal(both.place, again.place)
    for row, text in enumerate(["a blue square", "a red circle"]):
        placed = placed_words(model.tokenizer, text)
        (key,) = key_words(partial(embed_texts, model), [text], [[word.span for word in placed]])
        assert both.place[row] == placed[key].tokens[0]
    assert torch.equal(first.place, both.place[1:].expand(2))


def test_a_tower_without_embeddings_of_tokens_says_what_was_needed(make_model):
    from diptych.models.text import AbstractTextTower

    class Opaque(AbstractTextTower):
        width, by_row = 16, True

        def forward(self, ids, mask, **options):
            raise AssertionError

    model = make_model()
    slots = word_slots(model.tokenizer, ["a red circle"], [placed_words(model.tokenizer, "a red circle")[1]])
    model.text = Opaque()
    with pytest.raises(ConfigError, match="Opaque has no token_embeddings"):
        embed_slots(model, slots, torch.zeros(16))
