"""Changes of pixels that are kept within eps, for audits of a model and for hardening it.

Pixels are floats in [0, 1] before any normalisation: that is the model's own first op, and `DualEncoder.encode_image` takes such floats beside
uint8, gives the same embedding, and hands gradients back to them. eps counts levels of 255 per channel, as papers write it: 8 is 8/255, for every
model.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from diptych.data.words import UniversalWord
from diptych.errors import ConfigError, InputError
from diptych.files import atomic_file
from diptych.models.dual import Images
from diptych.types import TowerOutput

LEVELS = 255
GREY = 128
"""The level that stands for no change in a picture of a noise."""


class AbstractPerturbation(ABC):
    """Changes images by at most eps per channel; the same images in the same way every time.

    Attributes:
        eps: Largest change, in levels of 255.
        word: What goes with it for captions; None where only images are changed.
    """

    eps: float
    word: UniversalWord | None = None

    @abstractmethod
    def apply(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Return changed pixels, in [0, 1] like those given; with eps 0 the pixels as they are."""

    @abstractmethod
    def save(self, file: Path) -> None:
        """Write all that `apply` needs."""


@dataclass(frozen=True)
class UniversalPerturbation(AbstractPerturbation):
    """One noise for all images.

    Attributes:
        delta: Added to the pixels, in units of [0, 1]; resized for images of another size.
        eps: Bound of |delta|, in levels of 255.
        word: For captions, if there is one.

    Raises:
        ConfigError: If eps is out of range, or delta exceeds it.
    """

    delta: Float[Tensor, "3 h w"]
    eps: float
    word: UniversalWord | None = None

    def __post_init__(self) -> None:
        check_eps(self.eps)
        if (largest := self.delta.abs().max().item() * LEVELS) > self.eps + 1e-3:
            raise ConfigError(
                f"The noise changes pixels by {largest:g} levels of {LEVELS}, more than eps = {self.eps:g}."
            )

    def apply(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Return clamp(pixels + delta, 0, 1)."""
        return (pixels + fit_size(self.delta[None].to(pixels), pixels.shape[-2:])).clamp(0, 1)

    def save(self, file: Path) -> None:
        """Write the noise, as the ending says: .safetensors with its eps and its word, .npy, or .png in whole levels around grey.

        Raises:
            ConfigError: If it is another ending, the noise is too large for a picture, or there is a word, which only .safetensors can hold.
        """
        if self.word is not None:
            check_holds_words(file)
        with atomic_file(file) as path:
            if file.suffix == ".safetensors":
                about = {} if self.word is None else vars(self.word)
                save_file({"delta": self.delta.contiguous()}, path, metadata={"eps": repr(self.eps), **about})
            elif file.suffix == ".npy":
                with path.open("wb") as opened:
                    np.save(opened, self.delta.numpy())
            elif file.suffix == ".png" and self.eps < GREY:
                levels = (self.delta * LEVELS).round().clamp(-int(self.eps), int(self.eps)) + GREY
                Image.fromarray(levels.byte().permute(1, 2, 0).numpy()).save(path, "PNG")
            else:
                raise ConfigError(
                    f"A noise is written as .safetensors, .npy or, below {GREY} levels, .png; not as {file.name} with eps {self.eps:g}."
                )


def sign_noise(side: int, eps: float, *, seed: int = 0) -> UniversalPerturbation:
    """Return the baseline of every attack: eps up or down for each value by chance, the largest change that eps allows, alike for all images.

    Args:
        side: Of the square, pixels.
        eps: In levels of 255.
        seed: Of the signs.
    """
    signs = torch.randint(2, (3, side, side), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1
    return UniversalPerturbation(signs * (eps / LEVELS), eps)


def check_holds_words(file: Path) -> None:
    """Raise unless a file can hold a word beside the noise.

    Raises:
        ConfigError: If it has another ending than .safetensors.
    """
    if file.suffix != ".safetensors":
        raise ConfigError(
            f"A noise with a word is written as .safetensors, which alone holds both; not as {file.name}."
        )


def as_floats(images: Images) -> Float[Tensor, "b 3 h w"]:
    """Return pixels as floats in [0, 1], which a model takes as it takes uint8.

    Raises:
        ConfigError: If all that is left of the images is what a tower made of them.
    """
    if isinstance(images, TowerOutput):
        raise ConfigError(
            "Pixels are needed, and the batch holds outputs of a frozen tower. Set data.cache.mode to off."
        )
    return images.float().div_(LEVELS) if images.dtype == torch.uint8 else images


def project(changed: Float[Tensor, "*n"], pixels: Float[Tensor, "*n"], eps: float) -> Float[Tensor, "*n"]:
    """Return the values nearest to `changed` that are within eps levels of `pixels` and in [0, 1]; no gradient where something is cut."""
    radius = eps / LEVELS
    return torch.minimum(torch.maximum(changed, pixels - radius), pixels + radius).clamp(0, 1)


def check_eps(eps: float) -> None:
    """Raise unless eps can bound a change of pixels, in levels of 255.

    Raises:
        ConfigError: If it is negative or 255 and more, or so small that it seems to be in units of [0, 1].
    """
    if not 0 <= eps < LEVELS or 0 < eps < 0.25:
        raise ConfigError(
            f"eps counts levels of {LEVELS}, so that 8/255 is 8: 0 for no change, or from 0.25 to below {LEVELS}; not {eps:g}."
        )


def fit_size(delta: Float[Tensor, "b 3 _h _w"], size: tuple[int, ...]) -> Float[Tensor, "b 3 _H _W"]:
    """Return a noise of another size, bilinear: a mean of neighbours is no larger than they are."""
    return delta if delta.shape[-2:] == size else F.interpolate(delta, tuple(size), mode="bilinear")


def load_perturbation(file: Path, *, eps: float | None = None) -> UniversalPerturbation:
    """Return a noise from a file, with its word if it has one.

    Args:
        file: .safetensors (tensor `delta`, or the only one), .npy, or a picture. Floats are in units of [0, 1], whole numbers in levels of 255; in
            a picture, where nothing can be below 0, level 128 is no change. One dimension of 1 in front, and channels last, are welcome.
        eps: Bound that the noise is cut to, in levels of 255; when absent the one in the file, else its own largest value.

    Raises:
        InputError: If it is no such file, or no noise of three channels.
    """
    try:
        values, about = _read(file)
        word = UniversalWord(about["word"], about["language"]) if "word" in about else None
        bound = float(about["eps"]) if eps is None and "eps" in about else eps
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read as a noise (.safetensors, .npy, or a picture): {error}") from error
    delta = values.squeeze(0) if values.ndim == 4 else values
    if delta.ndim == 3 and delta.shape[0] != 3:
        delta = delta.permute(2, 0, 1)
    if delta.ndim != 3 or delta.shape[0] != 3 or not delta.isfinite().all() or delta.abs().max() > 1:
        raise InputError(
            f"A noise is [3, height, width], finite, and at most 1 (all {LEVELS} levels); {file} has {list(values.shape)}, "
            f"largest {values.abs().max().item():g}. Divide levels by {LEVELS} if they are stored as floats."
        )
    if bound is None:
        bound = delta.abs().max().item() * LEVELS
    return UniversalPerturbation(delta.clamp(-bound / LEVELS, bound / LEVELS).contiguous(), bound, word)


def _read(file: Path) -> tuple[Float[Tensor, "..."], Mapping[str, str]]:
    """Return the values of a file in units of [0, 1], and what it says of them: eps, word, language."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as archive:
            names = list(archive.keys())
            if "delta" not in names and len(names) != 1:
                raise KeyError(f"it holds {', '.join(names) or 'nothing'}, and not one tensor `delta`")
            values = archive.get_tensor("delta" if "delta" in names else names[0]).float()
            return values, archive.metadata() or {}
    if file.suffix == ".npy":
        array = np.load(file, allow_pickle=False)
        return torch.from_numpy(array.astype(np.float32) / (1 if array.dtype.kind == "f" else LEVELS)), {}
    with Image.open(file) as picture:
        return torch.from_numpy((np.asarray(picture.convert("RGB"), np.float32) - GREY) / LEVELS), {}
