"""A model as a configuration: what `model.json` holds, and how it becomes modules again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from diptych.data.tokenizer import TextPolicy, Tokenizer
from diptych.data.transforms import ImagePolicy
from diptych.models.dual import DualEncoder, LinearHead, ScaleConfig
from diptych.models.text import AbstractTextTower, TextConfig, TextTransformer
from diptych.models.vision import AbstractVisionTower, VisionConfig, VisionTransformer


@dataclass(frozen=True)
class LinearHeadConfig:
    """A projection of the pooled vector.

    Attributes:
        dim: Embedding size, or None for no projection.
        bias: Whether it has one.
    """

    dim: int | None = 128
    bias: bool = False


@dataclass(frozen=True)
class DualConfig:
    """Everything about a dual encoder but its weights and its tokenizer's vocabulary."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image_head: LinearHeadConfig = field(default_factory=LinearHeadConfig)
    text_head: LinearHeadConfig = field(default_factory=LinearHeadConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    image_policy: ImagePolicy = field(default_factory=ImagePolicy)
    text_policy: TextPolicy = field(default_factory=TextPolicy)


def build(config: DualConfig, tokenizer: Tokenizer) -> DualEncoder:
    """Return a freshly initialised model; seed torch first if it must be repeatable."""
    vision, text = VisionTransformer(config.vision), TextTransformer(config.text)
    return DualEncoder(
        vision,
        text,
        LinearHead(vision.width, config.image_head.dim, bias=config.image_head.bias),
        LinearHead(text.width, config.text_head.dim, bias=config.text_head.bias),
        scale=config.scale,
        image_policy=config.image_policy,
        tokenizer=tokenizer,
    )
