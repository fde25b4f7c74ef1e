import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.curate import language as language_module
from diptych.curate import rules as rules_module
from diptych.curate import unique as unique_module
from diptych.curate.language import NOT_WANTED, UNKNOWN, LanguageConfig, LanguageFilter, detect
from diptych.curate.normalise import NO_TEXT, NormaliseConfig, Normaliser
from diptych.curate.reasons import kept, with_reason
from diptych.curate.rules import Rules, RulesConfig
from diptych.curate.unique import COPY, UniqueKeys
from diptych.errors import ConfigError
from diptych.verbs import AbstractCurator


def pairs(captions: list[str | None], **columns) -> pa.Table:
    """Return pairs, the second of which has been dropped already if there are more than two."""
    count = len(captions)
    reason = [None, "dropped before", *[None] * (count - 2)] if count > 2 else [None] * count
    given = {
        "key": [f"k{i}" for i in range(count)],
        "group": [f"k{i}" for i in range(count)],
        "number": pa.array(range(count), pa.int64()),
        "row": pa.array(range(count), pa.int64()),
        "place": pa.array([0] * count, pa.int32()),
        "caption": pa.array(captions, pa.string()),
        "language": pa.nulls(count, pa.string()),
        "reason": pa.array(reason, pa.string()),
    }
    return pa.table({**given, **columns})


def reasons(curator: AbstractCurator, captions: list[str | None]) -> list[str | None]:
    return curator.curate(pairs(captions))["reason"].to_pylist()


class TestReasons:
    def test_the_first_reason_stays(self):
        table = pa.table({"key": ["a", "b", "c"]})
        assert kept(table).tolist() == [True] * 3
        table = with_reason(table, np.array([True, False, False]), "one")
        table = with_reason(table, np.array([True, True, False]), "two")
        assert table["reason"].to_pylist() == ["one", "two", None]
        assert kept(table).tolist() == [False, False, True]


class TestNormalise:
    @pytest.mark.parametrize(
        ("text", "plain"),
        [
            ("  a   cat\t\r\n", "a cat"),
            ("a&nbsp;cat &amp; dog", "a cat & dog"),
            ("<a href='x'>Yale</a> ribbon<br/>", "Yale ribbon"),
            ("3 < 4 > 2", "3 < 4 > 2"),
            ("cafe\u0301", "café"),
            ("soft\u00adhyphen\u200b\ufeff", "softhyphen"),
            ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
            ("ﬁne", "ﬁne"),
            ("a\u3000b\u2028c", "a b c"),
            ("&#xd83d;", "\ufffd"),
            ("bell\x07", "bell"),
        ],
    )
    def test_one_spelling(self, text, plain):
        (found,) = Normaliser().normalise(pa.array([text])).to_pylist()
        assert found == plain

    @given(st.text())
    def test_what_is_plain_stays(self, text):
        normaliser = Normaliser(NormaliseConfig(entities=False, tags=False))
        once = normaliser.normalise(pa.array([text], pa.string()))
        assert normaliser.normalise(once).to_pylist() == once.to_pylist()

    def test_rows(self):
        found = Normaliser().curate(pairs([" a  cat", " dropped ", "<br>", None, "&#8203;"]))
        assert found["reason"].to_pylist() == [None, "dropped before", NO_TEXT, NO_TEXT, NO_TEXT]
        assert found["caption"].to_pylist()[:2] == ["a cat", " dropped "]  # what is dropped passes through

    def test_forms(self):
        assert Normaliser(NormaliseConfig(form="NFKC")).normalise(pa.array(["ﬁｎｅ"])).to_pylist() == ["fine"]


class TestRules:
    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("a cat", None),
            ("猫だ", None),
            ("loading coal in the port", None),
            ("a photo of rust , 3/4 inch", None),
            ("x", rules_module.SHORT),
            ("x" * 1001, rules_module.LONG),
            ("a " * 300, rules_module.MANY_WORDS),
            ("<div>cat", rules_module.MARKUP),
            ("read {{ title }}", rules_module.MARKUP),
            ("IMG_0041.jpg", rules_module.ADDRESS),
            ("DSC 00412", rules_module.ADDRESS),
            ("https://example.com/cat", rules_module.ADDRESS),
            ("me@example.com", rules_module.ADDRESS),
            ("cat at https://example.com", None),
            ("Click here to enlarge", rules_module.BOILERPLATE),
            ("Loading...", rules_module.BOILERPLATE),
            ("(c) 2010. All rights reserved.", rules_module.BOILERPLATE),
            ("12/11/2009 - 14:30", rules_module.LETTERS),
        ],
    )
    def test_default_rules(self, text, reason):
        assert reasons(Rules(), [text]) == [reason]

    def test_settings(self):
        assert reasons(Rules(RulesConfig(min_words=2)), ["cat", "x", "a cat"]) == [
            rules_module.FEW_WORDS,
            "dropped before",
            None,
        ]
        plain = RulesConfig(markup=False, addresses=False, boilerplate=(), min_letters=0, min_chars=0)
        assert reasons(Rules(plain), ["<b>", "a.jpg", "", "123"]) == [
            None,
            "dropped before",
            rules_module.FEW_WORDS,
            None,
        ]
        with pytest.raises(ConfigError, match="no regular expression"):
            Rules(RulesConfig(boilerplate=("(",)))
        with pytest.raises(ConfigError, match="must not be above"):
            RulesConfig(min_chars=5, max_chars=4)


class TestLanguage:
    def test_scripts(self):
        texts = ["赤いねこ", "고양이", "แมว", "γάτα", "חתול", "a cat", "кот", "猫", None, ""]
        expected = ["ja", "ko", "th", "el", "he", None, None, None, None, None]
        assert detect(pa.array(texts, pa.string()), "scripts").to_pylist() == expected

    def test_rows(self):
        config = LanguageConfig(keep=("ja", "en"), detector="scripts")
        table = pairs(
            ["ねこ", "แมว", "แมว", "cat", "cat"], language=pa.array([None, None, None, "en", None], pa.string())
        )
        found = LanguageFilter(config).curate(table)
        assert found["language"].to_pylist() == ["ja", None, "th", "en", None]
        assert found["reason"].to_pylist() == [None, "dropped before", NOT_WANTED, None, None]
        with pytest.raises(ConfigError, match=r"By scripts alone en cannot be told.*pip install"):
            LanguageFilter(LanguageConfig(keep=("en", "ja"), unknown=False, detector="scripts"))
        with pytest.raises(ConfigError, match="English came"):
            LanguageFilter(LanguageConfig(keep=("English",)))

    def test_auto_says_what_it_is(self, monkeypatch):
        monkeypatch.setattr(language_module, "find_spec", lambda name: None)
        assert LanguageConfig().chosen == "scripts"

    def test_cld2(self):
        pytest.importorskip("pycld2")
        texts = [
            "a control \x01 character",
            "Zwei junge weiße Männer sind im Freien",
            "",
            "12",
            "a man is sleeping in a green room",
        ]
        assert detect(pa.array(texts)).to_pylist() == [None, "de", None, None, "en"]
        assert detect(pa.array(["red car"])).to_pylist() == [None]
        assert detect(pa.array(["red car"]), guess=True).to_pylist() == ["en"]
        only = LanguageFilter(LanguageConfig(keep=("de",), unknown=False))
        assert reasons(only, [texts[1], "", texts[4], "12"]) == [None, "dropped before", NOT_WANTED, UNKNOWN]

    @pytest.mark.data
    def test_cld2_on_parallel_captions(self, data):
        """Where it answers it is right, and it answers for nearly all captions of a sentence."""
        pytest.importorskip("pycld2")
        lines = (data / "raw-captions" / "multi30k_parallel_val.jsonl").read_text(encoding="utf-8").splitlines()[:300]
        for code in ("en", "de", "fr", "cs"):
            found = detect(pa.array([json.loads(line)[code] for line in lines])).to_pylist()
            answers = [answer for answer in found if answer is not None]
            assert len(answers) > 0.85 * len(found) and answers.count(code) > 0.97 * len(answers)


class TestUnique:
    def run(self, keys: list[str], captions: list[str], cut: int) -> pa.Table:
        surveyor, table = (
            UniqueKeys(),
            pairs(captions, key=pa.array(keys, pa.string())),
        )
        table = table.set_column(table.column_names.index("reason"), "reason", pa.nulls(len(keys), pa.string()))
        merged = surveyor.merge([surveyor.survey(table.slice(0, cut)), surveyor.survey(table.slice(cut))])
        curator = surveyor.informed(merged)
        return pa.concat_tables([curator.curate(table.slice(0, cut)), curator.curate(table.slice(cut))])

    def test_copies_go_and_others_get_names(self):
        found = self.run(["a", "b", "a", "a", "b", "c"], ["x", "y", "x", "z", "w", "x"], 3)
        assert found["key"].to_pylist() == ["a", "b", "a", "a+3", "b+4", "c"]
        assert found["reason"].to_pylist() == [None, None, COPY, None, None, None]

    def test_captions_of_one_row_stay_a_group(self):
        surveyor = UniqueKeys()
        rows = {"row": pa.array([0, 0, 1, 1, 1]), "place": pa.array([0, 1, 0, 1, 2], pa.int32()), "group": ["a"] * 5}
        table = pairs(
            ["x", "y", "z", "y", "w"], key=["a", "a#2", "a", "a#2", "a#3"], reason=pa.nulls(5, pa.string()), **rows
        )
        found = surveyor.informed(surveyor.merge([surveyor.survey(table)])).curate(table)
        assert found["key"].to_pylist() == ["a", "a#2", "a+2", "a#2", "a#3"]
        assert found["reason"].to_pylist() == [None, None, None, COPY, None]
        assert found["group"].to_pylist() == ["a", "a", "a+2", "a+2", "a+2"]

    @given(
        st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xy")), max_size=30),
        st.integers(0, 30),
        st.sampled_from([1, 3, 1000]),
    )
    def test_as_a_plain_loop_does(self, rows, cut, at_once):
        keys, captions = [key for key, _ in rows], [caption for _, caption in rows]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(unique_module, "AT_ONCE", at_once)  # in one round, or in many
            found = self.run(keys, captions, min(cut, len(rows)))
        seen, pairs_seen = set(), set()
        for number, (pair, key, reason) in enumerate(
            zip(rows, found["key"].to_pylist(), found["reason"].to_pylist(), strict=True)
        ):
            assert reason == (COPY if pair in pairs_seen else None)
            assert key == (f"{pair[0]}+{number}" if pair[0] in seen and reason is None else pair[0])
            seen.add(pair[0])
            pairs_seen.add(pair)
