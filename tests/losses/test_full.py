import pytest
import torch

from diptych.losses.full import full


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_small_formats_become_fp32_and_fp64_stays(dtype):
    x = torch.tensor([1.0, 0.1], dtype=dtype, requires_grad=True)
    found = full(x)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(found.to(dtype), x)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.dtype == dtype and gradient.tolist() == [1, 1]
