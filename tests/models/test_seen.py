from dataclasses import replace
from functools import partial

import pytest
import torch

from diptych.data.sources import Listed
from diptych.errors import ConfigError, DataError, ImageError
from diptych.models.embedding import embed_images, evaluation_view
from diptych.models.foreign import TimmConfig, TimmTower
from diptych.models.seen import labels_of, look, see
from diptych.models.statistics import layer_statistics


@pytest.fixture
def labelled(drawings):
    """Return a function that gives drawings whose labels are b, a, b, ..."""

    def draw(count: int) -> Listed:
        samples = [replace(s, label=("b", "a")[row % 2]) for row, s in enumerate(drawings(count))]
        return Listed(samples, "drawings")

    return draw


def test_it_is_the_embedding_and_the_statistics_of_every_layer(make_model, labelled):
    model, source = make_model(), labelled(5)
    found = see(model, source, ("b", "a"), precision="fp32")
    torch.testing.assert_close(found.seen.embedding, embed_images(model, source))
    pixels = model.pixels(torch.stack([evaluation_view(model, sample) for sample in source]))
    with torch.no_grad():
        expected = layer_statistics(model.vision.eval()(pixels, layers=(0,)).layers)
    torch.testing.assert_close(found.seen.statistics.means, expected.means)
    torch.testing.assert_close(found.seen.statistics.deviations, expected.deviations)
    assert len(found) == 5 and found.label.tolist() == [0, 1, 0, 1, 0]


def test_what_was_seen_can_be_learnt_from(make_model, labelled):
    model, source = make_model(), labelled(3)
    found = see(model, source, ("b", "a"))
    weight = torch.ones(8, requires_grad=True)
    (found.seen.embedding @ weight).sum().backward()  # tensors of inference mode would refuse
    assert weight.grad is not None


def test_images_may_be_changed_on_their_way(make_model, labelled):
    model, source = make_model(), labelled(3)
    plain = see(model, source, ("b", "a"), precision="fp32").seen
    negated = partial(map, lambda view: 255 - view)
    negative = see(model, source, ("b", "a"), change=negated, precision="fp32").seen
    assert not torch.allclose(plain.statistics.means[0], negative.statistics.means[0])


def test_a_tower_of_convolutions_has_a_width_for_every_stage(make_model):
    model = make_model()
    model.vision = TimmTower(TimmConfig("test_efficientnet")).eval()
    model.image_head = torch.nn.Module()
    model.image_head.forward = lambda output: output.pooled
    statistics = look(model, torch.zeros(2, 3, 64, 64)).statistics
    assert len(statistics.means) == model.vision.depth > 2
    assert len({mean.shape[1] for mean in statistics.means}) > 2


def test_a_tower_without_layers_is_refused(make_model):
    model = make_model()
    model.vision.depth = 0
    with pytest.raises(ConfigError, match=r"layers of its tower.*VisionTransformer gives none.*Take a vision"):
        look(model, torch.zeros(1, 3, 16, 16))


def test_labels_are_rows_of_the_classes(labelled):
    source = labelled(3)
    assert labels_of(source, ("a", "b")).tolist() == [1, 0, 1]
    with pytest.raises(DataError, match="label of 's1' in drawings is 'a'; known: b"):
        labels_of(source, ("b",))


def test_images_that_cannot_be_read_are_left_out_and_counted(make_model, labelled):
    model, whole = make_model(), labelled(5)
    broken = Listed([replace(s, image=b"no image") if s.key in ("s1", "s4") else s for s in whole], "drawings")
    with pytest.warns(UserWarning, match=r"drawings: 2 images could not be read and were left out\. First: 1: 's1'"):
        found = see(model, broken, ("b", "a"), precision="fp32")
    expected = see(model, Listed([whole[row] for row in (0, 2, 3)], "drawings"), ("b", "a"), precision="fp32")
    assert torch.equal(found.seen.embedding, expected.seen.embedding)
    assert found.label.tolist() == expected.label.tolist() == [0, 0, 1]


def test_where_no_image_can_be_read_the_first_is_named(make_model, labelled):
    source = Listed([replace(s, image=b"no image") for s in labelled(2)], "broken")
    with pytest.raises(ImageError, match=r"None of the 2 images of broken can be read\. First: 0: 's0'"):
        see(make_model(), source, ("b", "a"))
