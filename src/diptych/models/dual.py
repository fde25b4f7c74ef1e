"""The dual encoder: two towers, two heads, one scale, and the preprocessing it was trained with."""

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.config import fingerprint
from diptych.data.tokenizer import Tokenizer
from diptych.data.transforms import ImagePolicy
from diptych.errors import ConfigError
from diptych.models.by_length import encode_by_length
from diptych.models.text import AbstractTextTower
from diptych.models.vision import AbstractVisionTower
from diptych.types import Tokens, TowerOutput

if TYPE_CHECKING:
    from diptych.models.build import DualConfig

TowerMode = Literal["frozen", "full", "lora"]
"""`frozen` trains nothing of a tower, `full` everything, `lora` low-rank updates of its attention (extra `hf`)."""

Images = UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b 3 h w"] | TowerOutput
"""One view of a batch: pixels, 0 to 255 or in [0, 1], or what a frozen image tower made of them before."""

MAX_LOG_SCALE = math.log(100)


@dataclass(frozen=True)
class ScaleConfig:
    """How cosines become logits: logits = exp(log_scale) * cosine + bias.

    Attributes:
        log_scale: Start value; CLIP log(1 / 0.07), SigLIP log(10).
        bias: Start value, or None for none; SigLIP -10.
    """

    log_scale: float = math.log(1 / 0.07)
    bias: float | None = None


class DualEncoder(nn.Module):
    """Two towers and their heads. Embeddings are always L2-normalised fp32.

    Attributes:
        vision: Image tower.
        text: Text tower.
        image_head: Maps the image tower's output record to [b, d].
        text_head: Maps the text tower's output record to [b, d].
        log_scale: Learnt log of 1 / temperature; use `scale`, which is clamped.
        bias: Learnt logit bias, or None.
        config: Everything but weights and vocabulary; with those, what a checkpoint holds.
        tokenizer: Preprocessing of texts.
        texts_by_length: Encode texts in groups of similar length, and equal texts once, where it saves time (on a CPU). Equal to encoding
            them together but for rounding.
    """

    texts_by_length = True

    def __init__(
        self,
        config: "DualConfig",
        vision: AbstractVisionTower,
        text: AbstractTextTower,
        image_head: nn.Module,
        text_head: nn.Module,
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vision, self.text = vision, text
        self.image_head, self.text_head = image_head, text_head
        self.log_scale = nn.Parameter(torch.tensor(config.scale.log_scale))
        self.bias = None if config.scale.bias is None else nn.Parameter(torch.tensor(config.scale.bias))
        self.register_buffer("mean", torch.tensor(config.image_policy.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(config.image_policy.std)[:, None, None], persistent=False)

    @property
    def image_policy(self) -> ImagePolicy:
        """Return the preprocessing of images."""
        return self.config.image_policy

    @property
    def scale(self) -> Float[Tensor, ""]:
        """Return 1 / temperature, at most 100."""
        return self.log_scale.clamp(max=MAX_LOG_SCALE).exp()

    @property
    def device(self) -> torch.device:
        """Return where the model is."""
        return self.log_scale.device

    @property
    def fingerprint(self) -> str:
        """Return a hash of everything that embeddings depend on: weights, architecture, preprocessing, vocabulary."""
        digest = hashlib.blake2b(f"{fingerprint(self.config)}{self.tokenizer.to_json()}".encode(), digest_size=16)
        for name, value in self.state_dict().items():
            digest.update(
                f"{name}{value.dtype}".encode() + value.detach().cpu().contiguous().view(-1).numpy().tobytes()
            )
        return digest.hexdigest()

    def pixels(self, images: Images) -> Float[Tensor, "b 3 h w"]:
        """Return normalised pixels from uint8 images, or from float images in [0, 1] (for gradients with respect to the input).

        Raises:
            ConfigError: If all that is left of the images is what a tower made of them.
        """
        if isinstance(images, TowerOutput):
            raise ConfigError(
                "Pixels are needed, and the batch holds outputs of a frozen tower. Set data.cache.mode to off."
            )
        if images.dtype == torch.uint8:  # in place: no gradient, and a third of the passes over memory
            return images.float().div_(255).sub_(self.mean).div_(self.std)  # type: ignore[arg-type]
        return (images - self.mean) / self.std  # type: ignore[operator]

    def image_output(self, images: Images) -> TowerOutput:
        """Return what the image tower makes of images; a frozen one that was asked before is not asked again."""
        return images if isinstance(images, TowerOutput) else self.vision(self.pixels(images))

    def text_output(self, tokens: Tokens) -> TowerOutput:
        """Return what the text tower makes of texts; a frozen one that was asked before is not asked again."""
        if tokens.output is not None:
            return tokens.output
        if self.texts_by_length and tokens.ids.device.type == "cpu":
            return encode_by_length(self.text, tokens.ids, tokens.mask)
        return self.text(tokens.ids, tokens.mask)  # type: ignore[no-any-return]

    def encode_image(self, images: Images) -> Float[Tensor, "b d"]:
        """Return image embeddings."""
        return normalise(self.image_head(self.image_output(images)))

    def encode_text(self, tokens: Tokens) -> Float[Tensor, "b d"]:
        """Return text embeddings."""
        return normalise(self.text_head(self.text_output(tokens)))


def normalise(x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """Return fp32 vectors of length 1."""
    return F.normalize(x.float(), dim=-1)
