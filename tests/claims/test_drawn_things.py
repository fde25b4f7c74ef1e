"""What claims of dense methods share. The training itself is tested with the methods that use it."""

from dataclasses import replace

import pytest
import torch

from diptych.claims import drawn_things
from diptych.claims.claim import Trial
from diptych.claims.drawn_things import (
    THINGS,
    attending_anywhere,
    captioned_things,
    larger_scenes,
    model_of_things,
    noted_miou,
)
from diptych.data.class_masks import class_map
from diptych.data.tokenizer import Tokenizer
from diptych.evaluation.segmentation import Labelled
from diptych.methods import clip
from diptych.models.build import build
from diptych.models.huggingface import family_of
from diptych.models.segmenters import ColourSegmenter


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(drawn_things, "TRAINED", 12)
    monkeypatch.setattr(drawn_things, "TESTED", 3)
    yield
    for drawn in (captioned_things, larger_scenes):
        drawn.cache_clear()


def trial(**changes) -> Trial:
    return replace(Trial(0, "validation", {}, lambda slug: clip.mini(), lambda *given, **more: None), **changes)


def test_scenes_show_what_their_captions_say_and_every_sixth_is_empty():
    things, scenes = captioned_things(), larger_scenes("validation")
    assert captioned_things() is things and len(things) == 12 and len(scenes) == 3
    assert [sample.mask.any() for sample in things] == [row % 6 > 0 for row in range(12)]
    for sample in things:
        assert all(region.phrase in sample.texts[0].text for region in sample.regions)
    for sample in scenes:
        assert sample.mask.shape == (256, 256) and 2 <= len(sample.regions) <= 4
        assert {region.phrase.split()[-1] for region in sample.regions} <= set(THINGS.labels)


@pytest.mark.parametrize(("form", "family"), [("class", "clip"), ("attention", "siglip")])
def test_models_have_the_form_that_is_asked_for(form, family):
    asked = []

    def train(recipe, source, *, shared):
        asked.append((recipe, source, shared))
        tokenizer = Tokenizer.train([sample.texts[0].text for sample in source], vocabulary=300)
        return build(recipe.model.architecture, tokenizer)

    made = model_of_things(trial(train=train), clip.mini(), form)
    ((recipe, source, shared),) = asked
    assert family_of(made.config) == family_of(recipe.model.architecture) == family
    assert source is captioned_things() and shared and recipe.epochs == 20


def test_masks_themselves_have_an_miou_of_1_and_further_numbers_are_noted():
    noted, scenes = {}, {sample.key: sample for sample in larger_scenes("validation")}

    def truth(batch):
        labels = torch.from_numpy(class_map(scenes[batch.keys[0]], THINGS.labels, background=True)).clamp(min=0)
        return Labelled(labels, torch.zeros(13, *labels.shape))

    assert noted_miou(trial(note=noted.__setitem__), truth) == 1
    assert noted == {"miou": 1, "foreground_miou": 1, "pixel_accuracy": 1}
    nothing = lambda batch: replace(truth(batch), labels=torch.zeros(256, 256, dtype=torch.int64))  # noqa: E731
    assert noted_miou(trial(note=noted.__setitem__), nothing) < 0.2 and noted["foreground_miou"] == 0


def test_random_places_are_all_gathered_from():
    image = torch.randint(256, (3, 24, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    plain = ColourSegmenter(cells=8)(image).attention
    found = attending_anywhere(ColourSegmenter(cells=8), 3)(image).attention
    rows = torch.cat([found.rows(start, start + 16) for start in range(0, 48, 16)], 1)
    assert found.grid == plain.grid == (6, 8) and rows.shape == (1, 48, 48)
    torch.testing.assert_close(rows.sum(-1), torch.ones(1, 48))
    assert (rows > 0).float().mean() > 0.99 and not torch.equal(rows[0, 0], rows[0, 16])
