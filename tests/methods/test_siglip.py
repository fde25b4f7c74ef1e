import math

import pytest
import torch

from by_hand import embeddings, pairs
from diptych.data.tokenizer import Tokenizer
from diptych.data.transforms import ImagePolicy
from diptych.errors import ConfigError
from diptych.methods.siglip import Config, Objective, mini, recipe
from diptych.models.build import DualConfig, build
from diptych.models.dual import DualEncoder, ScaleConfig
from diptych.models.text import TextConfig
from diptych.models.vision import VisionConfig
from diptych.types import Batch, PairEmbeddings

SCALE, BIAS = 10.0, -10.0


@pytest.fixture
def model() -> DualEncoder:
    """Return a tiny model with the temperature and bias of the recipe."""
    config = DualConfig(
        VisionConfig(image_size=16, width=16, depth=1, heads=2, mlp_width=32),
        TextConfig(vocabulary=300, length=16, width=16, depth=1, heads=2, mlp_width=32),
        scale=recipe().model.architecture.scale,
        image_policy=ImagePolicy(size=16),
    )
    return build(config, Tokenizer.train(["a"], vocabulary=300, length=16))


def loss(model, encoded: PairEmbeddings, batch: Batch, *, multi_positive: bool = True) -> float:
    return Objective(model, Config(multi_positive)).loss(encoded, batch).total.item()


def algorithm_1(encoded: PairEmbeddings, positives: list[list[int]]) -> float:
    """Return the loss cell by cell, with the positives of each row given."""
    image, text = encoded.images[0], encoded.texts[0]
    total = 0.0
    for i in range(len(image)):
        for j in range(len(text)):
            z = 1 if j in positives[i] else -1
            total += math.log1p(math.exp(-z * (SCALE * float(image[i] @ text[j]) + BIAS)))
    return total / len(image)


def test_distinct_samples_give_the_loss_of_the_paper(model):
    encoded, batch = embeddings(6), pairs([*range(6)], [*range(6)])
    expected = algorithm_1(encoded, [[i] for i in range(6)])
    assert loss(model, encoded, batch) == pytest.approx(expected, rel=1e-5)
    assert loss(model, encoded, batch) == loss(model, encoded, batch, multi_positive=False)


@pytest.mark.parametrize(
    ("group", "key", "positives"),
    [
        ([5, 6, 5, 7], [1, 2, 3, 4], [[0, 2], [1], [0, 2], [3]]),
        ([1, 2, 3, 4], [8, 9, 7, 9], [[0], [1, 3], [2], [1, 3]]),
        ([5, 5, 2, 3], [1, 8, 8, 4], [[0, 1], [0, 1, 2], [1, 2], [3]]),
    ],
    ids=["groups", "texts", "both"],
)
def test_duplicates_are_positives_of_each_other(model, group, key, positives):
    encoded, batch = embeddings(4), pairs(group, key)
    assert loss(model, encoded, batch) == pytest.approx(algorithm_1(encoded, positives), rel=1e-5)
    plain = algorithm_1(encoded, [[i] for i in range(4)])
    assert loss(model, encoded, batch, multi_positive=False) == pytest.approx(plain, rel=1e-5)


def test_the_first_loss_of_equal_embeddings_by_hand(model):
    same = torch.eye(3)[:1].expand(5, 3)
    # All logits are 10 - 10 = 0: 25 cells of log 2 over 5 samples.
    found = loss(model, PairEmbeddings((same,), (same,)), pairs([*range(5)], [*range(5)]))
    assert found == pytest.approx(5 * math.log(2), rel=1e-5)


def test_orthogonal_pairs_by_hand(model):
    eye = torch.eye(4)
    # Per sample: one positive at logit 0, three negatives at -10.
    found = loss(model, PairEmbeddings((eye,), (eye,)), pairs([*range(4)], [*range(4)]))
    assert found == pytest.approx(math.log(2) + 3 * math.log1p(math.exp(-10)), rel=1e-5)


def test_scale_and_bias_both_learn(model):
    losses = Objective(model, Config()).loss(embeddings(4), pairs([*range(4)], [*range(4)]))
    losses.total.backward()
    assert model.log_scale.grad is not None and model.log_scale.grad != 0
    assert model.bias is not None and model.bias.grad is not None and model.bias.grad != 0


def test_a_model_without_a_bias_is_refused(make_model):
    with pytest.raises(ConfigError, match=r"logit bias.*scale\.bias"):
        Objective(make_model(), Config())


def test_the_recipe_starts_with_the_scale_and_bias_of_the_paper():
    assert recipe().model.architecture.scale == ScaleConfig(math.log(10), -10.0)
    assert mini() == recipe()
