"""The losses of `tiled` as Triton kernels for NVIDIA GPUs: what leaves the chip is one number per row, or a row of a gradient.

Correctness was tested in Triton's interpreter only, on a CPU; for compute capability 8.0 and 9.0 the kernels were compiled, no more. None has
run on a GPU, none has been timed, block sizes are guesses. They are therefore off until `contrastive.FUSED_FROM` is set.

A program owns a few rows of one side, goes through all of the other side in blocks of columns, and keeps a running maximum. A second launch
with the sides exchanged serves the columns. So no two programs write to one place: no atomics, and equal inputs give equal bits. The price,
in matrix products of 2 n^2 d; each gradient takes the product that it is, and that of the logits once for every WIDTH dimensions:

|         | forward | backward            | d <= 256 | d = 512 | `tiled` | plain |
|---------|---------|---------------------|----------|---------|---------|-------|
| InfoNCE | 2       | 2 + 2 ceil(d / 256) | 6        | 8       | 4       | 3     |
| sigmoid | 1       | 2 + 2 ceil(d / 256) | 5        | 7       | 3       | 3     |

Memory beside inputs and their gradients: some numbers per sample. Products are true fp32, never TF32, whatever the autocast.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float32
from torch import Tensor

from diptych.losses.positives import Positives
from diptych.losses.tiled import LOG2_E, Gradients, refuse_second_derivatives

ROWS, COLUMNS = 64, 32
"""Cells that a program holds at a time."""

DEPTH = 32
"""Dimensions of the embeddings that are multiplied at a time."""

WIDTH = 256
"""Dimensions of a gradient that one program collects: ROWS x WIDTH registers."""

CHAIN = tl.constexpr(64)
"""Products added up before rounding errors are cut off, as in `tiled`; at least DEPTH."""


def fused_info_nce(
    image: Float32[Tensor, "n d"], text: Float32[Tensor, "n d"], scale: Float32[Tensor, ""], positives: Positives | None
) -> Float32[Tensor, ""]:
    """Return `contrastive.info_nce` in O(n d) memory, for a scale above 0; no second derivatives."""
    return _InfoNCE.apply(image.contiguous(), text.contiguous(), scale, positives)  # type: ignore[no-any-return]


def fused_sigmoid_loss(
    image: Float32[Tensor, "n d"],
    text: Float32[Tensor, "n d"],
    scale: Float32[Tensor, ""],
    bias: Float32[Tensor, ""],
    positives: Positives | None,
) -> Float32[Tensor, ""]:
    """Return `contrastive.sigmoid_loss` in O(n d) memory; no second derivatives."""
    return _Sigmoid.apply(image.contiguous(), text.contiguous(), scale, bias, positives)  # type: ignore[no-any-return]


class _InfoNCE(torch.autograd.Function):
    """(log-sum-exps of rows and columns - sum over positives of (1/|P(i)| + 1/|P(j)|) logit) / 2n."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, positives: Positives | None) -> Tensor:
        group, key = _keys(image, positives)
        share = image.new_ones(len(image)) if positives is None else 1 / positives.counts.to(image.dtype)
        highest, totals, matched = (image.new_empty(2, len(image)) for _ in range(3))
        for side, (x, y) in enumerate(((image, text), (text, image))):
            outputs = (highest[side], totals[side], matched[side])
            _launch(_power_sums, x, (x, y, scale * LOG2_E, group, key), outputs)
        matches = (matched.double() * share).sum()
        total = scale * (highest.double().sum() - matches) + totals.double().log().sum()
        ctx.save_for_backward(image, text, scale, group, key, share, highest, 1 / totals)
        ctx.centre = matches / (2 * len(image))
        return (total / (2 * len(image))).to(image.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        image, text, scale, group, key, share, highest, inverse = ctx.saved_tensors
        gradients = Gradients.zeros(image, text, ctx.needs_input_grad)
        cells = image.new_empty(len(image))
        for x, y, to_x, (one, other) in (
            (text, image, gradients.to_text, (1, 0)),
            (image, text, gradients.to_image, (0, 1)),
        ):
            if to_x is not None:
                sides = (highest[one], inverse[one], highest[other], inverse[other])
                inputs = (x, y, scale * LOG2_E, group, key, share, *sides)
                _launch(_info_nce_gradient, x, inputs, (to_x, cells), width=WIDTH)
        factor = gradient / (2 * len(image))
        to_image, to_text, to_scale = gradients.finish(scale, factor)
        if to_scale is not None:
            # The cells add up to 0 but for rounding, which products of one size would make much of.
            to_scale = (to_scale - ctx.centre * cells.double().sum() * factor).to(scale.dtype)
        return to_image, to_text, to_scale, None


class _Sigmoid(torch.autograd.Function):
    """Sum over all cells of softplus(-z logit), divided by n; z = 1 for positives and -1 elsewhere."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, positives: Positives | None
    ) -> Tensor:
        group, key = _keys(image, positives)
        total = image.new_empty(len(image))
        _launch(_softplus_sums, image, (image, text, scale, bias, group, key), (total,))
        ctx.save_for_backward(image, text, scale, bias, group, key)
        return total.double().mean().to(image.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        image, text, scale, bias, group, key = ctx.saved_tensors
        needs_image, needs_text, needs_scale, needs_bias, _ = ctx.needs_input_grad
        gradients = Gradients.zeros(image, text, (needs_image, needs_text, needs_scale or needs_bias))
        cells = image.new_empty(len(image))
        for x, y, to_x in ((image, text, gradients.to_image), (text, image, gradients.to_text)):
            if to_x is not None:
                _launch(_sigmoid_gradient, x, (x, y, scale, bias, group, key), (to_x, cells), width=WIDTH)
        factor = gradient / len(image)
        return *gradients.finish(scale, factor), (cells.double().sum() * factor).to(bias.dtype), None


def _keys(image: Tensor, positives: Positives | None) -> tuple[Tensor, Tensor]:
    """Return group and text key of each sample, all distinct where only the diagonal is positive."""
    if positives is not None:
        return positives.group.contiguous(), positives.text_key.contiguous()
    alone = torch.arange(len(image), device=image.device)
    return alone, alone


def _launch(
    kernel: Any, x: Tensor, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], *, width: int | None = None
) -> None:
    """Run one program per ROWS rows of x and, if the width is given, per so many dimensions."""
    n, d = x.shape
    sizes = {"ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": DEPTH}
    if width is not None:
        sizes["WIDTH"] = min(width, max(16, triton.next_power_of_2(d)))
    grid = (triton.cdiv(n, ROWS), triton.cdiv(d, sizes.get("WIDTH", d)))
    with torch.cuda.device_of(x):
        kernel[grid](*inputs, *outputs, n, d, **sizes, num_warps=8, num_stages=1)


@triton.jit
@no_type_check
def _power_sums(
    x, y, scale, group, key, highest_out, total_out, matched_out, n, d,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Per row: the highest product, the sum of 2^(scale (product - highest)), and the sum of the positives' products.

    What is subtracted before it is scaled loses nothing to rounding at the size of the logits.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    factor = tl.load(scale)
    row_group, row_key = tl.load(group + row, row < n, 0), tl.load(key + row, row < n, 0)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    matched = tl.zeros([ROWS], tl.float32)
    for start in range(0, n, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        cells = _products(x, y, row, column, n, d, ROWS, COLUMNS, DEPTH)
        matched += tl.sum(tl.where(_positive(row_group, row_key, group, key, column, n), cells, 0.0), 1)
        cells = tl.where(column[None, :] < n, cells, float("-inf"))
        after = tl.maximum(highest, tl.max(cells, 1))
        powers = tl.exp2((cells - after[:, None]) * factor)
        total = total * tl.exp2((highest - after) * factor) + tl.sum(powers, 1)
        highest = after
    tl.store(highest_out + row, highest, row < n)
    tl.store(total_out + row, total, row < n)
    tl.store(matched_out + row, matched, row < n)


@triton.jit
@no_type_check
def _info_nce_gradient(
    x, y, scale, group, key, share, x_highest, x_inverse, y_highest, y_inverse, to_x, to_total, n, d,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Per row: the sum over cells of (softmax of row + softmax of column - shares of a positive), and of that times y."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    depth = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    factor = tl.load(scale)
    row_group, row_key = tl.load(group + row, row < n, 0), tl.load(key + row, row < n, 0)
    row_highest, row_inverse = tl.load(x_highest + row, row < n, 0.0), tl.load(x_inverse + row, row < n, 0.0)
    row_share = tl.load(share + row, row < n, 0.0)
    gradient = tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, n, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_highest = tl.load(y_highest + column, column < n, 0.0)
        column_inverse = tl.load(y_inverse + column, column < n, 0.0)
        inside = (row[:, None] < n) & (column[None, :] < n)
        cells = tl.where(inside, _products(x, y, row, column, n, d, ROWS, COLUMNS, DEPTH), float("-inf"))
        by_row = tl.exp2((cells - row_highest[:, None]) * factor) * row_inverse[:, None]
        by_column = tl.exp2((cells - column_highest[None, :]) * factor) * column_inverse[None, :]
        shares = row_share[:, None] + tl.load(share + column, column < n, 0.0)[None, :]
        positive = inside & _positive(row_group, row_key, group, key, column, n)
        cells = by_row + by_column - tl.where(positive, shares, 0.0)
        total += tl.sum(cells, 1)
        others = tl.load(y + _offsets(column, depth, d), (column[:, None] < n) & (depth[None, :] < d), 0.0)
        gradient = tl.dot(cells, others, gradient, input_precision="ieee")
    tl.store(to_x + _offsets(row, depth, d), gradient, (row[:, None] < n) & (depth[None, :] < d))
    if tl.program_id(1) == 0:
        tl.store(to_total + row, total, row < n)


@triton.jit
@no_type_check
def _softplus_sums(
    x, y, scale, bias, group, key, total_out, n, d,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Per row: the sum of log(1 + e^(-z logit))."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    factor, offset = tl.load(scale), tl.load(bias)
    row_group, row_key = tl.load(group + row, row < n, 0), tl.load(key + row, row < n, 0)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, n, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        cells = _products(x, y, row, column, n, d, ROWS, COLUMNS, DEPTH) * factor + offset
        cells = tl.where(_positive(row_group, row_key, group, key, column, n), -cells, cells)
        total += tl.sum(tl.where(column[None, :] < n, _softplus(cells), 0.0), 1)
    tl.store(total_out + row, total, row < n)


@triton.jit
@no_type_check
def _sigmoid_gradient(
    x, y, scale, bias, group, key, to_x, to_total, n, d,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Per row: the sum over cells of -z sigmoid(-z logit), and of that times y."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    depth = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    factor, offset = tl.load(scale), tl.load(bias)
    row_group, row_key = tl.load(group + row, row < n, 0), tl.load(key + row, row < n, 0)
    gradient = tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, n, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        cells = _products(x, y, row, column, n, d, ROWS, COLUMNS, DEPTH) * factor + offset
        sign = tl.where(_positive(row_group, row_key, group, key, column, n), -1.0, 1.0)
        cells = tl.where(column[None, :] < n, sign * _sigmoid(sign * cells), 0.0)
        total += tl.sum(cells, 1)
        others = tl.load(y + _offsets(column, depth, d), (column[:, None] < n) & (depth[None, :] < d), 0.0)
        gradient = tl.dot(cells, others, gradient, input_precision="ieee")
    tl.store(to_x + _offsets(row, depth, d), gradient, (row[:, None] < n) & (depth[None, :] < d))
    if tl.program_id(1) == 0:
        tl.store(to_total + row, total, row < n)


@triton.jit
@no_type_check
def _products(x, y, row, column, n, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """Return x[row] @ y[column]^T; 0 beyond the end."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for chain in range(0, d, CHAIN):
        part = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(chain, min(chain + CHAIN, d), DEPTH):
            depth = start + tl.arange(0, DEPTH)
            left = tl.load(x + _offsets(row, depth, d), (row[:, None] < n) & (depth[None, :] < d), 0.0)
            right = tl.load(y + _offsets(column, depth, d), (column[:, None] < n) & (depth[None, :] < d), 0.0)
            part = tl.dot(left, tl.trans(right), part, input_precision="ieee")
        total += part
    return total


@triton.jit
@no_type_check
def _offsets(row, depth, d):
    return row[:, None].to(tl.int64) * d + depth[None, :]  # n d may be beyond 2^31


@triton.jit
@no_type_check
def _positive(row_group, row_key, group, key, column, n):
    """Return which cells are positives; beyond the end, anything."""
    column_group, column_key = tl.load(group + column, column < n, 0), tl.load(key + column, column < n, 0)
    return (row_group[:, None] == column_group[None, :]) | (row_key[:, None] == column_key[None, :])


@triton.jit
@no_type_check
def _softplus(x):
    """Return log(1 + e^x) = max(x, 0) + 2 artanh(u / (2 + u)), u = e^-|x|, which loses nothing of a small u.

    The argument s is at most 1/3: the series s + s^3/3 + s^5/5 + ... is exact in fp32 after eight terms.
    """
    u = tl.exp(-tl.abs(x))
    s = u / (2.0 + u)
    q = s * s
    series = 1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * series)))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
@no_type_check
def _sigmoid(x):
    """Return 1 / (1 + e^-x), without powers that overflow."""
    u = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, u) / (1.0 + u)
