"""Text towers. One call, one record: `TowerOutput`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from diptych.errors import ConfigError, TextError
from diptych.models.transformer import Activation, Transformer
from diptych.types import TowerOutput


class AbstractTextTower(nn.Module, ABC):
    """Turns token ids into one vector and a sequence of tokens.

    Attributes:
        width: Size of the pooled vector and of the tokens.
    """

    width: int

    @abstractmethod
    def forward(
        self,
        ids: Int64[Tensor, "b t"],
        mask: Bool[Tensor, "b t"],
        *,
        layers: Sequence[int] = (),
        attention: Sequence[int] = (),
        context: Float[Tensor, "b c w"] | None = None,
        context_start: int = 1,
    ) -> TowerOutput:
        """Return pooled vector and tokens, and the residual stream or attention of the layers asked for (0 is the first block).

        `context` stands in for the embeddings of c ids from number `context_start` on, before positions are added: a learnt prompt, behind the
        first token as a rule.
        """

    def token_embeddings(self, ids: Int64[Tensor, "b t"]) -> Float[Tensor, "b t e"]:
        """Return what stands for ids before positions are added; `context` takes vectors of this kind.

        Raises:
            ConfigError: If the tower does not show them, which is so until it says how.
        """
        del ids
        raise ConfigError(
            f"A vector can stand in for a word only where the text tower shows its embeddings of tokens, and {type(self).__name__} has no "
            "token_embeddings. Take a model with our TextConfig, or with an encoder of transformers that takes inputs_embeds."
        )

    @property
    @abstractmethod
    def by_row(self) -> bool:
        """Return whether what comes out for a text depends on its own real tokens alone: not on padding, and now not on chance."""


@dataclass(frozen=True)
class TextConfig:
    """Our text transformer. Covers CLIP (causal, end token) and SigLIP (bidirectional, padding attended, last position) exactly.

    Attributes:
        vocabulary: Number of ids.
        length: Most positions.
        width: Residual stream.
        depth: Number of blocks.
        heads: Attention heads; divides `width`.
        mlp_width: Hidden units of each block's MLP.
        causal: Each position sees itself and earlier ones only.
        attend_padding: Padding is looked at like any token (SigLIP); texts must then be padded to `length`.
        pool: `end` takes the last real token, `last` the last position, `first` the first, `mean` averages real tokens.
        activation: Of the MLPs.
        epsilon: Of every LayerNorm.
    """

    vocabulary: int = 4096
    length: int = 32
    width: int = 128
    depth: int = 2
    heads: int = 4
    mlp_width: int = 512
    causal: bool = True
    attend_padding: bool = False
    pool: Literal["end", "last", "first", "mean"] = "end"
    activation: Activation = "gelu"
    epsilon: float = 1e-5


class TextTransformer(AbstractTextTower):
    """The text tower of CLIP (Radford et al. 2021) with the variations of `TextConfig`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Parameter(torch.randn(config.length, config.width) * 0.01)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.transformer = Transformer(
            config.width,
            config.depth,
            config.heads,
            config.mlp_width,
            activation=config.activation,
            epsilon=config.epsilon,
        )
        self.norm_after = nn.LayerNorm(config.width, config.epsilon)

    def forward(
        self,
        ids: Int64[Tensor, "b t"],
        mask: Bool[Tensor, "b t"],
        *,
        layers: Sequence[int] = (),
        attention: Sequence[int] = (),
        context: Float[Tensor, "b c w"] | None = None,
        context_start: int = 1,
    ) -> TowerOutput:
        """Return pooled vector and tokens; see `AbstractTextTower`.

        Raises:
            TextError: If the texts are longer than the tower.
        """
        length = ids.shape[1]
        if length > self.config.length:
            raise TextError(
                f"The text tower takes at most {self.config.length} tokens, these texts have {length}. Use the model's own tokenizer."
            )
        stream = with_context(self.token_embeddings(ids), context, context_start) + self.position[:length]
        stream, kept, maps = self.transformer(stream, self._visible(mask), layers=layers, attention=attention)
        stream = self.norm_after(stream)
        return TowerOutput(self._pool(stream, mask), stream, mask=mask, layers=kept, attention=maps)

    def token_embeddings(self, ids: Int64[Tensor, "b t"]) -> Float[Tensor, "b t e"]:
        """Return rows of the table; see `AbstractTextTower`."""
        return self.token_embedding(ids)  # type: ignore[no-any-return]

    @property
    def by_row(self) -> bool:
        """Return False where padding is looked at, or something is dropped at random."""
        config, transformer = self.config, self.transformer
        drops = self.training and (transformer.stream_dropout > 0 or transformer.path_dropout > 0)
        return config.pool != "last" and (config.causal or not config.attend_padding) and not drops

    def _visible(self, mask: Bool[Tensor, "b t"]) -> Bool[Tensor, "..."] | None:
        """Return which positions each position may look at. Right padding needs no mask under a causal one."""
        if self.config.causal:
            return torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
        return None if self.config.attend_padding else mask[:, None, None, :]

    def _pool(self, stream: Tensor, mask: Bool[Tensor, "b t"]) -> Tensor:
        """Return one vector per text."""
        if self.config.pool == "mean":
            weight = mask.to(stream.dtype)[..., None]
            return (stream * weight).sum(1) / weight.sum(1)
        if self.config.pool == "end":
            positions = torch.arange(mask.shape[1], device=mask.device)
            return stream[torch.arange(len(stream), device=mask.device), (mask * positions).argmax(1)]
        return stream[:, 0 if self.config.pool == "first" else -1]


def with_context(
    tokens: Float[Tensor, "b t w"], context: Float[Tensor, "b c w"] | None, start: int = 1
) -> Float[Tensor, "b t w"]:
    """Return embeddings of tokens with those from number `start` on replaced; as they are without a context."""
    if context is None:
        return tokens
    return torch.cat([tokens[:, :start], context.to(tokens.dtype), tokens[:, start + context.shape[1] :]], 1)
