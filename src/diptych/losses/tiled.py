"""Contrastive losses that never hold a matrix of all pairs: exact, block by block, with O(n d) memory.

Both losses are a sum over all pairs minus a sum over the positive ones. The second is linear in the logits, so it needs no pairs at all:
`Positives.sums` gives it in O(n d). The first goes through blocks of at most BLOCK x BLOCK logits:

- InfoNCE: the forward pass keeps only the log-sum-exp of each row and column; the backward pass computes each block again.
- Sigmoid: a cell's gradient needs no other cell, so the forward pass collects the gradient too, when one is wanted.

Cost model, n pairs of dimension d, in matrix products of 2 n^2 d operations each, forward and backward together:

|          | products, dense | products, tiled | passes over n^2 cells, in memory or in cache | extra memory, dense | extra memory, tiled  |
|----------|-----------------|-----------------|----------------------------------------------|---------------------|----------------------|
| InfoNCE  | 3               | 4               | about 25 in memory / 8 in cache              | 6 n^2 floats        | 2 n d + 3 BLOCK^2    |
| sigmoid  | 3               | 3               | about 15 in memory / 12 in cache             | 6 n^2 floats        | 4 n d + 3 BLOCK^2    |

Two things make up for the fourth product. One power serves the row and the column sums: with |logit| <= bound, exp(logit - shift) cannot
overflow for any cell, and unless a row or column lies so far below the bound that its sum is nearly lost (then a running maximum
per row and column is used instead) all of them can share one shift. And every pass but the products runs in the processor's cache.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from diptych.losses.positives import Positives

BLOCK = 1024
"""Rows and columns of a block of logits: 4 MB in fp32, so that the few copies of it that live at a time stay in cache."""

LOG2_E = 1 / math.log(2)
"""Powers of 2 are several times as fast as powers of e, so logits are in units of log 2 wherever they become exponents."""

ROOM = 72.0
"""The largest exponent left after the shift. 2^72 and sums of it are far from overflow, their reciprocals from underflow, in fp32."""

LEAST = 2.0**-83
"""Sums of at least this are exact: terms that underflow, below 2^-126, change them by less than a share of n 2^-43."""


def tiled_info_nce(
    image: Float[Tensor, "n d"], text: Float[Tensor, "n d"], scale: Float[Tensor, ""], *, positives: Positives | None
) -> Float[Tensor, ""]:
    """Return `contrastive.info_nce` in O(n d) memory. All arguments have one type, fp32 or fp64; no second derivatives."""
    return _InfoNCE.apply(image.contiguous(), text.contiguous(), scale, positives)  # type: ignore[no-any-return]


def tiled_sigmoid_loss(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    *,
    positives: Positives | None,
) -> Float[Tensor, ""]:
    """Return `contrastive.sigmoid_loss` in O(n d) memory. All arguments have one type, fp32 or fp64; no second derivatives."""
    train = torch.is_grad_enabled()  # always False inside a Function, where it is needed
    return _Sigmoid.apply(image.contiguous(), text.contiguous(), scale, bias, positives, train)  # type: ignore[no-any-return]


class _InfoNCE(torch.autograd.Function):
    """(row + column log-sum-exps - scale * sum over positives of (1/|P(i)| + 1/|P(j)|) image_i . text_j) / 2n."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, positives: Positives | None) -> Tensor:
        with _no_autocast(image):
            rows, columns = power_sums(image, text, scale * LOG2_E)
            total = (rows.logs().sum() + columns.logs().sum()) / LOG2_E - scale * _dot(image, _shared(text, positives))
        ctx.save_for_backward(image, text, scale, rows.shift, rows.sums, columns.shift, columns.sums)
        ctx.positives = positives
        return (total / (2 * len(image))).to(image.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, *sums = ctx.saved_tensors
        rows, columns = PowerSums(*sums[:2]), PowerSums(*sums[2:])
        need_image, need_text, need_scale, _ = ctx.needs_input_grad
        with _no_autocast(image):
            image_grad = _shared(text, ctx.positives).neg_() if need_image or need_scale else None
            text_grad = _shared(image, ctx.positives).neg_() if need_text else None
            for block in _blocks(len(image), len(text)):
                logits = _logits(image, text, scale * LOG2_E, block)
                _add_products(image_grad, text_grad, _probabilities(logits, rows, columns, block), image, text, block)
            scale_grad = _dot(image_grad, image) if need_scale else None
            return *_finish(gradient / (2 * len(image)), scale, image_grad, text_grad, scale_grad), None


class _Sigmoid(torch.autograd.Function):
    """(sum over all cells of softplus(logit) - sum over positives of logit) / n."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, positives: Positives | None, train: bool
    ) -> Tensor:
        need_image, need_text, need_scale, need_bias = (train and need for need in ctx.needs_input_grad[:4])
        pairs = len(image) if positives is None else positives.counts.sum()
