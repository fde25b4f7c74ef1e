from itertools import islice

import numpy as np
import pytest
import torch

from diptych.bench import cached, curate, data, embed, evaluate, loss, search, startup, substrings, train
from diptych.bench.pairs import DEVIATION, LENGTH, MEAN_WORDS, captions, export, made_batches, made_model, padded
from diptych.bench.process import Anchors
from diptych.bench.run import AREAS, run_areas
from diptych.bench.turns import Contender, Turn
from diptych.curate.match import spaced
from diptych.errors import DiptychError
from diptych.losses.contrastive import info_nce
from diptych.types import Batch


@pytest.fixture
def nobody(tmp_path):
    """Return anchors of which none is there."""
    with Anchors(tmp_path, tmp_path) as found:
        yield found


def run(area: str, tmp_path, said: list[str]):
    nowhere = tmp_path / "nowhere"
    return run_areas(
        (area,), quick=True, out=tmp_path / "out", anchors=nowhere, scripts=nowhere, page=nowhere, say=said.append
    )


@pytest.mark.parametrize("area", ["evaluate", "search"])
def test_areas_run_without_anchors(area, tmp_path, capsys):
    said: list[str] = []
    (record,) = run(area, tmp_path, said)
    assert record.quick and (tmp_path / "out" / f"{area}.json").exists()
    assert f"## {area}" in capsys.readouterr().out and "running" in said[0]
    if area == "search":
        assert "faiss is left out" in record.missing[0]


def test_an_area_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def broken(setting, anchors):
        raise DiptychError("they differ")

    monkeypatch.setattr(search, "measure", broken)
    out = tmp_path / "out"
    with pytest.raises(DiptychError, match=r"1 of 2 areas came to nothing\. search: they differ"):
        run_areas(
            ("search", "evaluate"), quick=True, out=out, anchors=out, scripts=out, page=out, say=lambda sentence: None
        )
    assert {path.name for path in out.iterdir()} == {"evaluate.json", "evaluate.md"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of compilers
@pytest.mark.parametrize("area", sorted(set(AREAS) - {"evaluate", "search"}))
def test_the_other_areas_run_too(area, tmp_path, capsys):
    (record,) = run(area, tmp_path, [])
    assert record.finding.tables[0].rows and f"## {area}" in capsys.readouterr().out


@pytest.mark.parametrize("tile", [3, 7, 20, 64])
def test_inf_cl_is_clips_loss(monkeypatch, tile):
    monkeypatch.setattr(loss, "INF_CL_TILE", tile)
    generator = torch.Generator().manual_seed(0)
    image, text = (
        torch.nn.functional.normalize(
            torch.randn(20, 8, generator=generator, dtype=torch.float64), dim=1
        ).requires_grad_()
        for _ in range(2)
    )
    scale = torch.tensor(30.0, dtype=torch.float64, requires_grad=True)
    values = [function(image, text, scale) for function in (loss.inf_cl, info_nce)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)
    for one, other in zip(*(torch.autograd.grad(value, (image, text, scale)) for value in values), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_forms_of_a_loss_are_forced_and_compared():
    plain, tiled = (loss.make_step("sigmoid, duplicates", 300, 16, form) for form in ("plain", "tiled"))
    assert (
        0 < loss.largest_difference(plain, tiled) < loss.TOLERANCE
    )  # the forms add in another order, so 0 were the same code
    with pytest.raises(DiptychError, match="differ by"):
        loss.largest_difference(plain, lambda: [2 * value for value in plain()])


def test_texts_are_padded_to_clips_length():
    texts = ["one two", "three"]
    model = made_model(64, 64, texts)
    (batch,) = made_batches(model, texts, 2)
    full = padded(batch, model.config.text_policy.pad)
    assert full.texts[0].ids.shape == (2, LENGTH) and full.texts[0].mask.sum() == batch.texts[0].mask.sum()
    torch.testing.assert_close(model.encode_text(full.texts[0]), model.encode_text(batch.texts[0]), atol=1e-5, rtol=0)


def test_made_captions_are_as_long_as_real_ones(monkeypatch):
    monkeypatch.delenv("DIPTYCH_DATA", raising=False)
    texts, origin = captions(5000)
    words = np.array([len(text.split()) for text in texts])
    assert origin == "made" and abs(words.mean() - MEAN_WORDS) < 0.2 and abs(words.std() - DEVIATION) < 0.2


@pytest.mark.data
def test_lengths_of_real_captions_are_those_said(data):
    texts, origin = captions(5000)
    words = np.array([len(text.split()) for text in texts])
    assert origin == "flickr8k-1k" and abs(words.mean() - MEAN_WORDS) < 0.2 and abs(words.std() - DEVIATION) < 0.2


def test_a_contender_with_another_loss_stops_the_benchmark(nobody):
    entries = {name: train.Entry(name, "x", "default", "fp32") for name in (train.FP32, "same", "other")}
    ours = Contender(train.FP32, lambda: Turn(1.0, 3.0))

    def gone() -> Turn:
        raise DiptychError("it ended")

    able, losses = train.first_losses([ours, Contender("same", gone)], entries, nobody)
    assert able == [ours] and losses == {train.FP32: 3.0} and nobody.notes == ["same is left out: it ended."]
    with pytest.raises(DiptychError, match=r"first loss of other is 3\.01"):
        train.first_losses([ours, Contender("other", lambda: Turn(1.0, 3.01))], entries, nobody)


def test_bars_of_train_compare_with_the_best_and_with_defaults():
    def entry(name, role, tokens="padded", family="x"):
        return train.Entry(name, family, role, "bf16", tokens)

    own = [entry(name, "default", family="diptych") for name in (train.FP32, train.PLAIN, train.LEVERS, train.COMPILED)]
    entries = {
        e.name: e for e in [*own, entry("slow", "default"), entry("fast", "best"), entry("cut", "best", "trimmed")]
    }
    times = dict(zip(entries, (9.0, 4.0, 3.0, 2.0, 8.0, 5.0, 4.5), strict=True))
    found = train.bars(entries, {name: [seconds] * 3 for name, seconds in times.items()})
    assert [(bar.claim.split(" / ")[1], bar.came, bar.reached) for bar in found] == [
        ("plain", 1.25, True),
        (train.COMPILED, 2.25, True),
        (train.COMPILED, 4.0, True),
    ]
    alone = train.bars({e.name: e for e in own}, {e.name: [1.0] for e in own})
    assert [bar.came for bar in alone] == [None, None]


def test_anchors_get_the_weights_and_the_batches(tmp_path):
    from safetensors.torch import load_file

    texts = ["one two", "three", "four"]
    model = made_model(64, 64, texts)
    batches: list[Batch] = made_batches(model, texts, 3)
    export(model, batches, tmp_path)
    pairs = load_file(tmp_path / "pairs.safetensors")
    torch.testing.assert_close(pairs["pixels"], model.pixels(batches[0].images[0]))
    assert pairs["ids"].shape == pairs["mask"].shape == (3, LENGTH)
    assert {"openclip", "huggingface"} <= {path.name for path in tmp_path.iterdir()}


def test_cached_gradients_that_differ_stop_the_benchmark():
    steps = [cached.make_step(kind, cached.QUICK, "fp32") for kind in ("plain", "cached")]
    gradients = [step() for step in steps]
    assert cached.largest_difference(*gradients) < cached.TOLERANCE
    with pytest.raises(DiptychError, match="differs from the plain one"):
        cached.largest_difference(gradients[0], [1.01 * gradient for gradient in gradients[1]])


def test_naive_recalls_by_hand():
    images = np.array([[1.0, 0.0], [0.0, 1.0]])
    texts = np.array(
        [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.8, 0.6]]
    )  # the second and fourth lie nearer to the other image
    found = evaluate.naive_recalls(images, texts, np.array([0, 0, 1, 1]))
    assert found == [1.0, 1.0, 1.0, 0.5, 1.0, 1.0]


def test_recall_of_a_search_counts_what_scores_as_well():
    images = torch.eye(4)
    queries = torch.tensor([[1.0, 0.5, 0.0, 0.0]])
    truth = (queries @ images.T).topk(2).values
    assert search.recall([[1, 0]], images, queries, truth) == 1
    assert search.recall([[0, 3]], images, queries, truth) == 0.5


def test_streams_that_make_other_pixels_stop_the_benchmark(tmp_path, nobody, monkeypatch):
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("diptych.bench.stream.BATCH", 4)
    data.make_photos(tmp_path, 4)
    monkeypatch.setattr(data, "BATCH", 4)
    data.check_pixels(str(tmp_path), 4, nobody)
    monkeypatch.setitem(data.OPEN, data.REFERENCE, lambda *given: (255 - b for b in data.open_imagefolder(*given)))
    with pytest.raises(DiptychError, match="ImageFolder makes other pixels"):
        data.check_pixels(str(tmp_path), 4, nobody)


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Return a folder with a small word list of made captions."""
    monkeypatch.delenv("DIPTYCH_DATA", raising=False)
    curate.raw_captions.cache_clear()
    curate.write_entries(tmp_path, 300)
    yield tmp_path
    curate.raw_captions.cache_clear()


def test_matches_that_differ_stop_the_benchmark(few, nobody, monkeypatch):
    (row, looped) = curate.measure_speed(few, curate.QUICK, nobody)
    assert row["over"].value == 1 and looped["over"].value > 0 and row["matches"] == looped["matches"] > 1
    assert "pyahocorasick" in nobody.notes[0]
    monkeypatch.setattr(nobody, "ask", lambda *given, **job: [[0]] * curate.QUICK.captions)
    with pytest.raises(DiptychError, match="pyahocorasick finds other matches"):
        curate.measure_speed(few, curate.QUICK, nobody)
    monkeypatch.setattr(curate, "space", lambda text: text)
    with pytest.raises(DiptychError, match="loop over substrings finds other"):
        curate.measure_speed(few, curate.QUICK, nobody)


def test_captions_are_spaced_as_the_matcher_does():
    for text in ("a,b", "", "two  spaces\tand;a `tick`!", "end\n", "猫。"):
        assert substrings.space(text) == spaced(text)


def test_entries_have_no_end_and_no_copy(few):
    entries = curate.read(few, "entries")
    assert len(set(entries)) == len(entries) == 300 and any(entry.count(" ") == 2 for entry in entries)
    texts = list(islice(curate.endless(), 50_002))
    assert texts[50_001] == f"{texts[1]} 1" and len(set(texts)) > 49_000
    assert [batch.num_rows for batch in curate.stream(200, 500)] == [200, 200, 100]


def test_memory_of_a_stream_is_its_own_peak(few):
    """A peak before the stream does not count, and what grows with the stream would."""
    first = np.ones(30_000_000)
    del first
    peak, held = curate.stream_memory(str(few), 200, 2000)
    assert peak < 100 and held <= peak


def test_a_process_that_fails_is_no_time():
    import sys

    with pytest.raises(DiptychError, match="x ended with code 3"):
        startup.run("x", [sys.executable, "-c", "import sys; sys.exit(3)"]).step()


def test_every_area_has_its_sizes():
    for module in (train, loss, cached, data, embed, evaluate, search, curate, startup):
        assert isinstance(module.QUICK, module.Setting)
    assert AREAS == ("train", "loss", "cached", "data", "embed", "evaluate", "search", "curate", "startup")
