"""Features of the places of an image, by which places that look alike are found: of a self-supervised model, or of a model's own tower.

A provider is a function from uint8 images to a grid of vectors.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from diptych.data.transforms import ImagePolicy
from diptych.errors import ConfigError, require
from diptych.models.dual import DualEncoder
from diptych.models.embedding import inference
from diptych.models.sam import preprocessing, read_settings
from diptych.models.vision import AbstractVisionTower

DenseFeatures = Callable[[UInt8[Tensor, "b 3 side side"]], Float[Tensor, "b c rows columns"]]
"""From square images of any size to features."""

FAMILIES = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit")
"""What transformers calls the families that are known to give patches behind a class token; DINO's first models are of `vit`."""


def tower_features(model: DualEncoder) -> DenseFeatures:
    """Return the tokens of a model's own image tower, for where there is no other model.

    Raises (when asked):
        ConfigError: If the tower gives no patches.
    """

    def features(images: Tensor) -> Tensor:
        with inference(model):
            output = model.vision(model.pixels(images.to(model.device)))
        if output.tokens is None or output.grid is None:
            raise ConfigError(
                f"Features need patches, and this image tower ({type(model.vision).__name__}) gives none."
            )
        return output.tokens.float().mT.unflatten(2, output.grid)  # type: ignore[no-any-return]

    return features


def layer_features(tower: AbstractVisionTower, layer: int, policy: ImagePolicy) -> DenseFeatures:
    """Return what leaves a layer of any tower, such as a stage of a network of convolutions that was trained on pictures alone.

    Args:
        tower: Put in eval mode here.
        layer: Counted from 0.
        policy: Gives mean and standard deviation.
    """
    tower.eval()
    device = next(tower.parameters()).device
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (policy.mean, policy.std))

    @torch.inference_mode()
    def features(images: Tensor) -> Tensor:
        (stream,) = tower((images.to(device).float() / 255 - mean) / std, layers=(layer,)).layers
        rows = math.isqrt(stream.shape[1])  # images are square, and there is at most a class token before the patches
        return stream[:, -rows * rows :].float().mT.unflatten(2, (rows, rows))  # type: ignore[no-any-return]

    return features


def load_self_supervised(folder: str | Path) -> "SelfSupervised":
    """Return the features of a DINO, DINOv2 or DINOv3 in a folder of transformers; nothing is downloaded.

    Raises:
        CheckpointError: If it is of another family, or lacks weights or preprocessing.
        MissingExtraError: Without transformers.
    """
    folder = Path(folder)
    read_settings(folder, FAMILIES)
    record = preprocessing(folder)
    model = require("transformers", "hf").AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return SelfSupervised(model.eval(), record["image_mean"], record["image_std"])


class SelfSupervised:
    """Patch tokens of the last layer. Images whose sides are no whole patches are resized up to the next."""

    def __init__(self, model: Any, mean: list[float], std: list[float]) -> None:
        self.model = model
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b c rows columns"]:
        """Return the features."""
        config = self.model.config
        rows, columns = (-(-length // config.patch_size) for length in images.shape[2:])
        pixels = images.float().cpu() / 255
        size = (rows * config.patch_size, columns * config.patch_size)
        if size != tuple(images.shape[2:]):
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        pixels = ((pixels - self.mean) / self.std).to(self.model.device)
        more = {"interpolate_pos_encoding": True} if config.model_type == "vit" else {}
        tokens: Tensor = self.model(pixels, **more).last_hidden_state[:, -rows * columns :].float()
        return tokens.mT.unflatten(2, (rows, columns))  # type: ignore[no-any-return]
