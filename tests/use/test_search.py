import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diptych.data.columns import Columns
from diptych.data.images import decode
from diptych.data.sources import AbstractSource, Listed
from diptych.errors import CheckpointError, ImageError, InputError, TextError
from diptych.models.embedding import embed_images, embed_texts
from diptych.types import Sample, Text
from diptych.use.search import (
    Hit,
    Index,
    Item,
    approximate_finder,
    build_index,
    check_model,
    embed_query,
    exact_finder,
    pictures,
    search_index,
)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


def random_index(count: int, dim: int = 8, seed: int = 0) -> Index:
    images = F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)
    return Index("m", "w", "s", tuple(Item(f"k{i}", i, (f"text {i}",)) for i in range(count)), images)


def test_exact_search_is_a_sort_of_all_cosines():
    index = random_index(60)
    query = F.normalize(torch.arange(1.0, 9.0), dim=0)
    cosines = [sum(a * b for a, b in zip(row, query.tolist(), strict=True)) for row in index.images.tolist()]
    order = np.argsort([-c for c in cosines], kind="stable")[:7]
    hits = search_index(index, query, count=7)
    assert [hit.item.key for hit in hits] == [f"k{i}" for i in order]
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5, 6, 7]
    assert [hit.score for hit in hits] == pytest.approx([cosines[i] for i in order], abs=1e-6)


def test_equal_scores_come_in_the_order_of_the_index():
    row = F.normalize(torch.ones(4), dim=0)
    images = torch.stack([-row] + [row] * 40 + [-row])
    scores, found = exact_finder(images)(row, 42)
    assert found == [*range(1, 41), 0, 41]
    assert scores == pytest.approx([1] * 40 + [-1] * 2)


def test_no_more_hits_than_images_and_at_least_one():
    index = random_index(3)
    assert len(search_index(index, index.images[0], count=10)) == 3
    for count in (0, -2):
        with pytest.raises(InputError, match=f"at least 1, not {count}"):
            search_index(index, index.images[0], count=count)


def test_query_by_text_by_image_and_by_their_sum(model, drawings):
    image = drawings(1)[0].image
    text = embed_texts(model, ["a red circle"])[0]
    picture = embed_images(model, [drawings(1)[0]])[0]
    torch.testing.assert_close(embed_query(model, text="a red circle"), text)
    torch.testing.assert_close(embed_query(model, image=image), picture)
    both = embed_query(model, text="a red circle", image=image)
    torch.testing.assert_close(both, (text + picture) / (text + picture).norm())
    assert not both.is_inference()


def test_a_query_needs_something(model):
    with pytest.raises(InputError, match="needs a text, an image, or both"):
        embed_query(model)
    with pytest.raises(TextError, match="is empty"):
        embed_query(model, text=" ")
    with pytest.raises(ImageError, match="no image in a known format"):
        embed_query(model, image=b"words")


def test_an_image_finds_itself(model, drawings):
    source = drawings(12)
    index = build_index(model, source, model_spec="m", source_spec="s", precision="fp32")
    for i in (0, 5, 11):
        best = search_index(index, embed_query(model, image=source[i].image), count=1)[0]
        assert best.item == Item(f"s{i}", i, (source.texts(i)[0].text,))
        assert best.score == pytest.approx(1, abs=1e-5)


def test_rows_count_unreadable_images_too(model, drawings):
    samples = drawings(4).samples
    samples[1] = replace(samples[1], image=b"broken")
    samples[2] = replace(samples[2], texts=())
    samples[3] = replace(samples[3], texts=(Text("one"), Text("two"), Text("not this", "hard_negative")))
    index = build_index(model, Listed(samples), model_spec="m", source_spec="s")
    assert index.items == (Item("s0", 0, ("a red circle 0",)), Item("s2", 2, ()), Item("s3", 3, ("one", "two")))
    assert index.skipped == 1 and len(index.images) == 3


def test_saved_and_read(tmp_path):
    index = replace(random_index(5), skipped=2, columns=Columns(image="bild", texts=("was",)), precision="bf16")
    odd = ("zwei\u2028Zeilen \x85 \n", "אדום", '🐈 "x"')
    index = replace(index, items=(Item("ü/1", 0, odd), Item("k", 1, ()), *index.items[2:]))
    index.save(tmp_path / "a" / "index")
    found = Index.read(tmp_path / "a" / "index")
    assert torch.equal(found.images, index.images)
    assert replace(found, images=index.images) == index
    replace(index, items=index.items[:1], images=index.images[:1]).save(tmp_path / "a" / "index")
    assert len(Index.read(tmp_path / "a" / "index").items) == 1
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["index"]


def test_an_index_says_its_precision_and_one_that_does_not_is_fp32(model, drawings, tmp_path):
    calls: list[object] = []
    hook = model.text.register_forward_hook(lambda *call: calls.append(call))
    rounded, full = (
        build_index(model, drawings(3), model_spec="m", source_spec="s", precision=precision)
        for precision in ("bf16", "fp32")
    )
    assert (rounded.precision, full.precision) == ("bf16", "fp32") and calls == []  # captions are shown, not embedded
    assert not torch.equal(rounded.images, full.images) and (rounded.images * full.images).sum(1).min() > 0.999
    hook.remove()
    check_model(rounded, model)
    full.save(tmp_path)
    record = json.loads((tmp_path / "index.json").read_text())
    del record["precision"]
    (tmp_path / "index.json").write_text(json.dumps(record))
    assert Index.read(tmp_path).precision == "fp32"


def test_a_folder_without_an_index(tmp_path):
    with pytest.raises(CheckpointError, match=f"is no index. Make one with: diptych embed .* --out {tmp_path}"):
        Index.read(tmp_path)


def test_an_index_of_another_model_is_refused(model):
    with pytest.raises(InputError, match="query has 8 dimensions, the index 5; it was made with m"):
        search_index(random_index(3, dim=5), embed_query(model, text="a red circle"))


def test_approximate_search_agrees_with_exact_search():
    pytest.importorskip("usearch")
    index = random_index(300, dim=16)
    finder = approximate_finder(index.images)
    queries = F.normalize(torch.randn(20, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    agreed = 0
    for query in queries:
        exact, near = search_index(index, query, count=5), search_index(index, query, count=5, finder=finder)
        assert near[0].score == pytest.approx(float(index.images[near[0].item.row] @ query), abs=1e-2)
        assert [hit.score for hit in near] == sorted((hit.score for hit in near), reverse=True)
        agreed += near[0].item == exact[0].item
    assert agreed >= 19


class Counted(AbstractSource):
    """Remembers which samples were read."""

    def __init__(self, source: AbstractSource) -> None:
        self.source, self.name, self.read = source, source.name, []

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        self.read.append(index)
        return self.source[index]

    def texts(self, index: int) -> tuple[Text, ...]:
        return self.source.texts(index)


def test_only_the_pictures_that_are_shown_are_read(drawings):
    source = Counted(drawings(12))
    hits = [Hit(rank, 0.5, Item(f"s{i}", i, ())) for rank, i in enumerate((7, 2), 1)]
    found = pictures(source, hits)
    assert sorted(source.read) == [2, 7]
    assert {key: image.tobytes() for key, image in found.items()} == {
        f"s{i}": decode(drawings(12)[i].image).tobytes() for i in (2, 7)
    }


def test_pictures_that_have_gone_or_moved_are_left_out(drawings):
    source = drawings(4)
    source.samples[1] = replace(source.samples[1], image=b"")
    source.samples[2] = replace(source.samples[2], key="another")
    hits = [Hit(1, 0.5, Item(f"s{i}", i, ())) for i in (0, 1, 2, 9)]
    assert set(pictures(source, hits)) == {"s0"}


def test_a_picture_whose_file_was_deleted_is_left_out(tmp_path: Path, drawings):
    from diptych.data.sources import open_source

    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(drawings(2)[i].image)
    source = open_source(tmp_path)
    (tmp_path / "0.png").unlink()
    assert set(pictures(source, [Hit(1, 0.5, Item(f"{i}.png", i, ())) for i in (0, 1)])) == {"1.png"}


def test_exact_finder_is_a_stable_sort_of_everything():
    generator = torch.Generator().manual_seed(0)
    equal = torch.randint(-2, 3, (200, 3), generator=generator).float()  # many equal scores
    other = torch.randperm(600, generator=generator).view(200, 3).float()  # few; sums of whole numbers are not rounded
    queries = torch.randint(-2, 3, (20, 3), generator=generator).float()
    for images, query in product((equal, other), queries):
        scores = images @ query
        order = sorted(range(200), key=lambda row: (-float(scores[row]), row))
        for count in (1, 7, 200, 300):
            assert exact_finder(images)(query, count) == ([float(scores[row]) for row in order[:count]], order[:count])
