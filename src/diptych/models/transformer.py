"""The pre-norm transformer that both of our towers stand on. Query, key, value and output are separate Linear layers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation, elementwise."""
        return x * torch.sigmoid(1.702 * x)


def make_activation(name: Activation) -> nn.Module:
    """Return the activation module of that name."""
    return {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "quick_gelu": QuickGELU()}[name]


@dataclass(frozen=True)
class HeadVectors:
    """Queries, keys and values, cut into heads."""

    query: Float[Tensor, "b heads q c"]
    key: Float[Tensor, "b heads s c"]
    value: Float[Tensor, "b heads s c"]


class Attention(nn.Module):
    """Multi-head attention through `scaled_dot_product_attention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Float[Tensor, "b s w"]) -> Float[Tensor, "b heads s c"]:
        """Return the stream cut into heads."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(
        self, query: Float[Tensor, "b q w"], context: Float[Tensor, "b s w"], mask: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "b q w"]:
        """Return attended values; `mask` is True where looking is allowed."""
        heads = self.project(query, context)
        return self.join(attend(heads.query, heads.key, heads.value, mask))

    def project(self, query: Float[Tensor, "b q w"], context: Float[Tensor, "b s w"]) -> HeadVectors:
        """Return what is attended with, to and for."""
        return HeadVectors(
            self.split(self.query(query)), self.split(self.key(context)), self.split(self.value(context))
        )

    def join(self, x: Float[Tensor, "b heads q c"]) -> Float[Tensor, "b q w"]:
        """Return what heads write into the stream."""
        return self.out(x.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def probabilities(
        self, x: Float[Tensor, "b s w"], mask: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "b heads s s"]:
        """Return softmax(q k^T / sqrt(c)), which `forward` never materialises."""
        return attention_weights(self.split(self.query(x)), self.split(self.key(x)), mask)


def attention_weights(
    q: Float[Tensor, "b heads q c"], k: Float[Tensor, "b heads s c"], mask: Bool[Tensor, "..."] | None
) -> Float[Tensor, "b heads q s"]:
    """Return softmax(q k^T / sqrt(c)) over the positions that `mask` allows."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, -1)


def attend(
    q: Float[Tensor, "b heads q c"],
    k: Float[Tensor, "b heads s c"],
    v: Float[Tensor, "b heads s c"],
    mask: Bool[Tensor, "..."] | None,
) -> Float[Tensor, "b heads q c"]:
    """Return softmax(q k^T / sqrt(c)) v.

    PyTorch's fused kernel everywhere but for short bf16 sequences on a CPU: there two plain matmuls are two to five times
    faster, forward and backward, because they reach the processor's bf16 units (torch 2.14, 24 to 65 positions).
    """
    if k.shape[-2] <= plain_up_to(q.device, q.dtype):
        return attention_weights(q, k, mask) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def plain_up_to(device: torch.device, dtype: torch.dtype) -> int:
    """Return up to how many positions `attend` takes plain matmuls."""
    return 256 if device.type == "cpu" and dtype == torch.bfloat16 else 0


class MLP(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.activation = make_activation(activation)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream's update."""
        return self.down(self.activation(self.up(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_width: int, *, activation: Activation, epsilon: float) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width, epsilon)
        self.attention = Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width, epsilon)
        self.mlp = MLP(width, mlp_width, activation)

    def forward(
        self, x: Float[Tensor, "b s w"], mask: Bool[Tensor, "..."] | None = None, *, path_dropout: float = 0.0
    ) -> Float[Tensor, "b s w"]:
        """Return the stream after this block; each of its two updates is dropped with probability `path_dropout`."""
        normed = self.norm_attention(x)
        x = x + drop_path(self.attention(normed, normed, mask), path_dropout)
        return x + drop_path(self.mlp(self.norm_mlp(x)), path_dropout)


def drop_path(update: Float[Tensor, "b s w"], rate: float) -> Float[Tensor, "b s w"]:
    """Return an update that is 0 for a random share of the samples, and larger by 1 / (1 - rate) for the others.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth".
    """
    if rate == 0:
        return update
    return update * (torch.rand(len(update), 1, 1, device=update.device) >= rate).to(update.dtype) / (1 - rate)


class Transformer(nn.Module):
    """A stack of blocks. What it drops in training is nothing, but while `dropping` is open."""

    def __init__(
        self, width: int, depth: int, heads: int, mlp_width: int, *, activation: Activation, epsilon: float
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_width, activation=activation, epsilon=epsilon) for _ in range(depth)
        )
        self.stream_dropout = self.path_dropout = 0.0
        self._initialise(width, depth)

    def _initialise(self, width: int, depth: int) -> None:
        """Draw the weights as CLIP does: writes into the residual stream shrink with depth."""
        into_stream = width**-0.5 * (2 * depth) ** -0.5
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            assert isinstance(block, Block)
            for linear in (block.attention.query, block.attention.key, block.attention.value):
                nn.init.normal_(linear.weight, std=width**-0.5)
            nn.init.normal_(block.attention.out.weight, std=into_stream)
            nn.init.normal_(block.mlp.up.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.down.weight, std=into_stream)

    def forward(
        self,
        x: Float[Tensor, "b s w"],
        mask: Bool[Tensor, "..."] | None = None,
        *,
        layers: Sequence[int] = (),
        attention: Sequence[int] = (),
    ) -> tuple[Float[Tensor, "b s w"], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the stream, its value after each block in `layers`, and the attention of each block in `attention`."""
        streams: dict[int, Tensor] = {}
        maps: dict[int, Tensor] = {}
        for depth, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if self.training and self.stream_dropout > 0:
                x = F.dropout(x, self.stream_dropout)
            if depth in attention:
                maps[depth] = block.attention.probabilities(block.norm_attention(x), mask)
            x = block(x, mask, path_dropout=self.path_dropout if self.training else 0.0)
            if depth in layers:
                streams[depth] = x
        return x, tuple(streams[i] for i in layers), tuple(maps[i] for i in attention)


@contextmanager
def dropping(tower: nn.Module, *, stream: float = 0.0, path: float = 0.0) -> Iterator[None]:
    """Regularise some forward passes and not others: while open, the `Transformer`s in a tower drop parts of their stream.

    In training mode only; where nothing is dropped, no random number is drawn.

    Args:
        tower: Towers of other libraries have no `Transformer` and are left alone.
        stream: Probability that an element of the residual stream is dropped, at the input of each block.
        path: Probability that a sample loses the update of an attention or of an MLP.
    """
    transformers = [module for module in tower.modules() if isinstance(module, Transformer)]
    before = [(transformer.stream_dropout, transformer.path_dropout) for transformer in transformers]
    for transformer in transformers:
        transformer.stream_dropout, transformer.path_dropout = stream, path
    try:
        yield
    finally:
        for transformer, rates in zip(transformers, before, strict=True):
            transformer.stream_dropout, transformer.path_dropout = rates


class AttentionPool(nn.Module):
    """One learnt query attends to all positions, then an MLP with residual (SigLIP's MAP head)."""

    def __init__(self, width: int, heads: int, mlp_width: int, *, activation: Activation, epsilon: float) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(width) * width**-0.5)
        self.attention = Attention(width, heads)
        self.norm = nn.LayerNorm(width, epsilon)
        self.mlp = MLP(width, mlp_width, activation)

    def forward(self, x: Float[Tensor, "b s w"]) -> Float[Tensor, "b w"]:
        """Return one vector per sample."""
        pooled = self.attention(self.probe.to(x.dtype).expand(len(x), 1, -1), x)
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]  # type: ignore[no-any-return]
