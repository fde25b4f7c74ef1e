"""A model as a configuration: what `model.json` holds, and how it becomes modules again."""

from dataclasses import dataclass, field

from torch import nn

from diptych.data.tokenizer import TextPolicy, Tokenizer
from diptych.data.transforms import ImagePolicy
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
    image_head: LinearHeadConfig | ClassMixtureHeadConfig = field(default_factory=LinearHeadConfig)
    text_head: LinearHeadConfig = field(default_factory=LinearHeadConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    image_policy: ImagePolicy = field(default_factory=ImagePolicy)
    text_policy: TextPolicy = field(default_factory=TextPolicy)


def build(config: DualConfig, tokenizer: Tokenizer) -> DualEncoder:
    """Return a freshly initialised model; seed torch first if it must be repeatable.

    Args:
        config: Its text policy is the one that counts.
        tokenizer: Gives the vocabulary.
    """
    vision, text = _vision_tower(config.vision), _text_tower(config.text)
    image_head: nn.Module = (
        LinearHead(vision.width, config.image_head)
        if isinstance(config.image_head, LinearHeadConfig)
        else ClassMixtureHead(vision.width, config.image_head)
    )
    text_head = LinearHead(text.width, config.text_head)
    return DualEncoder(config, vision, text, image_head, text_head, Tokenizer(tokenizer.engine, config.text_policy))


def _vision_tower(config: VisionConfig | TimmConfig) -> AbstractVisionTower:
    return VisionTransformer(config) if isinstance(config, VisionConfig) else TimmTower(config)


def _text_tower(config: TextConfig | HFTextConfig) -> AbstractTextTower:
    return TextTransformer(config) if isinstance(config, TextConfig) else HFTextTower(config)
