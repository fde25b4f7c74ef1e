import pytest
import torch

from diptych.training.speed import counting, matmul_peak


def test_products_are_counted_forward_and_backward():
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    with counting() as found:
        (a @ b).sum().backward()
    assert found.count == 3 * 2 * 3 * 5 * 7  # the product, and one for each side's gradient


def test_counting_can_be_off():
    with counting(on=False) as found:
        torch.randn(3, 5) @ torch.randn(5, 7)
    assert found.count == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_is_one_that_a_processor_can_have(precision):
    peak = matmul_peak(torch.device("cpu"), precision)
    assert 0.1 < peak < 1e6
    assert matmul_peak(torch.device("cpu"), precision) == peak
