"""Attention over the pixels of a map, told what the map is about."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 32
"""Of the norm before attention; channels are a multiple of it."""


class ConditionedAttention(nn.Module):
    """Self-attention over pixels, then the condition, then an MLP; the identity when new, as the last layer starts at zero.

    Source: Rombach et al. 2022, "spatial transformer", with one head and one block.
    """

    def __init__(self, channels: int, condition_dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.project_in = nn.Conv2d(channels, channels, 1)
        self.norm_attention, self.norm_mlp = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.query, self.key, self.value = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.out = nn.Linear(channels, channels)
        self.condition_value = nn.Linear(condition_dim, channels, bias=False)
        self.condition_out = nn.Linear(channels, channels)
        self.gated = nn.Linear(channels, 8 * channels)
        self.mlp_out = nn.Linear(4 * channels, channels)
        self.project_out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)  # type: ignore[arg-type]

    def forward(self, maps: Float[Tensor, "n c h w"], condition: Float[Tensor, "n d"]) -> Float[Tensor, "n c h w"]:
        """Return maps of the same shape."""
        stream = self.project_in(self.norm(maps)).flatten(2).transpose(1, 2)
        normed = self.norm_attention(stream)
        attended = F.scaled_dot_product_attention(self.query(normed), self.key(normed), self.value(normed))
        stream = stream + self.out(attended)
        stream = stream + self.condition_out(self.condition_value(condition))[:, None]
        value, gate = self.gated(self.norm_mlp(stream)).chunk(2, -1)
        stream = stream + self.mlp_out(value * F.gelu(gate))
        changed: Tensor = self.project_out(stream.transpose(1, 2).unflatten(2, maps.shape[-2:]))
        return maps + changed
