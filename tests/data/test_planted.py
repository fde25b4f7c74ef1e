import numpy as np
import pytest

from diptych.data.planted import (
    AREA,
    FAULTS,
    OBJECTS,
    PRODUCTS,
    TEXTURES,
    draw_product,
    kind_of,
    plant,
    planted_defects,
)
from diptych.data.scenes import scenes
from diptych.data.sources import open_source
from diptych.errors import ConfigError


@pytest.fixture(scope="module")
def source():
    return planted_defects(count=96)


def test_a_twin_differs_where_the_mask_says_and_nowhere_else(source):
    for index in (12, 17, 20, 21, 22, 23, 36, 44, 60, 70):
        sample, twin = source[index], source.twin(index)
        changed = (sample.image != twin.image).any(-1)
        assert not (changed & (sample.mask == 0)).any()
        assert changed.sum() > 0.5 * sample.mask.sum() > 0
        assert sample.twin == twin.key and twin.twin == sample.key and not twin.mask.any() and twin.label == "free"


def test_half_are_faulty_in_every_product(source):
    for product in PRODUCTS:
        found = [sample for sample in source if sample.domain == product]
        assert sum(bool(sample.mask.any()) for sample in found) == len(found) / 2 == 4
    assert {sample.label for sample in source} == {"free", *FAULTS}


def test_faults_lie_on_products_and_are_as_large_as_said(source):
    shares = [(sample.mask > 0).mean() for sample in source if sample.mask.any()]
    assert 0.5 * AREA[0] < min(shares) and max(shares) < 1.5 * AREA[1]
    for name in OBJECTS:
        pixels, places = draw_product(name, np.random.default_rng(0), 64)
        _, marked = plant(pixels, places, "hole", np.random.default_rng(1))
        assert not (marked & ~places).any()


def test_captions_tell_the_state_and_not_the_place(source):
    texts = [source.texts(index)[0].text for index in range(96)]
    assert "cookie" in texts[0] and all(PRODUCTS[i % 12] in text for i, text in enumerate(texts))
    good = {"normal", "flawless", "perfect", "without"}
    assert [bool(good & set(text.split())) for text in texts] == [index // 12 % 2 == 0 for index in range(96)]
    assert source[30].texts == source.texts(30)


def test_equal_indices_give_equal_samples_and_splits_differ(source):
    again = planted_defects(count=96)
    assert (again[13].image == source[13].image).all() and (again[13].mask == source[13].mask).all()
    assert not (planted_defects("train", count=96)[13].image == source[13].image).all()
    assert not (planted_defects(count=96, seed=1)[13].image == source[13].image).all()
    assert open_source("planted-defects:validation").name == "planted-defects:validation"
    with pytest.raises(ConfigError, match="no split 'dev'"):
        planted_defects("dev")


def test_any_scene_can_have_a_fault_planted():
    scene = scenes("test", count=2)[1]
    pixels, marked = plant(scene.image, scene.mask > 0, "stain", np.random.default_rng(0))
    assert marked.any() and not (marked & (scene.mask == 0)).any()
    assert ((pixels != scene.image).any(-1) <= marked).all()


def test_kinds():
    assert kind_of("carpet") == "texture" and kind_of("pear") == "object" and len(TEXTURES) == 4
