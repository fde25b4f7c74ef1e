import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from by_hand import embeddings, pairs
from diptych.claims.claim import Trial
from diptych.claims.reproduce import check
from diptych.claims.train import train_quietly
from diptych.config import override
from diptych.data.sources import Listed
from diptych.methods import clip
from diptych.methods.clip import WITHOUT, Config, Objective, claim, demo, mini, recipe
from diptych.models.dual import MAX_LOG_SCALE
from diptych.types import Batch, PairEmbeddings


def loss(model, encoded: PairEmbeddings, batch: Batch, *, multi_positive: bool = True) -> float:
    return Objective(model, Config(multi_positive)).loss(encoded, batch).total.item()


@pytest.fixture
def model(make_model):
    return make_model()


def figure_3(image: Tensor, text: Tensor, log_scale: float) -> float:
    """Return the loss as in the pseudo-code of the paper."""
    logits = image @ text.T * math.exp(log_scale)
    labels = torch.arange(len(logits))
    return ((cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2).item()


def test_distinct_samples_give_the_loss_of_the_paper(model):
    encoded, batch = embeddings(7), pairs([*range(7)], [*range(7)])
    expected = figure_3(encoded.images[0], encoded.texts[0], math.log(1 / 0.07))
    assert loss(model, encoded, batch) == pytest.approx(expected, rel=1e-6)


def test_the_switch_changes_nothing_on_distinct_samples(model):
    encoded, batch = embeddings(7), pairs([*range(7)], [*range(7)])
    assert loss(model, encoded, batch) == loss(model, encoded, batch, multi_positive=False)


@pytest.mark.parametrize(
    ("group", "key"), [([5, 5, 6], [1, 2, 3]), ([1, 2, 3], [5, 5, 6]), ([5, 5, 6], [7, 7, 8])], ids=str
)
def test_duplicates_are_positives_of_each_other_by_hand(model, group, key):
    # Samples 0 and 1 have the same embeddings, 2 is orthogonal: a duplicate row is (s, s, 0).
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    encoded, s = PairEmbeddings((image,), (image,)), 1 / 0.07
    both = math.log(2 + math.exp(-s))  # -log softmax of one s among (s, s, 0)
    alone = math.log(1 + 2 * math.exp(-s))  # of s among (s, 0, 0)
    found = loss(model, encoded, pairs(group, key))
    assert found == pytest.approx((2 * both + alone) / 3, abs=1e-6)
    assert found == pytest.approx(2 / 3 * math.log(2), abs=1e-5)  # the mean log number of positives, the least there is


def test_switched_off_a_duplicate_is_a_negative(model):
    encoded = embeddings(4)
    duplicated = loss(model, encoded, pairs([1, 1, 2, 3], [1, 2, 3, 4]), multi_positive=False)
    assert duplicated == loss(model, encoded, pairs([1, 2, 3, 4], [1, 2, 3, 4]))
    assert duplicated != pytest.approx(loss(model, encoded, pairs([1, 1, 2, 3], [1, 2, 3, 4])))


def test_the_scale_is_clamped_at_100(model):
    encoded, batch = embeddings(5), pairs([*range(5)], [*range(5)])
    with torch.no_grad():
        model.log_scale.fill_(50.0)
    expected = figure_3(encoded.images[0], encoded.texts[0], MAX_LOG_SCALE)
    assert loss(model, encoded, batch) == pytest.approx(expected, rel=1e-5)


def test_views_count_alike(model):
    one, batch = embeddings(5), pairs([*range(5)], [*range(5)])
    both = PairEmbeddings((one.images[0], one.images[0].roll(1, 1)), one.texts)
    alone = [loss(model, PairEmbeddings((image,), one.texts), batch) for image in both.images]
    assert loss(model, both, batch) == pytest.approx(sum(alone) / 2, rel=1e-6) and alone[0] != pytest.approx(alone[1])


def test_every_view_is_encoded(model):
    image = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    two = replace(pairs([0, 1, 2], [0, 1, 2]), images=(image, image.flip(3)))
    encoded = Objective(model.eval(), Config()).encode(two)
    assert len(encoded.images) == 2 and len(encoded.texts) == 1
    torch.testing.assert_close(encoded.images[1], model.encode_image(two.images[1]))


def test_only_the_first_text_is_used(model):
    encoded, batch = embeddings(5), pairs([*range(5)], [*range(5)])
    more = PairEmbeddings(encoded.images, (encoded.texts[0], -encoded.texts[0]))
    column = replace(batch.texts[0], key=torch.zeros(5, dtype=torch.int64))
    assert loss(model, more, replace(batch, texts=(batch.texts[0], column))) == loss(model, encoded, batch)


def test_the_default_trains_heads_only_and_the_miniature_everything_from_scratch():
    assert (recipe().model.start, recipe().model.vision_mode, recipe().model.text_mode) == ("auto", "frozen", "frozen")
    assert (mini().model.start, mini().model.vision_mode, mini().model.text_mode) == ("new", "full", "full")
    assert mini().model.architecture.scale.log_scale == pytest.approx(math.log(1 / 0.07))


def test_the_ablation_is_well_formed_and_each_arm_is_another_recipe():
    check(claim(), "clip")
    recipes = [mini(), demo(), *(override(demo(), changes) for changes in WITHOUT.values())]
    assert all(one != other for place, one in enumerate(recipes) for other in recipes[:place])
    passed = claim()[0].control.passed
    assert passed({"control": [0.0, 0.01]}) and not passed({"control": [0.0, 0.03]})


@pytest.mark.slow
def test_every_arm_of_the_ablation_runs():
    sizes = []

    def train(settings, source):
        small = Listed([source[index] for index in range(64)], source.name)
        sizes.append((settings.epochs, len(settings.data.views)))
        settings = replace(settings, epochs=1, data=replace(settings.data, batch_size=32))
        return train_quietly(settings, small, clip, seed=0)[0]

    (one,) = claim()
    values = [arm.run(Trial(0, "validation", {}, lambda slug: mini(), train)) for arm in one.arms]
    assert all(0 <= value < 0.1 for value in values)
    assert sizes[:2] == [(24, 1), (42, 2)]
