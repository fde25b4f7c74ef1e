from dataclasses import replace

import pytest
import torch

from diptych.data.sources import Listed
from diptych.errors import ConfigError, DataError, ImageError
from diptych.models.embedding import embed_images
from diptych.models.foreign import TimmConfig, TimmTower
from diptych.models.seen import labels_of, look, see, shown
from diptych.models.statistics import layer_statistics


def test_it_is_the_embedding_and_the_statistics_of_every_layer(make_model, drawings):
    model, source = make_model(), drawings(5)
    found = see(model, shown(model, source), torch.tensor([0, 1, 0, 1, 0]), "fp32")
    torch.testing.assert_close(found.seen.embedding, embed_images(model, source))
    pixels = model.pixels(torch.stack([*shown(model, source)]))
    with torch.no_grad():
        expected = layer_statistics(model.vision.eval()(pixels, layers=(0,)).layers)
    torch.testing.assert_close(found.seen.statistics.means, expected.means)
    torch.testing.assert_close(found.seen.statistics.deviations, expected.deviations)
    assert len(found) == 5 and found.label.tolist() == [0, 1, 0, 1, 0]


def test_what_was_seen_can_be_learnt_from(make_model, drawings):
    model, source = make_model(), drawings(3)
    found = see(model, shown(model, source), torch.zeros(3, dtype=torch.int64))
    weight = torch.ones(8, requires_grad=True)
    (found.seen.embedding @ weight).sum().backward()  # tensors of inference mode would refuse
    assert weight.grad is not None


def test_images_may_be_changed_on_their_way(make_model, drawings):
    model, source = make_model(), drawings(3)
    label = torch.zeros(3, dtype=torch.int64)
    plain = see(model, shown(model, source), label, "fp32").seen
    negative = see(model, (255 - view for view in shown(model, source)), label, "fp32").seen
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


def test_labels_are_rows_of_the_classes(drawings):
    source = Listed([replace(s, label=("b", "a")[row % 2]) for row, s in enumerate(drawings(3))], "drawings")
    assert labels_of(source, ("a", "b")).tolist() == [1, 0, 1]
    with pytest.raises(DataError, match="label of 's1' in drawings is 'a'; known: b"):
        labels_of(source, ("b",))


def test_an_image_that_cannot_be_read_is_named(make_model, drawings):
    model = make_model()
    source = Listed([replace(drawings(1)[0], image=b"no image")], "broken")
    with pytest.raises(ImageError, match="s0"):
        see(model, shown(model, source), torch.tensor([0]))
