import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.data.text_changes import STOP_WORDS, SYNONYMS, TextChange, change_text
from diptych.errors import ConfigError

CAPTION = "Two small cats, left of a tilted dog and a House."
STRONG = TextChange(stop_word_rate=0.8, synonym_weight=0.4, swap_weight=0.4, delete_weight=0.2)


def change(text: str, changes: TextChange, seed: int = 0, language: str | None = None) -> str:
    return change_text(text, changes, np.random.default_rng(seed), language=language)


def many(text: str, changes: TextChange, count: int = 400) -> list[str]:
    rng = np.random.default_rng(0)
    return [change_text(text, changes, rng) for _ in range(count)]


def test_the_default_changes_nothing_and_draws_nothing():
    rng = np.random.default_rng(5)
    assert change_text("  kept   as it\tis ", TextChange(), rng, language="ja") == "  kept   as it\tis "
    assert rng.random() == np.random.default_rng(5).random()


def test_stop_words_go_whatever_their_case_and_punctuation():
    assert change(CAPTION, TextChange(stop_word_rate=1.0)) == "Two small cats, left tilted dog House."
    assert change("The, dog (of) a MAN", TextChange(stop_word_rate=1.0)) == "dog MAN"
    assert change("Der Hund ist über dem Haus", TextChange(stop_word_rate=1.0), language="de") == "Hund über Haus"


def test_words_of_place_number_and_denial_stay():
    for word in "above below under over left right behind beside between two no not without".split():
        assert word not in STOP_WORDS["en"]


def test_the_rate_is_a_rate():
    found = Counter(many("a dog", TextChange(stop_word_rate=0.8), 1000))
    assert set(found) == {"a dog", "dog"} and found["dog"] == pytest.approx(800, abs=51)  # four standard deviations


def test_a_text_is_never_emptied():
    assert change("the of", TextChange(stop_word_rate=1.0)) == "the of"
    assert change("the, ?!", TextChange(stop_word_rate=1.0)) == "the, ?!"
    deleting = TextChange(delete_weight=1.0, delete_rate=1.0)
    assert change("red dog", deleting) == "red dog"


def test_one_edit_is_drawn_by_weight():
    text = "photo w1 w2 w3 w4 w5 w6 w7 w8 w9"
    kinds = Counter()
    for found in many(text, TextChange(synonym_weight=1, swap_weight=2, delete_weight=1, delete_rate=0.5), 1000):
        words, before = found.split(), text.split()
        swapped = sorted(words) == sorted(before) and words != before
        kinds["swap" if swapped else "delete" if len(words) < 10 else "synonym"] += 1
    assert kinds["swap"] == pytest.approx(500, abs=64)
    assert kinds["synonym"] == pytest.approx(250, abs=55) and kinds["delete"] == pytest.approx(250, abs=55)


def test_synonyms_keep_case_and_punctuation():
    found = set(many("(Photo), of nothing", TextChange(synonym_weight=1)))
    assert found == {f"({word}), of nothing" for word in ("Picture", "Photograph", "Image", "Snapshot")}
    assert change("nothing known", TextChange(synonym_weight=1)) == "nothing known"


def test_edits_count():
    two = many("photo man car xyz", TextChange(synonym_weight=1, edits=2))
    changed = {sum(a != b for a, b in zip(text.split(), "photo man car xyz".split(), strict=True)) for text in two}
    assert changed == {2}
    assert set(many("one two", TextChange(swap_weight=1))) == {"two one"}
    assert change("alone", TextChange(swap_weight=1)) == "alone"


def test_words_are_deleted_one_by_one():
    lengths = [len(found.split()) for found in many("a b c d e f g h i j", TextChange(delete_weight=1), 1000)]
    assert np.mean(lengths) == pytest.approx(9, abs=0.12)


def test_equal_generators_give_equal_variants():
    assert [change(CAPTION, STRONG, seed) for seed in range(20)] == [
        change(CAPTION, STRONG, seed) for seed in range(20)
    ]
    assert len({change(CAPTION, STRONG, seed) for seed in range(20)}) > 5


def test_a_language_without_a_list_is_an_error_that_says_what_to_do():
    rng = np.random.default_rng(0)
    for _ in range(20):  # whatever is drawn
        with pytest.raises(
            ConfigError, match=r"no stop words for the language 'ja', only for en, de.*change.stop_words"
        ):
            change_text("word", TextChange(stop_word_rate=0.01), rng, language="ja")
        with pytest.raises(ConfigError, match=r"no synonyms for the language 'de', only for en.*change.synonyms"):
            change_text("Wort", TextChange(synonym_weight=0.01, swap_weight=1), rng, language="de-AT")
    with pytest.raises(ConfigError, match="'xx'"):
        change("word", TextChange(stop_word_rate=1, language="xx"))
    assert change("Wort eins", TextChange(swap_weight=1), language="ja") == "eins Wort"  # needs no list


def test_own_lists_stand_in_for_those_of_a_language():
    own = TextChange(stop_word_rate=1, synonym_weight=1, stop_words=("en", "och"), synonyms=("hund vovve",))
    assert change("en hund och katt", own, language="sv") == "vovve katt"


def test_rates_and_weights_out_of_range():
    for wrong in ({"stop_word_rate": 1.2}, {"swap_weight": -1.0}, {"edits": 0}, {"delete_rate": -0.1}):
        with pytest.raises(ConfigError, match="Rates must be in"):
            TextChange(**wrong)


def test_lists_are_in_order():
    for words in STOP_WORDS.values():
        assert all(word == word.lower() for word in words)
    for groups in SYNONYMS.values():
        words = [word for group in groups for word in group.split()]
        assert len(words) == len(set(words)), Counter(words).most_common(3)
        assert all(len(group.split()) > 1 for group in groups)


@given(st.text(min_size=1, max_size=60), st.integers(0, 2**32))
def test_any_text_keeps_a_word_if_it_had_one(text, seed):
    found = change(text, STRONG, seed)
    assert bool(re.search(r"\w", found)) == bool(re.search(r"\w", text))
