"""CLIP: contrastive language-image pre-training.

Paper: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, arXiv 2103.00020.

Idea: embed images and texts with two towers into one space. In a batch of n pairs, each image should find its text among all n
and each text its image. Nothing but the pairing supervises.

Equation (figure 3): L = (CE(S, diag) + CE(S^T, diag)) / 2 with S = exp(t) I T^T, I and T L2-normalised, exp(t) <= 100.

What differs: samples of one group, and samples with the very same text, are positives of each other instead of false negatives.
With distinct groups and texts the loss is CLIP's to the bit. The demo trains it from scratch: see README.
"""

from dataclasses import dataclass

from diptych.losses.contrastive import info_nce, shared_positives
from diptych.models.dual import DualEncoder
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
        positives = shared_positives(batch.group, batch.texts[0].key) if self.config.multi_positive else None
        contrastive = info_nce(encoded.images[0], encoded.texts[0], self.model.scale, positives=positives)
        return Losses(contrastive, {"contrastive": contrastive})
