import json
import random
import string
import time
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.curate import match
from diptych.curate.match import Matcher, match_batches, pattern, space_out, spaced, text_bytes
from diptych.errors import ColumnError, ConfigError, DataError


def naive(entries: list[str], texts: list[str], *, unspaced: bool = False) -> list[list[int]]:
    """Return the matches by looking for every pattern in every text."""
    patterns = [pattern(entry, unspaced=unspaced) for entry in entries]
    return [[i for i, one in enumerate(patterns) if one in spaced(text)] for text in texts]


@pytest.fixture
def official(golden, data):
    """Return a reader of one case: its texts and its numbers."""

    def read(case: str):
        texts = json.loads((data.parent / "golden" / "metaclip.json").read_text(encoding="utf-8"))
        return texts[case], golden("metaclip", case)

    return read


@pytest.mark.data
class TestOfficialNumbers:
    def test_spacing(self, official):
        texts, _ = official("v1")
        assert [spaced(text) for text in texts["captions"][: len(texts["spaced"])]] == texts["spaced"]

    def test_matches(self, official):
        texts, numbers = official("v1")
        found = Matcher(texts["metadata"])(pa.array(texts["captions"]))
        assert found.offsets.to_pylist() == numbers["match_offsets"].tolist()
        assert found.values.to_pylist() == numbers["match_ids"].tolist()

    def test_scripts_without_spaces(self, official):
        texts, numbers = official("v2_multilingual")
        assert [pattern(entry, unspaced=True) for entry in texts["metadata"]] == texts["spaced_metadata"]
        found = Matcher(texts["metadata"], unspaced=True)(pa.array(texts["captions"]))
        assert found.offsets.to_pylist() == numbers["match_offsets_iter"].tolist()
        assert found.values.to_pylist() == numbers["match_ids_iter"].tolist()


@pytest.mark.parametrize(
    ("entry", "text", "there"),
    [
        ("cat", "concatenate", False),
        ("Cat", "cat", False),
        ("black cat", " a black cat!", True),
        ("t-shirt", "a t-shirt.", True),
        ("shirt", "t-shirt", False),
        ("a , b", "a,b", True),
        ("a , b", "a , b", False),  # two spaces on each side of the comma
        ("a b", "a\tb", True),
        ("a b", "a\nb", True),
        ("a b", "a  b", False),
        ("  ", "a   b", False),  # needs four
        ("  ", "a    b", True),
        ("café", "CAFÉ café", True),
        ("cat", "cat", True),
    ],
)
def test_by_hand(entry, text, there):
    assert Matcher([entry])(pa.array([text])).to_pylist() == [[0] if there else []]


# Few letters, so that much matches; a character of each length in UTF-8, of each kind that matching tells apart.
LETTERS = st.text("ab ,.\t-é猫ท𠀀、か", max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(LETTERS.filter(bool), min_size=1, max_size=12, unique=True), st.lists(LETTERS, max_size=12), st.booleans()
)
def test_all_and_only_what_the_naive_loop_finds(entries, texts, unspaced):
    found = Matcher(entries, unspaced=unspaced)(pa.array(texts, pa.string()))
    assert found.to_pylist() == naive(entries, texts, unspaced=unspaced)


@settings(max_examples=100, deadline=None)
@given(st.lists(LETTERS, max_size=8))
def test_bytes_are_spaced_as_strings_are(texts):
    data, offsets = text_bytes(pa.array(texts, pa.string()))
    text, starts = space_out(data, offsets)
    assert [text[begin:end].tobytes().decode() for begin, end in pairwise(starts)] == [spaced(text) for text in texts]


def words(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices("abcdef", k=rng.randint(1, 3))) for _ in range(count)]


@pytest.mark.parametrize("unspaced", [False, True])
@pytest.mark.parametrize("chunk", [5, 37, 1 << 18])
def test_how_texts_are_cut_into_passes_changes_nothing(monkeypatch, unspaced, chunk):
    rng = random.Random(0)
    entries = sorted({" ".join(words(rng, rng.randint(1, 3))) for _ in range(200)} | {"-ab", "ab、"})
    texts = ["".join(w + rng.choice(" ,-、") for w in words(rng, rng.randint(0, 40))) for _ in range(60)]
    monkeypatch.setattr(match, "_CHUNK", chunk)
    monkeypatch.setattr(match, "_AT_ONCE", 7)
    assert Matcher(entries, unspaced=unspaced)(pa.array(texts)).to_pylist() == naive(entries, texts, unspaced=unspaced)


def test_equal_hashes_of_other_words_do_not_match(monkeypatch):
    # Every hash is that of the first entry: what is left is the comparison of bytes.
    matcher = Matcher(["cat"])
    monkeypatch.setattr(match._Index, "_nodes", lambda self, hashes: np.zeros(len(hashes), np.int64))
    assert matcher(pa.array(["dog", "cat", "c a t"])).to_pylist() == [[], [0], []]


def test_entries_made_to_have_equal_hashes_are_refused():
    turned = str.maketrans("ab", "ba")
    thue = "a"
    for _ in range(11):  # any polynomial hash modulo 2**64 of these two is equal
        thue += thue.translate(turned)
    with pytest.raises(ConfigError, match="equal hashes"):
        Matcher([thue, thue.translate(turned)])
    assert Matcher([thue])(pa.array([thue.translate(turned), thue])).to_pylist() == [[], [0]]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_every_kind_of_strings_with_nulls_and_slices(kind):
    texts = pa.array(["x", "a cat", None, "cat,cat", "", "the cat sat"], kind)
    matcher = Matcher(["sat", "cat"])
    assert matcher(texts).to_pylist() == [[], [1], [], [1], [], [0, 1]]
    assert matcher(texts.slice(2, 2)).to_pylist() == [[], [1]]
    assert matcher(texts.slice(6)).to_pylist() == []


def test_bytes_that_are_not_utf8_are_matched_as_bytes():
    broken = pa.array([b"a \xff\xfe cat", b"\xe7\x8c cat", b"c\xffat"]).view(pa.string())
    assert Matcher(["cat", "猫"], unspaced=True)(broken).to_pylist() == [[0], [0], []]


def test_a_text_of_ten_megabytes():
    rng = random.Random(1)
    text = " ".join(words(rng, 200_000)) + " " * 100 + "needle in hay" + "x" * 8_000_000
    matcher = Matcher(["needle in hay", "hay", "aa", "zz", "abc d"])
    assert matcher(pa.array(["hay", text, "zz"])).to_pylist() == [
        [1],
        naive(["needle in hay", "hay", "aa", "zz", "abc d"], [text])[0],
        [3],
    ]


@pytest.mark.parametrize(
    ("entries", "message"),
    [([], "at least one"), (["a", ""], "none may be empty"), (["a", "b", "a"], "'a' is there twice")],
)
def test_lists_that_cannot_be(entries, message):
    with pytest.raises(ConfigError, match=message):
        Matcher(entries)


def test_what_is_no_text_is_refused():
    with pytest.raises(DataError, match="needs strings; these are int64"):
        Matcher(["a"])(pa.array([1]))


class TestBatches:
    TEXTS = ("a cat", "no", "cat dog", None, "dog", "x", "a cat and a dog")

    @pytest.fixture
    def batches(self):
        table = pa.table({"key": range(7), "text": self.TEXTS})
        return table.to_batches(max_chunksize=2)

    @pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_they_come_in_order_with_their_columns(self, batches, processes):
        found = list(match_batches(Matcher(["cat", "dog"]), iter(batches), "text", processes=processes))
        assert [batch.drop_columns("matches") for batch in found] == batches
        matches = [one for batch in found for one in batch["matches"].to_pylist()]
        assert matches == [[0], [], [0, 1], [], [1], [], [0, 1]]

    @pytest.mark.slow
    def test_other_processes_take_their_share_once_they_are_there(self, batches, monkeypatch):
        taken, here, match_here = [], [], Matcher.__call__
        monkeypatch.setattr(Matcher, "__call__", lambda self, texts: here.append(texts) or match_here(self, texts))

        def until_others_have_some():
            while len(taken) - len(here) < 4 and len(taken) < 1200:
                taken.append(batches[len(taken) % 4])
                yield taken[-1]
                time.sleep(0.05)

        found = list(match_batches(Matcher(["cat", "dog"]), until_others_have_some(), "text", processes=2))
        assert len(taken) - len(here) >= 3  # one may be on its way to this process
        assert here[0] == batches[0]["text"]  # which did not wait for them
        assert [batch.drop_columns("matches") for batch in found] == taken
        expected = [batch["matches"].to_pylist() for batch in match_batches(Matcher(["cat", "dog"]), batches, "text")]
        assert [batch["matches"].to_pylist() for batch in found] == [expected[i % 4] for i in range(len(found))]

    @pytest.mark.slow
    def test_no_more_than_two_batches_per_process_are_held(self, batches):
        taken = 0

        def counted():
            nonlocal taken
            for _ in range(20):
                taken += 1
                yield batches[0]

        found = match_batches(Matcher(["cat"]), counted(), "text", processes=2)
        for given_, _ in enumerate(found, 1):
            assert taken <= given_ + 4

    @pytest.mark.parametrize("column", ["caption", "text"])
    def test_columns_that_are_missing_or_there_already(self, batches, column):
        named = batches if column == "caption" else [b.append_column("matches", b["key"]) for b in batches]
        with pytest.raises(ColumnError, match=r"'matches'.*key, text"):
            list(match_batches(Matcher(["cat"]), named, column))


def test_a_thousand_times_the_loop_on_a_large_list():
    rng = random.Random(2)
    entries = sorted({"".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 7))) for _ in range(100_000)})
    texts = [" ".join(rng.choices(entries, k=10)) for _ in range(10_000)]
    matcher, column = Matcher(entries), pa.array(texts)

    def seconds(function) -> float:
        began = time.process_time()
        function()
        return time.process_time() - began

    patterns = [pattern(entry) for entry in entries]
    loop = min(seconds(lambda: [one in spaced(texts[0]) for one in patterns]) for _ in range(3))
    ours = min(seconds(lambda: matcher(column)) for _ in range(3)) / len(texts)
    assert loop / ours > 200  # some 2,000 when measured; a busy machine must not fail this
