import io
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from diptych.curate.duplicates import (
    SIMILAR_IMAGE,
    SIMILAR_TEXT,
    ImageDuplicates,
    ImageDuplicatesConfig,
    TextDuplicates,
    TextDuplicatesConfig,
)
from diptych.curate.minhash import folded_words
from diptych.curate.pictures import NO_IMAGE, UNREADABLE
from diptych.data.bundles import bundle_file
from diptych.errors import ColumnError, ConfigError
from diptych.verbs import AbstractSurveyor


def curated(step: AbstractSurveyor, parts: Sequence[pa.Table]) -> dict[str, tuple[str | None, str | None]]:
    """Return (reason, duplicate_of) of each key."""
    curator = step.informed(step.merge([step.survey(part) for part in parts]))
    found = [row for part in parts for row in curator.curate(part).to_pylist()]
    return {row["key"]: (row["reason"], row["duplicate_of"]) for row in found}


def cut(table: pa.Table, rng: np.random.Generator) -> list[pa.Table]:
    """Return the rows in another order, in parts of any size."""
    shuffled = table.take(rng.permutation(table.num_rows))
    edges = [0, *sorted(rng.integers(0, table.num_rows, 3)), table.num_rows]
    return [shuffled.slice(low, high - low) for low, high in pairwise(edges)]


def encoded(image: Image.Image, quality: int | None = None) -> bytes:
    options = {} if quality is None else {"quality": quality}
    image.save(file := io.BytesIO(), "PNG" if quality is None else "JPEG", **options)
    return file.getvalue()


def cloud(seed: int) -> Image.Image:
    """Return a smooth random image, as photos are."""
    rough = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((96, 64), Image.Resampling.BICUBIC)


def planted_captions(rng: np.random.Generator, count: int = 300) -> pa.Table:
    """Return captions of twelve random words, a third of them twice more with one short change: keys `7`, `7a`, `7b`."""
    rows = {}
    for number in range(count):
        words = ["".join(map(chr, rng.integers(97, 123, 5))) for _ in range(12)]
        rows[f"{number}"] = " ".join(words)
        if number % 3 == 0:
            rows[f"{number}a"] = " ".join(words).upper() + " !"
            rows[f"{number}b"] = " ".join([*words, "hd"])  # J = 64 / 67
    return pa.table({"key": list(rows), "caption": list(rows.values())})


class TestTexts:
    def test_planted_captions_are_found_and_no_others(self):
        found = curated(TextDuplicates(), [planted_captions(np.random.default_rng(0))])
        families = [(f"{number}", f"{number}a", f"{number}b") for number in range(0, 300, 3)]
        gone = {key for key, (reason, _) in found.items() if reason is not None}
        planted = {key for family in families for key in family}
        assert gone <= planted  # precision 1
        assert all(sum(key not in gone for key in family) == 1 for family in families)  # recall 1, one of each stays
        for key in gone:
            reason, stays = found[key]
            assert reason == SIMILAR_TEXT and stays not in gone and stays.rstrip("ab") == key.rstrip("ab")

    def test_parts_and_their_order_change_nothing(self):
        rng, table = np.random.default_rng(1), planted_captions(np.random.default_rng(0), 60)
        expected = curated(TextDuplicates(), [table])
        assert all(curated(TextDuplicates(), cut(table, rng)) == expected for _ in range(5))

    def test_what_stays_is_not_always_what_came_first(self):
        stays = {
            of for _, of in curated(TextDuplicates(), [planted_captions(np.random.default_rng(0), 60)]).values() if of
        }
        assert {key[-1] for key in stays} >= {"a", "b"}

    @pytest.mark.data
    def test_real_captions_as_by_all_pairs(self):
        """Precision and recall against sets of pieces, away from the threshold, where the estimate may fall on either side."""
        lines = bundle_file("raw-captions", "cc3m_validation.txt").read_text(encoding="utf-8").splitlines()[:600]
        table = pa.table({"key": [f"{number}" for number in range(600)], "caption": lines})
        config = TextDuplicatesConfig(jaccard=0.7)
        found = curated(TextDuplicates(config), [table])
        sets = []
        for line in lines:
            text = " ".join(folded_words(line)) or line
            sets.append({text[i : i + 5] for i in range(max(1, len(text) - 4))})

        def jaccard(one: int, other: int) -> float:
            return len(sets[one] & sets[other]) / len(sets[one] | sets[other])

        kept = [row for row in range(600) if found[f"{row}"][0] is None]
        gone = [row for row in range(600) if found[f"{row}"][0] is not None]
        assert gone
        assert min(jaccard(row, int(found[f"{row}"][1])) for row in gone) > 0.7 - 0.16  # four standard deviations
        assert max(jaccard(one, other) for place, one in enumerate(kept) for other in kept[:place]) < 0.7 + 0.16

    def test_rows_that_are_gone_or_have_no_caption(self):
        table = pa.table(
            {
                "key": ["a", "b", "c", "d"],
                "caption": ["a red dog runs", None, "a red dog runs", "a red dog runs"],
                "reason": [None, None, "too long", None],
            }
        )
        found = curated(TextDuplicates(), [table])
        assert found["b"] == (None, None) and found["c"] == ("too long", None)
        assert {found["a"][0], found["d"][0]} == {None, SIMILAR_TEXT}

    def test_nothing(self):
        step = TextDuplicates()
        empty = pa.table({"key": pa.array([], pa.string()), "caption": pa.array([], pa.string())})
        assert curated(step, [empty]) == {} and step.merge([]).num_rows == 0
        assert step.informed(step.merge([])).curate(empty).column_names == ["key", "caption", "reason", "duplicate_of"]

    def test_settings_out_of_range(self):
        with pytest.raises(ConfigError, match=r"\[0\.1, 1\]"):
            TextDuplicatesConfig(jaccard=0)


class TestImages:
    @pytest.fixture
    def table(self):
        """40 images, number 10 n also compressed and scaled; two captions each; one image missing and one damaged."""
        images = {f"{seed}": encoded(cloud(seed)) for seed in range(40)}
        for seed in range(0, 40, 10):
            images |= {f"{seed}a": encoded(cloud(seed), 40), f"{seed}b": encoded(cloud(seed).resize((48, 32)))}
        images |= {"missing": None, "damaged": images["1"][:200]}
        rows = [(f"{name}#{i}", name, image) for name, image in images.items() for i in range(2)]
        keys, groups, cells = zip(*rows, strict=True)
        return pa.table({"key": keys, "group": groups, "image": pa.array(cells, pa.binary())})

    def test_planted_images_are_found_and_no_others(self, table):
        found = curated(ImageDuplicates(), [table])
        gone = {key.split("#")[0] for key, (reason, _) in found.items() if reason == SIMILAR_IMAGE}
        families = [{f"{seed}", f"{seed}a", f"{seed}b"} for seed in range(0, 40, 10)]
        assert gone <= set().union(*families) and all(len(family - gone) == 1 for family in families)
        for key, (reason, stays) in found.items():
            assert (stays is not None) == (reason == SIMILAR_IMAGE)
            assert found[key.replace("#0", "#1")] == (reason, stays)  # captions of one image stay together
            assert stays is None or (stays not in gone and stays.rstrip("ab") == key.split("#")[0].rstrip("ab"))

    def test_images_that_cannot_be_seen_have_a_reason(self, table):
        found = curated(ImageDuplicates(), [table])
        assert found["missing#0"] == found["missing#1"] == (NO_IMAGE, None)
        assert found["damaged#0"] == found["damaged#1"] == (UNREADABLE, None)

    def test_parts_and_their_order_change_nothing(self, table):
        rng, expected = np.random.default_rng(1), curated(ImageDuplicates(), [table])
        assert all(curated(ImageDuplicates(), cut(table, rng)) == expected for _ in range(3))

    def test_only_images_that_cannot_be_seen(self, table):
        found = curated(ImageDuplicates(), [table.slice(table.num_rows - 4)])
        assert {reason for reason, _ in found.values()} == {NO_IMAGE, UNREADABLE}

    @pytest.mark.parametrize(("colour", "gone"), [(16, 0), (255, 1)])
    def test_colour_tells_apart_what_grey_does_not(self, colour, gone):
        pixels = np.full((32, 32, 3), 255, np.uint8)
        pixels[8:24, 4:20] = (200, 0, 0)
        shapes = [Image.fromarray(pixels), Image.fromarray(pixels[:, :, ::-1].copy())]
        for shape in shapes:
            shape.paste((130, 130, 130), (22, 2, 30, 8))
        table = pa.table({"key": ["red", "blue"], "image": [encoded(shape) for shape in shapes]})
        found = curated(ImageDuplicates(ImageDuplicatesConfig(colour=colour, bits=16)), [table])
        assert sum(reason is not None for reason, _ in found.values()) == gone

    def test_by_embeddings(self, monkeypatch):
        """A stand-in for a model looks at the mean colour alone."""

        def embed(model, table, rows):
            del model
            cells = [table["image"][row].as_py() for row in rows.tolist()]
            colours = np.array([list(cell[:2]) for cell in cells if cell], np.float32)
            return colours / np.linalg.norm(colours, axis=1, keepdims=True), [
                None if cell else NO_IMAGE for cell in cells
            ]

        monkeypatch.setattr("diptych.curate.duplicates.embed_rows", embed)
        monkeypatch.setattr("diptych.curate.duplicates.opened", lambda spec: spec)
        table = pa.table({"key": list("abcd"), "image": [b"\x50\x00", None, b"\x60\x01", b"\x00\x50"]})
        found = curated(ImageDuplicates(ImageDuplicatesConfig(model="any", cosine=0.99)), [table])
        assert found["b"] == (NO_IMAGE, None) and found["d"] == (None, None)
        assert {found["a"], found["c"]} in ({(None, None), (SIMILAR_IMAGE, "a")}, {(None, None), (SIMILAR_IMAGE, "c")})

    def test_a_real_model(self, monkeypatch, make_model):
        monkeypatch.setattr("diptych.curate.duplicates.opened", lambda spec: make_model())
        images = [encoded(cloud(0)), encoded(cloud(0)), None]
        table = pa.table({"key": list("abc"), "image": pa.array(images, pa.binary())})
        found = curated(ImageDuplicates(ImageDuplicatesConfig(model="any", cosine=0.999)), [table])
        assert found["c"] == (NO_IMAGE, None)
        assert sorted(reason or "" for reason, _ in (found["a"], found["b"])) == ["", SIMILAR_IMAGE]

    def test_a_table_without_images(self):
        with pytest.raises(ColumnError, match="a column 'image'; the table has key"):
            ImageDuplicates().survey(pa.table({"key": ["a"]}))

    @pytest.mark.parametrize("wrong", [{"bits": 17}, {"colour": 256}, {"cosine": 0.0}])
    def test_settings_out_of_range(self, wrong):
        with pytest.raises(ConfigError, match="cosine in"):
            ImageDuplicatesConfig(**wrong)
