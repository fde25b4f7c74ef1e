"""Image towers. One call, one record: `TowerOutput`."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.errors import ConfigError
from diptych.models.transformer import Activation, AttentionPool, Transformer
from diptych.types import TowerOutput


class AbstractVisionTower(nn.Module, ABC):
    """Turns normalised pixels into one vector and a grid of patches.

    Attributes:
        width: Size of the pooled vector and of the patches.
        depth: How many layers can be asked for; 0 for none.
    """

    width: int
    depth: int

    @abstractmethod
    def forward(
        self, pixels: Float[Tensor, "b 3 h w"], *, layers: Sequence[int] = (), attention: Sequence[int] = ()
    ) -> TowerOutput:
        """Return pooled vector and patches, and the residual stream or attention of the layers asked for (0 is the first block)."""


@dataclass(frozen=True)
class VisionConfig:
    """Our vision transformer. Covers CLIP (class token, norm before) and SigLIP (attention pooling) exactly.

    Attributes:
        image_size: Side of the square input, pixels.
        patch_size: Side of a patch, pixels; divides `image_size`.
        width: Residual stream.
        depth: Number of blocks.
        heads: Attention heads; divides `width`.
        mlp_width: Hidden units of each block's MLP.
        pool: `class` takes the class token, `mean` averages the patches, `attention` learns a query (SigLIP's MAP head).
        norm_before: LayerNorm between position embedding and first block (CLIP).
        patch_bias: Bias in the patch embedding.
        activation: Of the MLPs.
        epsilon: Of every LayerNorm.
    """

    image_size: int = 64
    patch_size: int = 8
    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp_width: int = 512
    pool: Literal["class", "mean", "attention"] = "class"
    norm_before: bool = True
    patch_bias: bool = False
    activation: Activation = "gelu"
    epsilon: float = 1e-5


class VisionTransformer(AbstractVisionTower):
    """ViT (Dosovitskiy et al. 2021) with the variations of `VisionConfig`.

    Images of another size than its own are welcome, whole patches provided: position embeddings are then interpolated.

    Attributes:
        patch_dropout: Share of the patches that are left out in training; set by `dropping_patches`.
    """

    patch_dropout = 0.0

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        if config.image_size % config.patch_size:
            raise ConfigError(f"image_size {config.image_size} must be a multiple of patch_size {config.patch_size}.")
        self.config = config
        self.width, self.depth = config.width, config.depth
        self.side = config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=config.patch_bias)
        has_class = config.pool == "class"
        self.class_token = nn.Parameter(torch.randn(config.width) * config.width**-0.5) if has_class else None
        self.position = nn.Parameter(torch.randn(self.side**2 + has_class, config.width) * config.width**-0.5)
        self.norm_before = nn.LayerNorm(config.width, config.epsilon) if config.norm_before else nn.Identity()
        self.transformer = Transformer(
            config.width,
            config.depth,
            config.heads,
            config.mlp_width,
            activation=config.activation,
            epsilon=config.epsilon,
        )
        self.norm_after = nn.LayerNorm(config.width, config.epsilon)
        pooling = config.pool == "attention"
        self.attention_pool = (
            AttentionPool(
                config.width, config.heads, config.mlp_width, activation=config.activation, epsilon=config.epsilon
            )
            if pooling
            else None
        )

    def forward(
        self, pixels: Float[Tensor, "b 3 h w"], *, layers: Sequence[int] = (), attention: Sequence[int] = ()
    ) -> TowerOutput:
        """Return pooled vector and patches; see `AbstractVisionTower`.

        Raises:
            ConfigError: If the sides of the image are no multiples of the patch's.
        """
        grid, whole = self.grid_of(pixels), not (self.training and self.patch_dropout > 0)
        stream = self._with_positions(pixels, grid)
        if not whole:
            stream = keep_patches(stream, self.patch_dropout, first=stream.shape[1] - grid[0] * grid[1])
        stream = self.norm_before(stream)
        stream, kept, maps = self.transformer(stream, layers=layers, attention=attention)
        return replace(self.read(stream, grid if whole else None), layers=kept, attention=maps)

    def embed(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b s width"]:
        """Return the stream that enters the first block, class token included; no patch is left out."""
        return self.norm_before(self._with_positions(pixels, self.grid_of(pixels)))  # type: ignore[no-any-return]

    def read(self, stream: Float[Tensor, "b s w"], grid: tuple[int, int] | None) -> TowerOutput:
        """Return pooled vector and patches of the stream that left the last block."""
        # Patches come out before the last norm is applied by CLIP; CLIP norms the class token only, but dense uses want normed patches.
        stream = self.norm_after(stream)
        if self.class_token is not None:
            pooled, patches = stream[:, 0], stream[:, 1:]
        elif self.attention_pool is not None:
            pooled, patches = self.attention_pool(stream), stream
        else:
            pooled, patches = stream.mean(dim=1), stream
        return TowerOutput(pooled, patches, grid=grid)

    def _with_positions(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        # patches_bpw
        embedding = self.patch_embedding
        stream = F.linear(cut_patches(pixels, self.config.patch_size), embedding.weight.flatten(1), embedding.bias)
        if self.class_token is not None:
            stream = torch.cat([self.class_token.to(stream.dtype).expand(len(stream), 1, -1), stream], dim=1)
        return stream + self.positions(grid)

    def positions(self, grid: tuple[int, int]) -> Float[Tensor, "s w"]:
        """Return the position embeddings of a grid of (rows, columns): the learnt ones, or between them, bicubic and antialiased.

        The class token keeps its own. Source: Dosovitskiy et al. 2021, section 3.2; Caron et al. 2021, for crops of two sizes.
        """
        if grid == (self.side, self.side):
            return self.position
        own = self.side**2
        first, patches = self.position[:-own], self.position[-own:]
        square = patches.T.unflatten(1, (self.side, self.side))[None].float()
        resized = F.interpolate(square, grid, mode="bicubic", antialias=True)[0].flatten(1).T
        return torch.cat([first, resized.to(first.dtype)])

    def grid_of(self, pixels: Float[Tensor, "b 3 h w"]) -> tuple[int, int]:
        """Return rows and columns of patches.

        Raises:
            ConfigError: If the sides of the image are no multiples of the patch's.
        """
        (height, width), side = pixels.shape[-2:], self.config.patch_size
        if height % side or width % side:
            raise ConfigError(
                f"An image of {width} x {height} pixels cannot be cut into patches of {side}. Choose sizes of views that {side} divides."
            )
        return height // side, width // side


def cut_patches(pixels: Float[Tensor, "b 3 h w"], side: int) -> Float[Tensor, "b p n"]:
    """Return the 3 side^2 numbers of each patch, patches in row order: a convolution of stride `side` is then one matrix product.

    Under autocast they come in its precision, so that half the bytes are moved. A compiled training step on a CPU took 0.92 of
    the time with the convolution (patches of 32 pixels, one run); without a compiler two runs gave 0.97 and 1.07.
    """
    device = pixels.device.type
    if torch.is_autocast_enabled(device):
        pixels = pixels.to(torch.get_autocast_dtype(device))
    cut = pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # b 3 rows side columns side
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # type: ignore[no-any-return]


def keep_patches(stream: Float[Tensor, "b s w"], rate: float, *, first: int) -> Float[Tensor, "b kept w"]:
    """Return a stream without a random share of its patches, drawn anew for each sample; those kept stay in order.

    Args:
        stream: With position embeddings, which say where a patch was.
        rate: Share of the patches that go, in [0, 1); at least one stays.
        first: Number of positions before the patches, which all stay.

    Source: Li et al. 2023, "Scaling Language-Image Pre-training via Masking", section 3.
    """
    patches = stream.shape[1] - first
    count = max(1, round(patches * (1 - rate)))
    kept = torch.rand(len(stream), patches, device=stream.device).topk(count).indices.sort().values + first
    chosen = stream.gather(1, kept[..., None].expand(-1, -1, stream.shape[2]))
    return torch.cat([stream[:, :first], chosen], 1)


@contextmanager
def dropping_patches(tower: nn.Module, rate: float) -> Iterator[None]:
    """Leave out a random share of the patches in training mode while open (FLIP): an approximation that makes steps cheaper.

    The class token stays, and in eval mode nothing is left out. Tokens are then the patches that were kept, without a grid.

    Args:
        tower: Ours; others have no common way to leave patches out.
        rate: In [0, 1); 0 changes nothing. The paper takes 0.5 and 0.75.

    Raises:
        ConfigError: If the tower cannot, or the rate is out of range.
    """
    if not 0 <= rate < 1:
        raise ConfigError(f"patch_dropout is a share of the patches, at least 0 and below 1, not {rate}.")
    if rate > 0 and not isinstance(tower, VisionTransformer):
        raise ConfigError(
            f"patch_dropout needs diptych's own vision transformer; a {type(tower).__name__} cannot leave patches out. Set it to 0, or make "
            "speed.resolutions smaller instead, which any tower of convolutions takes."
        )
    if not isinstance(tower, VisionTransformer):
        yield
        return
    before, tower.patch_dropout = tower.patch_dropout, rate
    try:
        yield
    finally:
        tower.patch_dropout = before
