import math

import torch
from torch import nn

from diptych.models.statistics import EPSILON, layer_statistics


def layers(*shapes: tuple[int, int, int], dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def test_they_equal_a_naive_loop():
    found = layers((2, 5, 3), (2, 7, 4))
    statistics = layer_statistics(found)
    for layer, means, deviations in zip(found, statistics.means, statistics.deviations, strict=True):
        for row in range(2):
            for channel in range(layer.shape[2]):
                values = layer[row, :, channel].tolist()
                mean = sum(values) / len(values)
                spread = math.sqrt((sum((value - mean) ** 2 for value in values) + 2.3e-8) / len(values))
                assert math.isclose(means[row, channel], mean, rel_tol=1e-12)
                assert math.isclose(deviations[row, channel], spread, rel_tol=1e-12)


def test_the_order_of_positions_does_not_matter():
    (layer,) = layers((2, 197, 3))
    shuffled = layer[:, torch.randperm(197, generator=torch.Generator().manual_seed(1))]
    for own, other in zip(*(vars(layer_statistics([each])).values() for each in (layer, shuffled)), strict=True):
        torch.testing.assert_close(own[0], other[0], rtol=1e-12, atol=1e-14)


def test_a_constant_map_has_a_least_deviation_and_a_finite_gradient():
    layer = nn.Parameter(torch.full((1, 197, 2), 3.0, dtype=torch.float64))
    (deviation,) = layer_statistics([layer]).deviations
    torch.testing.assert_close(deviation, torch.full((1, 2), math.sqrt(EPSILON / 197), dtype=torch.float64))
    assert math.isclose(deviation[0, 0].item(), 1.08e-5, rel_tol=1e-2)
    deviation.sum().backward()
    assert torch.equal(layer.grad, torch.zeros_like(layer))


def test_half_precision_is_summed_in_fp32():
    (layer,) = layers((1, 300, 2), dtype=torch.float32)
    low = layer.bfloat16()
    assert torch.equal(layer_statistics([low]).deviations[0], layer_statistics([low.float()]).deviations[0])
