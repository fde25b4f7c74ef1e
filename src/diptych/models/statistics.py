"""What a layer of an image tower says of an image wherever one looks: means tell more of its content, deviations of its style."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.losses.full import full

EPSILON = 2.3e-8
"""Keeps the gradient of a deviation finite where all positions are alike; the deviation is then sqrt(EPSILON / s)."""


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics over the positions of each layer, channel by channel. Layers may differ in width.

    Attributes:
        means: mu.
        deviations: sigma, above 0.
    """

    means: tuple[Float[Tensor, "b _w"], ...]
    deviations: tuple[Float[Tensor, "b _w"], ...]


def layer_statistics(layers: Sequence[Float[Tensor, "b _s _w"]]) -> LayerStatistics:
    """Return mu = mean_s x and sigma = sqrt((sum_s (x - mu)^2 + EPSILON) / s) of every layer, in fp32.

    Neither depends on the order of the positions.

    Args:
        layers: As `TowerOutput.layers`.

    Source: Huang and Belongie 2017 (AdaIN), equations 5 and 6, on statistics as style; where EPSILON stands, the official code of IP-CLIP.
    """
    means = tuple(full(layer).mean(1) for layer in layers)
    return LayerStatistics(means, tuple(map(_deviation, layers, means)))


def _deviation(layer: Tensor, mean: Tensor) -> Tensor:
    return torch.sqrt(((full(layer) - mean[:, None]).square().sum(1) + EPSILON) / layer.shape[1])
