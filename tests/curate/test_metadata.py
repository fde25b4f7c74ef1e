import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from diptych.curate.match import Matcher
from diptych.curate.metadata import (
    NUMBERS,
    Metadata,
    NgramCounts,
    build_metadata,
    count_ngrams,
    frequent_words,
    joined_words,
    read_counts,
    read_metadata,
    viewed_titles,
    wordnet_names,
    words_of,
    write_counts,
    write_metadata,
)
from diptych.errors import ConfigError, DataError

TEXTS = ("the cat sat.", "the dog, the cat", "New York", "New York is new", "-- the")


def test_a_word_belongs_to_the_first_source_and_the_list_is_sorted():
    found = build_metadata({"names": ["dog", "cat"], "words": ["the", "cat", "", ",", "..", "Cat"]})
    assert found == Metadata(("..", "Cat", "cat", "dog", "the"), ("words", "words", "names", "names", "words"))
    again = build_metadata({"names": ["cat", "dog"], "words": ["Cat", "the", ".."]})
    assert again.digest == found.digest != build_metadata({"names": ["cat"]}).digest


def test_the_budget_cuts_the_last_sources_and_the_rear_of_the_lists():
    found = build_metadata({"names": ["dog"], "words": ["the", "dog", "cat", "a"], "titles": ["x"]}, budget=3)
    assert found.entries == ("cat", "dog", "the")
    with pytest.raises(ConfigError, match="No words are left of the sources empty"):
        build_metadata({"empty": ["", "."]})


def test_ngrams_by_hand():
    counts = count_ngrams(TEXTS)
    assert counts.words == {"the": 4, "cat": 2, "sat": 1, "dog": 1, "New": 2, "York": 2, "is": 1, "new": 1}
    # Not `dog the`, which a comma parts, nor from text to text.
    assert counts.pairs == {"the cat": 2, "cat sat": 1, "the dog": 1, "New York": 2, "York is": 1, "is new": 1}
    assert frequent_words(counts, least=2) == ["the", "New", "York", "cat"]


def test_pairs_that_belong_together():
    counts = count_ngrams(TEXTS)
    # 14 words in all: `New York` has log2(2 * 14 / (2 * 2)) bits, `the cat` log2(2 * 14 / (4 * 2)), `is new` log2(14).
    assert joined_words(counts, least_pmi=math.log2(7)) == ["is new", "New York", "York is", "cat sat"]
    assert joined_words(counts, least_pmi=math.log2(3.5), least=2) == ["New York", "the cat"]
    assert joined_words(counts, least_pmi=math.log2(3.6), least=2) == ["New York"]
    assert joined_words(counts) == []  # 30 bits need a dump of a billion words
    assert joined_words(NgramCounts(count_ngrams([]).words, count_ngrams([]).pairs)) == []


def test_every_word_that_is_counted_can_be_matched():
    import pyarrow as pa

    counts = count_ngrams(TEXTS)
    entries = [*counts.words, *counts.pairs]
    found = Matcher(entries)(pa.array(TEXTS))
    assert set(found.flatten().to_pylist()) == set(range(len(entries)))


def test_titles_by_views():
    lines = [
        "en Main_Page 500 0",
        "en Talk:Cat 900 0",
        "en Cat 50 0",
        "en Cat 49 0",  # too few in this hour
        "en Cat 60 0",
        "en.m Dog 900 0",
        "de Hund 900 0",
        "en Rare 69 0",
        "en",
        "en Odd x 0",
    ]
    assert viewed_titles(lines) == ["Main Page", "Cat"]
    assert viewed_titles(lines, project="de") == ["Hund"]


class TestWordNet:
    LINE = "0000 03 {kind} 02 {word} 0 other 0 001 @ 1740 n 0000 | a thing that is said to be  \n"

    def test_the_first_word_of_each_synset(self, tmp_path):
        words = {"noun": ["Hot_Dog", "St._Louis", "cat"], "verb": ["sit"], "adj": ["beautiful(a)"], "adv": ["cat"]}
        for part, own in words.items():
            licence = "  1 This software is as it is, and lines of it begin with spaces.\n"
            lines = (self.LINE.format(kind=part[0], word=word) for word in own)
            (tmp_path / f"data.{part}").write_text(licence + "".join(lines))
        assert wordnet_names(tmp_path) == ["hot dog", "st", "cat", "sit", "beautiful"]
        assert words_of(f"wordnet:{tmp_path}") == wordnet_names(tmp_path)
        (tmp_path / "data.adv").unlink()
        with pytest.raises(DataError, match=r"no data\.adv"):
            wordnet_names(tmp_path)

    @pytest.mark.skipif(not os.path.isdir("/usr/share/wordnet"), reason="needs Debian's package wordnet-base")
    def test_the_paper_s_number_of_entries(self):
        found = build_metadata({"synsets": wordnet_names(Path("/usr/share/wordnet")), "numbers": NUMBERS})
        assert len(found) == 86_654


class TestReadyLists:
    def test_emoji_in_their_languages(self):
        pytest.importorskip("emoji")
        assert "black cat" in words_of("emoji:en") and "schwarze katze" in words_of("emoji:de")
        with pytest.raises(ConfigError, match=r"in 'xx'.*Known:.*de"):
            words_of("emoji:xx")

    def test_frequent_words(self):
        pytest.importorskip("wordfreq")
        assert words_of("words:en")[:2] == ["the", "to"] and len(words_of("words:de")) > 10_000
        with pytest.raises(ConfigError, match="frequent words of 'xx'"):
            words_of("words:xx")

    @pytest.mark.data
    def test_class_names(self, data):
        assert "tench" in words_of("class-names:en")
        assert len(set(words_of("class-names:it"))) == len(words_of("class-names:it"))

    def test_files(self, tmp_path):
        (tmp_path / "a.txt").write_text("cat\nhot dog\n")
        (tmp_path / "a.json").write_text(json.dumps(["cat", "犬"]))
        (tmp_path / "bad.json").write_text(json.dumps({"cat": 1}))
        assert words_of(str(tmp_path / "a.txt")) == ["cat", "hot dog"]
        assert words_of(str(tmp_path / "a.json")) == ["cat", "犬"]
        with pytest.raises(DataError, match="JSON list of strings"):
            words_of(str(tmp_path / "bad.json"))

    @pytest.mark.parametrize("spec", ["emojis:en", "emoji", "nowhere.txt", "emoji:"])
    def test_what_is_not_there(self, spec):
        with pytest.raises(ConfigError, match="Known: class-names, emoji, wordnet, words"):
            words_of(spec)


class TestFiles:
    METADATA = build_metadata({"names": ["cat", "犬"], "numbers": NUMBERS[:3]})

    def test_a_list_comes_back(self, tmp_path):
        write_metadata(self.METADATA, tmp_path / "metadata.parquet")
        assert read_metadata(tmp_path / "metadata.parquet") == self.METADATA

    def test_counts_come_back_for_their_own_list_only(self, tmp_path):
        file, counts = tmp_path / "counts.parquet", np.array([5, 0, 1, 2, 2**40])
        write_counts(counts, self.METADATA, file)
        assert read_counts(file, self.METADATA).tolist() == counts.tolist()
        with pytest.raises(DataError, match=f"word list {self.METADATA.digest}; this one is"):
            read_counts(file, build_metadata({"names": ["cat", "dog", "0", "1", "2"]}))

    def test_other_files(self, tmp_path):
        (tmp_path / "x").write_text("no parquet")
        with pytest.raises(DataError, match="columns entry, origin"):
            read_metadata(tmp_path / "x")
        write_metadata(self.METADATA, tmp_path / "y")
        with pytest.raises(DataError, match="columns entry, count"):
            read_counts(tmp_path / "y", self.METADATA)
