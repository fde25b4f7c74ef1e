"""Heads: from a tower's output record to an embedding, not yet normalised."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych.types import TowerOutput


@dataclass(frozen=True)
class LinearHeadConfig:
    """A projection of the pooled vector.

    Attributes:
        dim: Embedding size, or None for no projection.
        bias: Whether it has one.
    """

    dim: int | None = 128
    bias: bool = False


class LinearHead(nn.Module):
    """Projects the pooled vector."""

    def __init__(self, width: int, config: LinearHeadConfig) -> None:
        super().__init__()
        self.linear = nn.Identity() if config.dim is None else nn.Linear(width, config.dim, bias=config.bias)
        if isinstance(self.linear, nn.Linear):
            nn.init.normal_(self.linear.weight, std=width**-0.5)

    def forward(self, output: TowerOutput) -> Float[Tensor, "b d"]:
        """Return the projected pooled vector."""
        return self.linear(output.pooled)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ClassMixtureHeadConfig:
    """A head that starts from a classifier.

    Attributes:
        classes: Classes of the classifier.
        dim: Size of the class-name embeddings, which is the embedding size.
    """

    classes: int = 1000
    dim: int = 384


class ClassMixtureHead(nn.Module):
    """The class-probability-weighted mean of class-name embeddings, plus a learnt linear residual.

    e(x) = softmax(W x + b) C + R x. With R = 0 an image is embedded where the names of the classes that it resembles are, so a
    classifier and a sentence encoder are aligned before any pair is seen.
    """

    def __init__(self, width: int, config: ClassMixtureHeadConfig) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, config.classes)
        self.names = nn.Parameter(torch.randn(config.classes, config.dim) * config.dim**-0.5)
        self.residual = nn.Linear(width, config.dim, bias=False)
        nn.init.zeros_(self.residual.weight)

    def forward(self, output: TowerOutput) -> Float[Tensor, "b d"]:
        """Return mixture plus residual."""
        share = self.classifier(output.pooled).float().softmax(-1).to(output.pooled.dtype)
        return share @ self.names + self.residual(output.pooled)  # type: ignore[no-any-return]


def normed_mlp(*widths: int, hidden_bias: bool = True, last_bias: bool = True) -> nn.Sequential:
    """Return Linear, BatchNorm, ReLU for each hidden width, then a Linear; the projector of self-supervised methods.

    Its batch statistics look at other samples, so in an objective it belongs into `loss`.

    Args:
        widths: Of the input, of each hidden layer, of the output.
        hidden_bias: Whether the Linear layers in front of a norm have a bias.
        last_bias: Whether the last one has.
    """
    layers: list[nn.Module] = []
    for width, hidden in pairwise(widths[:-1]):
        layers += [nn.Linear(width, hidden, bias=hidden_bias), nn.BatchNorm1d(hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=last_bias))
