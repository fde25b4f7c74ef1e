"""What tests of whole runs share: a folder of photos with captions, towers of one layer, a recipe that trains in a second."""

from dataclasses import replace
from pathlib import Path

from diptych.config import override
from diptych.data.sources import AbstractSource, Listed
from diptych.data.transforms import ImagePolicy
from diptych.methods import clip
from diptych.models.build import DualConfig
from diptych.models.text import TextConfig
from diptych.models.vision import VisionConfig
from diptych.types import Text


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package may catch it."""


ARCHITECTURE = {
    "vision": {"image_size": 16, "width": 16, "depth": 1, "heads": 2, "mlp_width": 32},
    "text": {"width": 16, "depth": 1, "heads": 2, "mlp_width": 32},
    "image_head": {"dim": 8},
    "text_head": {"dim": 8},
    "image_policy": {"size": 16},
    "text_policy": {"length": 16},
}
TINY = override(
    clip.mini(),
    {
        "epochs": 2,
        "evaluate_every": 0,
        "log_every": 1,
        "held_out": 0.25,
        "model": {"architecture": ARCHITECTURE, "vocabulary": 300},
        "data": {"batch_size": 8, "texts": [{}]},
    },
)


def with_tiny_towers(architecture: DualConfig) -> DualConfig:
    """Return an architecture with towers of one layer for 16-pixel images; heads and temperature stay."""
    return replace(
        architecture,
        vision=VisionConfig(image_size=16, width=16, depth=1, heads=2, mlp_width=32),
        text=TextConfig(width=16, depth=1, heads=2, mlp_width=32),
        image_policy=ImagePolicy(size=16),
    )


def with_roles(source: Listed) -> Listed:
    """Return the samples with a text of every role that describes an image, so that any text column finds its own."""
    roles = ("translation", "rewrite", "synthetic", "label")
    return Listed([replace(s, texts=(*s.texts, *(Text(f"{role} of {s.key}", role) for role in roles))) for s in source])


def write_photos(folder: Path, source: AbstractSource) -> Path:
    """Write each sample's image and its first text under its key; return the folder."""
    folder.mkdir()
    for sample in source:
        (folder / f"{sample.key}.png").write_bytes(sample.image)
        (folder / f"{sample.key}.txt").write_text(sample.texts[0].text)
    return folder
