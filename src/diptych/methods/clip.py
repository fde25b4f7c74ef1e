"""CLIP: contrastive language-image pre-training.

Paper: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, arXiv 2103.00020.

Idea: embed images and texts with two towers into one space. In a batch of n pairs, each image should find its text among all n
and each text its image. Nothing but the pairing supervises.

Equation (figure 3): L = (CE(S, diag) + CE(S^T, diag)) / 2 with S = exp(t) I T^T, I and T L2-normalised, exp(t) <= 100.

What differs: samples of one group, and samples with the very same text, are positives of each other instead of false negatives.
With distinct groups and texts the loss is CLIP's. The demo trains it from scratch: see README.
"""

from dataclasses import dataclass

from diptych.data.loader import LoaderConfig, TextColumn
from diptych.data.tokenizer import TextPolicy
from diptych.data.transforms import Augment
from diptych.losses.contrastive import info_nce_per_text
from diptych.models.build import DualConfig
from diptych.models.dual import DualEncoder
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
    """Symmetric InfoNCE over the first view and the first text."""

    def __init__(self, model: DualEncoder, config: Config) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def encode(self, batch: Batch) -> PairEmbeddings:
        """Return the embeddings of the main view and the main text."""
        return PairEmbeddings((self.model.encode_image(batch.images[0]),), (self.model.encode_text(batch.texts[0]),))

    def loss(self, encoded: PairEmbeddings, batch: Batch) -> Losses:
        """Return InfoNCE; log n at chance."""
        contrastive = info_nce_per_text(
            encoded.images[0], encoded.texts[:1], batch, self.model.scale, multi_positive=self.config.multi_positive
        )
        return Losses(contrastive, {"contrastive": contrastive})


def recipe() -> Recipe[Config]:
    """Return the default for `diptych train`: pretrained towers stay as they are, heads and temperature learn.

    That is what a few hundred to a few thousand pairs can pay for. Images are shown as evaluation shows them, so frozen towers look at each
    once, and their outputs are kept. The paper trains everything from scratch: 32 epochs over 400 million
    pairs in batches of 32,768, lr 5e-4 (ViT-B/32), weight decay 0.2, 2,000 warm-up steps (section 2.5, table 18).
    """
    return Recipe(
        "clip",
        Config(),
        model=ModelConfig(start="auto", vision_mode="frozen", text_mode="frozen"),
        data=LoaderConfig(batch_size=128),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, ema_decay=0.99),
        epochs=10,
    )


def mini() -> Recipe[Config]:
    """Return the demo: everything from scratch on 64-pixel drawings, about two minutes on two idle cores.

    English names are drawn most of the time, names in other languages otherwise; values were chosen on drawings kept out of training.
    """
    return Recipe(
        "clip",
        Config(),
        model=ModelConfig(start="new", architecture=DualConfig(text_policy=TextPolicy(length=24))),
        data=LoaderConfig(
            batch_size=128,
            texts=(TextColumn(("caption", "translation"), (0.85, 0.15)),),
            views=(Augment(crop_scale=(0.8, 1.0), crop_ratio=(0.8, 1.25)),),
        ),
        optimizer=OptimizerConfig(lr=1.5e-3, weight_decay=0.2, ema_decay=0.99),
        epochs=24,
        evaluate_every=4,
        save_every=100,
    )
