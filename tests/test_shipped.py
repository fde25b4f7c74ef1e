"""The two models inside the package: what they are, and that the documented command makes them again."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch

import diptych
from diptych.models.weights import SHIPPED
from diptych.shipped import make_lite0_minilm, make_mini

FOLDER = Path(str(files("diptych.models") / "shipped"))


@pytest.mark.parametrize(("name", "megabytes"), [("mini", 10), ("lite0-minilm", 5)])
def test_size(name, megabytes):
    assert name in SHIPPED
    assert sum(file.stat().st_size for file in (FOLDER / name).iterdir()) <= megabytes * 2**20


def test_mini_finds_emoji_that_it_never_saw():
    found = diptych.evaluate_model(diptych.load("mini", offline=True), diptych.open_source("openmoji:test"))
    assert found.retrieval.text_to_image.recall[1].low > 0.3  # chance 0.002
    assert found.retrieval.image_to_text.recall[1].low > 0.3


def test_mini_knows_colours_and_places_in_scenes():
    found = diptych.evaluate_model(diptych.load("mini", offline=True), diptych.open_source("scenes:test"))
    assert found.retrieval.text_to_image.recall[10].low > 0.5  # chance 0.005


@pytest.mark.slow
def test_mini_is_remade_by_the_command():
    made, shipped = make_mini(epochs=1), diptych.load("mini")
    assert made.config == shipped.config
    assert made.tokenizer.to_json() == shipped.tokenizer.to_json()
    assert made.state_dict().keys() == shipped.state_dict().keys()


@pytest.mark.data
def test_lite0_minilm_is_remade_exactly(data):
    made, shipped = make_lite0_minilm(), diptych.load("lite0-minilm", offline=True)
    assert made.config == shipped.config
    for name, value in made.state_dict().items():
        if name.startswith(("image_head", "text_head")):  # shipped as fp16
            torch.testing.assert_close(value, shipped.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.data
@pytest.mark.slow
def test_lite0_minilm_finds_photos_before_any_training(data):
    photos = diptych.open_source("flickr8k-1k:dev")
    found = diptych.evaluate_model(diptych.load("lite0-minilm", offline=True), photos)
    assert found.retrieval.text_to_image.recall[1].low > 0.1  # chance 0.01
    assert found.retrieval.text_to_image.recall[10].low > 0.5  # chance 0.1
