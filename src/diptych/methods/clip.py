"""CLIP: contrastive language-image pre-training.

Paper: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, arXiv 2103.00020.

Idea: embed images and texts with two towers into one space. In a batch of n pairs, each image should find its text among all n
and each text its image. Nothing but the pairing supervises.

Equation (figure 3): L = (CE(S, diag) + CE(S^T, diag)) / 2 with S = exp(t) I T^T, I and T L2-normalised, exp(t) <= 100.

What differs: samples of one group, and samples with the very same text, are positives of each other instead of false negatives.
With distinct groups and texts the loss is CLIP's. Where `data.views` makes several views of an image, the loss is their mean, and a text
is encoded once for all of them. One view is CLIP. The demo trains it from scratch: see README.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from diptych.claims.claim import Arm, Claim, Control, Part, Trial
from diptych.claims.measures import mean_recall
from diptych.config import override, to_json
from diptych.data.loader import LoaderConfig, TextColumn
from diptych.data.openmoji import openmoji
from diptych.data.sources import AbstractSource
from diptych.data.texts import ShuffledTexts
from diptych.data.tokenizer import TextPolicy
from diptych.data.transforms import Augment
from diptych.losses.contrastive import info_nce_of_views
from diptych.models.build import DualConfig
from diptych.models.dual import DualEncoder
from diptych.training.levers import SpeedConfig
from diptych.training.optim import OptimizerConfig
from diptych.training.prepare import hold_out
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
    """Symmetric InfoNCE of every view with the first text."""

    def __init__(self, model: DualEncoder, config: Config) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def encode(self, batch: Batch) -> PairEmbeddings:
        """Return the embeddings of all views and of the main text."""
        return PairEmbeddings(
            tuple(map(self.model.encode_image, batch.images)), (self.model.encode_text(batch.texts[0]),)
        )

    def loss(self, encoded: PairEmbeddings, batch: Batch) -> Losses:
        """Return InfoNCE, its mean over the views; log n at chance."""
        contrastive = info_nce_of_views(
            encoded.images, encoded.texts[:1], batch, self.model.scale, multi_positive=self.config.multi_positive
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
    """Return a small recipe: everything from scratch on 64-pixel drawings, about two minutes on two idle cores.

    English names are drawn most of the time, names in other languages otherwise; values were chosen on drawings kept out of training.
    """
    return Recipe(
        "clip",
        Config(),
        model=ModelConfig(start="new", architecture=DualConfig(text_policy=TextPolicy(length=24))),
        data=LoaderConfig(
            batch_size=128,
            texts=(TextColumn(("caption", "translation"), (0.85, 0.15)),),
            views=(_CROP,),
        ),
        optimizer=OptimizerConfig(lr=1.5e-3, weight_decay=0.2, ema_decay=0.99),
        epochs=24,
        evaluate_every=4,
        save_every=100,
    )


def demo() -> Recipe[Config]:
    """Return the recipe of `diptych demo`: `mini` for longer, at a higher rate, two crops per drawing, half of their patches left out.

    Chosen among a dozen combinations on drawings kept out of training; `claim` takes its parts out one by one.
    """
    small = mini()
    return replace(
        small,
        data=replace(small.data, views=(_CROP, _CROP)),
        optimizer=replace(small.optimizer, lr=2.5e-3),
        speed=SpeedConfig(patch_dropout=0.5),
        epochs=42,
        evaluate_every=7,
    )


_CROP = Augment(crop_scale=(0.8, 1.0), crop_ratio=(0.8, 1.25))
WITHOUT: Mapping[str, Mapping[str, Any]] = {
    "24 epochs, not 42": {"epochs": 24},
    "one view": {"data": {"views": to_json((_CROP,))}},
    "all patches": {"speed": {"patch_dropout": 0.0}},
    "learning rate 0.0015": {"optimizer": {"lr": 1.5e-3}},
}
"""Each takes out of `demo` one part that it has beyond `mini`."""


def claim() -> tuple[Claim, ...]:
    """Return the ablation of the demo: not a claim of the paper, but which parts of `demo` help."""
    return (
        Claim(
            slug="clip",
            name="demo",
            claim="No claim of the paper: the recipe of `diptych demo`, part by part, beside the small one that it grew from.",
            setting="OpenMoji's training split from scratch; tested on the 500 emoji of its test split.",
            ours=True,
            metric="R@1, mean of both directions",
            arms=(
                Arm("the small recipe", "baseline", partial(_on_emoji, recipe=mini)),
                Arm("the demo", "method", _on_emoji),
                Arm("names of other emoji", "control", partial(_on_emoji, recipe=mini, shuffled=True)),
                *(Arm(name, "further", partial(_on_emoji, changes=changes)) for name, changes in WITHOUT.items()),
            ),
            control=Control("Names of other emoji teach nothing: R@1 below 0.02.", _control_is_at_chance),
            sources=("openmoji:train", "openmoji:test"),
        ),
    )


def _on_emoji(
    trial: Trial,
    *,
    recipe: Callable[[], Recipe[Config]] = demo,
    changes: Mapping[str, Any] = {},
    shuffled: bool = False,
) -> float:
    training, validation = hold_out(openmoji("train"), 0.15, seed=0)
    if trial.split == "test":
        training, validation = openmoji("train"), openmoji("test")
    source: AbstractSource = ShuffledTexts(training, 1.0, roles=("caption", "translation")) if shuffled else training
    return mean_recall(trial.train(override(recipe(), changes), source), validation)


def _control_is_at_chance(values: Mapping[Part, Sequence[float]]) -> bool:
    return max(values["control"]) < 0.02
