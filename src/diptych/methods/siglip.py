"""SigLIP: a sigmoid loss for language-image pre-training.

Paper: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, arXiv 2303.15343.

Idea: ask of every image-text pair of the batch, by itself, whether the two belong together. No softmax, hence no normalisation over the
batch; a learnt bias absorbs that almost all pairs do not. Works at small batches and cuts cleanly across devices.

Equation (section 3.2): L = -1/n sum_ij log sigmoid(z_ij (exp(t) I_i . T_j + b)), z = 1 on positives and
-1 elsewhere; at the start t = log 10, b = -10.

What differs: samples of one group, and samples with the very same text, are positives of each other.
"""

import math
from dataclasses import dataclass

from diptych.data.loader import LoaderConfig
from diptych.data.transforms import Augment
from diptych.errors import ConfigError
from diptych.losses.contrastive import shared_positives, sigmoid_loss
from diptych.models.build import DualConfig
from diptych.models.dual import DualEncoder, ScaleConfig
from diptych.training.optim import OptimizerConfig
from diptych.training.recipe import ModelConfig, Recipe
from diptych.types import Batch, Losses, PairEmbeddings
from diptych.verbs import AbstractObjective


@dataclass(frozen=True)
class Config:
    """Settings of the objective.

    Attributes:
        multi_positive: Samples with one group or one text are positives. False: the diagonal only, as in the paper.
    """

    multi_positive: bool = True


class Objective(AbstractObjective[PairEmbeddings]):
    """Pairwise sigmoid loss over the first view and the first text.

    Raises:
        ConfigError: If the model has no logit bias.
    """

    def __init__(self, model: DualEncoder, config: Config) -> None:
        super().__init__()
        if model.bias is None:
            raise ConfigError(
                "SigLIP needs a model with a logit bias; this one has none. Set scale.bias, -10 in the paper."
            )
        self.model = model
        self.config = config

    def encode(self, batch: Batch) -> PairEmbeddings:
        """Return the embeddings of the main view and the main text."""
        return PairEmbeddings((self.model.encode_image(batch.images[0]),), (self.model.encode_text(batch.texts[0]),))

    def loss(self, encoded: PairEmbeddings, batch: Batch) -> Losses:
        """Return the sigmoid loss; n log 2 when all logits are 0."""
        assert self.model.bias is not None
        positives = shared_positives(batch.group, batch.texts[0].key) if self.config.multi_positive else None
        sigmoid = sigmoid_loss(
            encoded.images[0], encoded.texts[0], self.model.scale, self.model.bias, positives=positives
        )
        return Losses(sigmoid, {"sigmoid": sigmoid})


def recipe() -> Recipe[Config]:
    """Return a model from scratch with the paper's start of scale and bias (section 3.2: t = log 10, b = -10).

    The paper trains with batches up to 32,768, lr 1e-3, weight decay 1e-4 and betas (0.9, 0.95).
    """
    architecture = DualConfig(scale=ScaleConfig(log_scale=math.log(10), bias=-10.0))
    return Recipe(
        "siglip",
        Config(),
        model=ModelConfig(start="new", architecture=architecture),
        data=LoaderConfig(batch_size=128, views=(Augment(crop_scale=(0.8, 1.0)),)),
        optimizer=OptimizerConfig(lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4, ema_decay=0.99),
        epochs=24,
    )


def mini() -> Recipe[Config]:
    """Return the recipe itself: it is small already."""
    return recipe()
