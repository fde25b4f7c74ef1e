import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.data.sources import Listed
from diptych.errors import ConfigError, ImageError
from diptych.models.codebook import CodebookHeadConfig, add_codebook
from diptych.models.dual import DualEncoder
from diptych.models.embedding import inference
from diptych.use.concepts import Extent, common_words, explore, find_concepts, spotlight

CONFIG = CodebookHeadConfig(codes=10, dim=8, temperature=2.0)


@pytest.fixture
def model(make_model) -> DualEncoder:
    model = make_model()
    add_codebook(model, CONFIG)
    return model


def looked_at(model: DualEncoder, picture: Image.Image) -> torch.Tensor:
    """Return the score of every patch for every code, of a picture as the page shows it."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    with inference(model):
        return model.image_head.scores(model.vision(model.pixels(pixels)))[0]


def test_sightings_are_the_images_with_the_best_patch(model, drawings):
    source = drawings(12)
    for concept in find_concepts(model, source, Extent(concepts=3, images=12)):
        scores = [sighting.score for sighting in concept.sightings]
        assert scores == sorted(scores, reverse=True)
        assert sorted(sighting.row for sighting in concept.sightings) == list(range(12))
        for sighting in concept.sightings:
            patches = looked_at(model, sighting.picture)[:, concept.code]
            torch.testing.assert_close(torch.from_numpy(sighting.places).flatten(), patches)
            assert sighting.places.shape == (2, 2)  # 16 pixels in patches of 8
            assert sighting.score == pytest.approx(patches.max().item(), abs=1e-5)
            assert sighting.caption == source.texts(sighting.row)[0].text


def test_words_are_those_that_score_best_alone(model, drawings):
    source = drawings(12)
    vocabulary = common_words(text.text for sample in source for text in sample.texts)
    tokens = model.tokenizer(vocabulary)
    with inference(model):
        scores = model.text_head.pooled(model.text(tokens.ids, tokens.mask)) * CONFIG.temperature
    for concept in find_concepts(model, source, Extent(concepts=3, words=4)):
        expected = scores[:, concept.code].topk(4)
        assert [word for word, _ in concept.words] == [vocabulary[i] for i in expected.indices]
        torch.testing.assert_close(torch.tensor([s for _, s in concept.words]), expected.values, rtol=1e-4, atol=1e-5)


def test_codes_that_vary_most_on_both_sides_come_first(model, drawings):
    source = drawings(12)
    found = find_concepts(model, source, Extent(concepts=10))
    texts = model.tokenizer([sample.texts[0].text for sample in source])
    pixels = torch.stack([torch.from_numpy(np.array(s.picture)).permute(2, 0, 1) for s in by_row(found)])
    with inference(model):
        image = model.image_head.mix(model.vision(model.pixels(pixels))).weights
        text = model.text_head.mix(model.text(texts.ids, texts.mask)).weights
    salience = image.std(0, correction=0) * text.std(0, correction=0)
    used = int((salience > 0).sum())
    assert 2 < used
    assert [c.code for c in found[:used]] == salience.topk(used).indices.tolist()
    assert sum(c.image_share for c in found) == pytest.approx(1, abs=1e-5)
    assert sum(c.text_share for c in found) == pytest.approx(1, abs=1e-5)
    assert found[0].image_share == pytest.approx(image[:, found[0].code].mean().item(), abs=1e-6)


def by_row(found):
    sightings = {s.row: s for concept in found for s in concept.sightings}
    assert sorted(sightings) == list(range(12))
    return [sightings[row] for row in range(12)]


def test_a_source_without_texts_has_images_only(model, drawings):
    source = Listed([replace(sample, texts=()) for sample in drawings(6)])
    for concept in find_concepts(model, source, Extent(concepts=2)):
        assert concept.words == () and concept.text_share is None
        assert concept.sightings[0].caption.startswith("s")  # the key
    assert "of texts" not in explore(model, source)


def test_unreadable_images_are_left_out(model, drawings):
    samples = list(drawings(6))
    source = Listed([replace(samples[0], image=b"no image"), replace(samples[1], image=None), *samples[2:]])
    (concept,) = find_concepts(model, source, Extent(concepts=1, images=9))
    assert {sighting.row for sighting in concept.sightings} == {2, 3, 4, 5}
    with pytest.raises(ImageError, match="None of the first 2 images of listed can be read"):
        explore(model, source, Extent(limit=2))


def test_without_a_codebook_there_is_nothing_to_explore(make_model, drawings):
    with pytest.raises(ConfigError, match=r"no codebook.*add_codebook"):
        explore(make_model(), drawings(4))


def test_the_page_needs_nothing_else_and_escapes_what_users_wrote(model, drawings):
    samples = list(drawings(6))
    bad = replace(samples[0], texts=(replace(samples[0].texts[0], text="<b>bold</b> & red"),))
    html = explore(model, Listed([bad, *samples[1:]], "<mine>"), Extent(concepts=4, images=2))
    assert html.startswith("<!doctype html>") and html.count("Code ") == 4
    assert html.count("data:image/webp;base64,") == 4 * 2 * 2  # each picture, and its patches
    assert "<script" not in html and not re.search(r'(?:src|href)="(?!data:)', html)
    assert "&lt;mine&gt;" in html and "<b>bold" not in html


def test_it_leaves_the_model_as_it_was(model, drawings):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explore(model, drawings(4))
    assert model.training and all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_common_words():
    texts = ["A red cat, a dog's bone.", "a cat!", "naïve 猫"]
    assert common_words(texts)[:2] == ["a", "cat"]
    assert set(common_words(texts)) == {"a", "red", "cat", "dog's", "bone", "naïve", "猫"}
    assert common_words(texts, 1) == ["a"]
    assert common_words([]) == []


def test_the_light_falls_on_the_best_patch():
    picture = Image.new("RGB", (40, 40), (200, 0, 0))
    lit = np.asarray(spotlight(picture, np.array([[0.0, 0.0], [0.0, 3.0]]))).astype(int)
    assert lit[38, 38].tolist() == [200, 0, 0]
    faded = lit[1, 1]
    assert faded[0] == faded[1] == faded[2] and faded[0] > 190
    assert np.asarray(spotlight(picture, np.ones((2, 2)))).shape == (40, 40, 3)
