"""A model as a configuration: what `model.json` holds, and how it becomes modules again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from diptych.data.tokenizer import TextPolicy, Tokenizer
from diptych.data.transforms import ImagePolicy
from diptych.errors import ConfigError
from diptych.models.codebook import CodebookHeadConfig, codebook_heads
from diptych.models.dual import DualEncoder, ScaleConfig
from diptych.models.foreign import HFTextConfig, HFTextTower, TimmConfig, TimmTower
from diptych.models.heads import ClassMixtureHead, ClassMixtureHeadConfig, LinearHead, LinearHeadConfig
from diptych.models.text import AbstractTextTower, TextConfig, TextTransformer
from diptych.models.vision import AbstractVisionTower, VisionConfig, VisionTransformer


@dataclass(frozen=True)
class DualConfig:
    """Everything about a dual encoder but its weights and its tokenizer's vocabulary."""

    vision: VisionConfig | TimmConfig = field(default_factory=VisionConfig)
    text: TextConfig | HFTextConfig = field(default_factory=TextConfig)
    image_head: LinearHeadConfig | ClassMixtureHeadConfig | CodebookHeadConfig = field(default_factory=LinearHeadConfig)
    text_head: LinearHeadConfig | CodebookHeadConfig = field(default_factory=LinearHeadConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    image_policy: ImagePolicy = field(default_factory=ImagePolicy)
    text_policy: TextPolicy = field(default_factory=TextPolicy)


def build(config: DualConfig, tokenizer: Tokenizer, *, text_record: Mapping[str, Any] | None = None) -> DualEncoder:
    """Return a freshly initialised model; seed torch first if it must be repeatable.

    Args:
        config: Its text policy is the one that counts.
        tokenizer: Gives the vocabulary.
        text_record: Of a text tower of transformers whose folder need not be there, see `HFTextTower.record`.
    """
    vision, text = _vision_tower(config.vision), _text_tower(config.text, text_record)
    heads = _heads(config, vision.width, text.width)
    return DualEncoder(config, vision, text, *heads, Tokenizer(tokenizer.engine, config.text_policy))


def _heads(config: DualConfig, image_width: int, text_width: int) -> tuple[nn.Module, nn.Module]:
    image, text = config.image_head, config.text_head
    if isinstance(image, CodebookHeadConfig) and isinstance(text, CodebookHeadConfig):
        return codebook_heads(image_width, image, text_width, text)
    if isinstance(image, CodebookHeadConfig) or isinstance(text, CodebookHeadConfig):
        raise ConfigError(
            "Either both heads are codebook heads or none is: image_head is a "
            f"{type(image).__name__}, text_head a {type(text).__name__}."
        )
    if isinstance(image, LinearHeadConfig):
        return LinearHead(image_width, image), LinearHead(text_width, text)
    return ClassMixtureHead(image_width, image), LinearHead(text_width, text)


def _vision_tower(config: VisionConfig | TimmConfig) -> AbstractVisionTower:
    return VisionTransformer(config) if isinstance(config, VisionConfig) else TimmTower(config)


def _text_tower(config: TextConfig | HFTextConfig, record: Mapping[str, Any] | None) -> AbstractTextTower:
    return TextTransformer(config) if isinstance(config, TextConfig) else HFTextTower(config, record=record)
