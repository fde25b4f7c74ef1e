import json

import numpy as np
import pytest
import torch

from diptych.claims import lines, names
from diptych.claims.claim import Trial
from diptych.claims.lines import ABSENT, LEGIBLE, WORN, linked_f1, linked_lists, print_line, read_once

pytest.importorskip("matplotlib"), pytest.importorskip("emoji")


def printed(wear: float, seed: int = 0) -> np.ndarray:
    return print_line("montaña rusa", names.FACES[0], wear, np.random.default_rng(seed))


def test_a_fresh_line_has_two_tones_and_their_edges_and_wear_takes_ink_away():
    fresh, worn = printed(0.0), printed(1.0)
    assert fresh.shape == worn.shape and fresh.dtype == np.uint8 and (fresh[..., 0] == fresh[..., 2]).all()
    paper = fresh[0, 0, 0]
    assert (fresh[:2] == paper).all() and fresh.min() < 60  # a margin of 4 pixels; strokes as dark as ink
    assert worn.min() < 60 and worn[:2].std() > 10  # specks and grain
    assert np.array_equal(worn, printed(1.0)) and not np.array_equal(worn, printed(1.0, seed=1))


@pytest.fixture
def reader(monkeypatch, tmp_path):
    """Put a reader in place that counts its calls and reads `A<width>`, nothing on lines less than 60 pixels wide."""
    pytest.importorskip("rapidocr")
    calls = []

    def read(image):
        calls.append(image.size)
        return f"A{image.width}" if image.width >= 60 else ""

    monkeypatch.setattr(lines, "read_line", read)
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path))
    linked_lists.cache_clear()
    yield calls
    linked_lists.cache_clear()


def test_a_line_is_read_once_and_other_lines_are_others(reader, tmp_path):
    worn = [printed(1.0, seed) for seed in range(3)]
    first = read_once(worn)
    assert first == tuple(f"a{line.shape[1]}" for line in worn) and len(reader) == 3
    assert read_once(worn) == first and len(reader) == 3
    (kept,) = tmp_path.iterdir()
    assert json.loads(kept.read_text()) == list(first)
    changed = worn[1].copy()
    changed[0, 0] ^= 1
    read_once([worn[0], changed, worn[2]])
    assert len(reader) == 6 and len(list(tmp_path.iterdir())) == 2
    assert read_once([worn[0].reshape(-1, 2, 3)]) and len(reader) == 7  # the same bytes in another shape


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(names, "PARTS", {"train": 6, "validation": 4, "test": 5, "distractors": 20})
    monkeypatch.setattr(lines, "PARTS", names.PARTS)


def test_each_split_asks_for_its_entities_and_for_some_that_are_not_listed(reader, small):
    lists = {split: linked_lists(split, WORN) for split in names.PARTS if split != "distractors"}
    groups = {
        split: [[s.group for s in part.samples] for part in (one.queries, one.references)]
        for split, one in lists.items()
    }
    assert len(groups["train"][0]) == 36 and len(groups["train"][1]) == 6
    absent = {}
    for split, count in (("validation", 4), ("test", 5)):
        queries, references = groups[split]
        assert len(queries) == 6 * count + 4 and len(references) == len(set(references)) == count + 16
        absent[split] = set(queries) - set(references)
        assert len(absent[split]) == 4
    assert not absent["validation"] & absent["test"] and set(ABSENT) == {"validation", "test"}
    assert not set(groups["test"][0]) & {g for split in ("train", "validation") for g in groups[split][0]}
    for sample in lists["test"].queries.samples:  # what the reader made of it, or nothing
        width = sample.image.shape[1]
        assert [text.text for text in sample.texts] == ([f"a{width}"] if width >= 60 else [])
    legible = linked_lists("test", LEGIBLE)
    assert [s.image.shape for s in legible.queries.samples] == [s.image.shape for s in lists["test"].queries.samples]
    assert [s.texts for s in legible.references.samples] == [s.texts for s in lists["test"].references.samples]


def test_the_threshold_is_that_of_validation(reader, small):
    noted: dict[str, float] = {}
    trial = Trial(0, "test", {}, lambda slug: None, lambda *_: None, note=noted.__setitem__)

    def oracle(lists, *, absent: float):
        """Return the right reference of each query with a score of 0.5; of those without any the first, with `absent`."""
        listed = [sample.group for sample in lists.references.samples]
        rows = [listed.index(s.group) if s.group in listed else 0 for s in lists.queries.samples]
        scores = [0.5 if s.group in listed else absent for s in lists.queries.samples]
        return torch.tensor(scores), torch.tensor(rows)

    assert linked_f1(trial, WORN, lambda lists: oracle(lists, absent=0.1)) == 1
    assert noted == {"precision": 1, "recall": 1, "top1": 1}
    # What has no match scores above what has one, in the test split alone: 30 of the 34 links are right.
    found = linked_f1(trial, WORN, lambda lists: oracle(lists, absent=0.9 if len(lists.queries) == 34 else 0.1))
    assert noted["precision"] == pytest.approx(30 / 34) and noted["recall"] == 1
    assert found == pytest.approx(60 / 64)


@pytest.mark.slow
def test_the_reader_knows_latin_letters_and_no_cyrillic_ones(monkeypatch, tmp_path):
    pytest.importorskip("rapidocr")
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path))
    fresh = [
        print_line(name, names.FACES[0], 0.0, np.random.default_rng(0))
        for name in ("montaña rusa", "vollmond", "снеговик")
    ]
    spanish, german, russian = read_once(fresh)
    assert (spanish, german) == ("montaña rusa", "vollmond") and not set(russian) & set("снеговик")
