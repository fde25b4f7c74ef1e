from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.curate.balance import entry_probabilities, keep_probabilities, row_uniforms
from diptych.curate.entries import (
    BALANCED,
    NO_LIST,
    UNMATCHED,
    Balance,
    BalanceConfig,
    MatchConfig,
    Matching,
    word_lists,
)
from diptych.errors import ConfigError, DataError

LISTS = {"en": ("cat", "dog"), "ja": ("猫",)}


def pairs(captions: list[str], languages: list[str | None] | None = None) -> pa.Table:
    count = len(captions)
    return pa.table(
        {
            "key": pa.array([f"k{i}" for i in range(count)], pa.string()),
            "caption": pa.array(captions, pa.string()),
            "language": pa.array(languages or [None] * count, pa.string()),
            "reason": pa.nulls(count, pa.string()),
        }
    )


def test_each_caption_is_matched_in_its_language():
    table = pairs(["a cat", "黒い猫", "猫 cat", "un chat", "a bird", "cat dog"], ["en", "ja", "ja", "fr", "en", "en"])
    table = table.set_column(3, "reason", pa.array([None] * 5 + ["dropped before"], pa.string()))
    found = Matching(LISTS, MatchConfig(unspaced=True)).curate(table)
    assert found["matches"].to_pylist() == [[0], [0], [0], [], [], []]
    assert found["reason"].to_pylist() == [None, None, None, NO_LIST, UNMATCHED, "dropped before"]


def test_one_list_is_for_all_languages():
    found = Matching({"en": ("cat",)}).curate(pairs(["a Cat", "le cat", "chat"], ["en", "fr", None]))
    assert found["reason"].to_pylist() == [None, None, UNMATCHED]
    exact = Matching({"en": ("cat",)}, MatchConfig(fold_case=False, need=False)).curate(pairs(["a Cat", "a cat"]))
    assert exact["matches"].to_pylist() == [[], [0]] and exact["reason"].to_pylist() == [None, None]


def test_word_lists(tmp_path):
    for name, text in (("a", "Cat\ndog\n"), ("b", "dog\nbird\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    a, b = f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"
    assert word_lists(MatchConfig(words=(a, b))) == {"en": ("bird", "cat", "dog")}
    assert word_lists(MatchConfig(words=(a, f"de={b}"), fold_case=False)) == {
        "en": ("Cat", "dog"),
        "de": ("bird", "dog"),
    }
    assert word_lists(MatchConfig(words=(a, b), budget=2)) == {"en": ("cat", "dog")}
    with pytest.raises(ConfigError, match=r"lists for de, and none for match\.anchor, 'en'"):
        word_lists(MatchConfig(words=(f"de={b}",)))


@given(
    st.lists(
        st.tuples(st.sampled_from(["cat", "dog", "cat dog", "none"]), st.sampled_from(["en", "ja", "fr"])), max_size=40
    ),
    st.integers(0, 40),
    st.integers(1, 5),
)
@settings(deadline=None)
def test_balance_is_the_formula_over_all_rows(rows, cut, threshold):
    """Chances and draws of two parts are those that follow from counts of the whole."""
    lists = {"en": ("cat", "dog"), "ja": ("cat",)}
    table = Matching(lists).curate(pairs([text for text, _ in rows], [code for _, code in rows]))
    balance = Balance({"en": 2, "ja": 1}, BalanceConfig(tail_share=None, threshold=float(threshold)))
    parts = [table.slice(0, cut), table.slice(cut)]
    surveys = [balance.survey(part) for part in parts]
    if not any(code == "en" and text != "none" for text, code in rows):
        with pytest.raises(DataError, match="no tail"):
            balance.merge(surveys)
        return
    merged = balance.merge(surveys)
    found = pa.concat_tables([balance.informed(merged).curate(part) for part in parts])
    thresholds = {row["language"]: row["threshold"] for row in merged.to_pylist()}
    assert thresholds["en"] == threshold
    for code, size in (("en", 2), ("ja", 1)):
        own = found.filter(pa.array([one == code for _, one in rows], pa.bool_()))
        seen = Counter(entry for ids in own["matches"].to_pylist() for entry in ids)
        counts = np.array([seen[entry] for entry in range(size)])
        expected = keep_probabilities(own["matches"], entry_probabilities(counts, thresholds.get(code, 1.0)))
        alive = np.array([reason in (None, BALANCED) for reason in own["reason"].to_pylist()], bool)
        np.testing.assert_allclose(own["chance"].to_numpy()[alive], expected[alive])
        drawn = row_uniforms(own["key"], 0) < expected
        kept = [reason is None for reason in own["reason"].to_pylist()]
        assert kept == (drawn & alive).tolist()


def test_a_size_needs_one_list():
    with pytest.raises(ConfigError, match="one word list; there are some for en, ja"):
        Balance({"en": 2, "ja": 1}, BalanceConfig(tail_share=None, size=10))


@pytest.mark.parametrize("given", [{"threshold": 3}, {"size": 3}, {"tail_share": 0.3}])
def test_one_way_to_say_how_much_is_given_alone(given):
    assert BalanceConfig(**given).on
    for more in {"threshold": 3, "tail_share": 0.06, "size": 3}.items():
        if more[0] not in given:
            with pytest.raises(ConfigError, match=r"one of threshold, tail_share and size, .* balance has .*3"):
                BalanceConfig(**given, **dict([more]))


def test_without_any_the_tail_has_six_per_cent():
    texts = ["cat"] * 90 + [f"dog {n}" for n in range(6)] + ["owl"] * 4
    table = Matching({"en": ("cat", "dog", "owl")}).curate(pairs(texts, ["en"] * 100))
    by_default, by_share, other = (
        Balance({"en": 3}, config).merge([Balance({"en": 3}, config).survey(table)])
        for config in (BalanceConfig(), BalanceConfig(tail_share=0.06), BalanceConfig(tail_share=0.9))
    )
    assert by_default.equals(by_share) and not by_default.equals(other)
