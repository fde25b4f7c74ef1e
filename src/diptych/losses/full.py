"""The number format that losses compute in."""

import torch
from jaxtyping import Float
from torch import Tensor


def full(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return a tensor in fp32 at least; fp64 stays, for gradient checks."""
    return x if x.dtype == torch.float64 else x.float()
