"""Contrastive losses that never hold a matrix of all pairs: exact, block by block, in O(n d) memory.

Both losses are a sum over all cells minus a sum over the positive ones. The second is linear in the logits, so it needs no cells:
`Positives.sums` gives it in O(n d). The first goes through blocks of at most BLOCK x BLOCK cells.
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
"""Powers of 2 are several times as fast as powers of e, so exponents are logits in units of log 2."""

ROOM = 72.0
"""The largest exponent after the shift: sums of 2^72 are as far from overflow as their reciprocals are from underflow, in fp32."""

LEAST = 2.0**-83
"""A sum of at least this has lost nothing: the terms that underflow, below 2^-126, are a share of less than n 2^-43."""

Block = tuple[slice, slice]


def tiled_info_nce(
    image: Float[Tensor, "n d"], text: Float[Tensor, "n d"], scale: Float[Tensor, ""], positives: Positives | None
) -> Float[Tensor, ""]:
    """Return `contrastive.info_nce` in O(n d) memory. All arguments have one type, fp32 or fp64; no second derivatives."""
    return _InfoNCE.apply(image.contiguous(), text.contiguous(), scale, positives)  # type: ignore[no-any-return]


def tiled_sigmoid_loss(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    positives: Positives | None,
) -> Float[Tensor, ""]:
    """Return `contrastive.sigmoid_loss` in O(n d) memory. All arguments have one type, fp32 or fp64; no second derivatives."""
    train = torch.is_grad_enabled()  # always False inside a Function
    return _Sigmoid.apply(image.contiguous(), text.contiguous(), scale, bias, positives, train)  # type: ignore[no-any-return]


class _InfoNCE(torch.autograd.Function):
    """(log-sum-exps of rows and columns - scale * sum over positives of (1/|P(i)| + 1/|P(j)|) image_i . text_j) / 2n."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, positives: Positives | None) -> Tensor:
        with _no_autocast(image):
            rows, columns = power_sums(image, text, scale * LOG2_E)
            total = (rows.logs().sum() + columns.logs().sum()) / LOG2_E - scale * _dot(image, _shares(text, positives))
        ctx.save_for_backward(image, text, scale, rows.shift, rows.sums, columns.shift, columns.sums)
        ctx.positives = positives
        return (total / (2 * len(image))).to(image.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, *sums = ctx.saved_tensors
        rows, columns = PowerSums(*sums[:2]), PowerSums(*sums[2:])
        needs_image, needs_text, needs_scale, _ = ctx.needs_input_grad
        with _no_autocast(image):
            gradients = _Gradients(
                image,
                text,
                _shares(text, ctx.positives).neg_() if needs_image or needs_scale else None,
                _shares(image, ctx.positives).neg_() if needs_text else None,
            )
            for block in _blocks(image, text):
                logits = _logits(image, text, scale * LOG2_E, block)
                gradients.add(block, _probabilities(logits, rows, columns, block))
            return *gradients.finish(scale, gradient / (2 * len(image))), None


class _Sigmoid(torch.autograd.Function):
    """(sum over all cells of softplus(logit) - sum over positives of logit) / n.

    The gradient of a cell needs no other cell, so the forward pass collects it as well when one is wanted.
    """

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, positives: Positives | None, train: bool
    ) -> Tensor:
        needs_image, needs_text, needs_scale, needs_bias = (train and need for need in ctx.needs_input_grad[:4])
        with _no_autocast(image):
            matched, pairs = _sums(text, positives), _number(positives, image)
            total = -scale * _dot(image, matched) - bias * pairs
            gradients = _Gradients(
                image,
                text,
                matched.neg_() if needs_image or needs_scale else None,
                _sums(image, positives).neg_() if needs_text else None,
            )
            bias_gradient = -pairs
            for block in _blocks(image, text):
                logits = _logits(image, text, scale, block).add_(bias)
                total += _softplus_sum(logits)
                if train:
                    cells = logits.sigmoid_()
                    bias_gradient += cells.sum()
                    gradients.add(block, cells)
            if train:
                n = total.new_tensor(len(image))
                ctx.save_for_backward(*gradients.finish(scale, 1 / n), (bias_gradient / n).to(bias.dtype))
        return (total / len(image)).to(image.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return *(gradient * part if need else None for part, need in needed), None, None


@dataclass(frozen=True)
class PowerSums:
    """Sums of 2^exponent over each row, or each column, as sums * 2^shift.

    Attributes:
        shift: One for all, or one each.
        sums: Of 2^(exponent - shift).
    """

    shift: Float[Tensor, "*one"]
    sums: Float[Tensor, " n"]

    def logs(self) -> Float[Tensor, " n"]:
        """Return their logarithms to base 2, in fp64."""
        return self.shift + self.sums.double().log2()


def power_sums(
    image: Float[Tensor, "m d"], text: Float[Tensor, "n d"], scale: Float[Tensor, ""]
) -> tuple[PowerSums, PowerSums]:
    """Return the sums of 2^(scale * image @ text^T) over rows and over columns.

    One power serves both, with one shift for all cells, chosen by the bound |scale| max |image_i| max |text_j| so that no cell can
    overflow. If a row or a column lies so far below the bound that its sum may be lost, a second pass keeps a maximum for each.
    """
    shift = (scale.abs() * image.norm(dim=1).amax() * text.norm(dim=1).amax() - ROOM).clamp(min=0)
    rows, columns = image.new_zeros(len(image)), image.new_zeros(len(text))
    for block in _blocks(image, text):
        powers = _logits(image, text, scale, block).sub_(shift).exp2_()
        rows[block[0]] += powers.sum(1)
        columns[block[1]] += powers.sum(0)
    if bool(torch.minimum(rows.min(), columns.min()) >= LEAST):
        return PowerSums(shift, rows), PowerSums(shift, columns)
    return _power_sums_with_maxima(image, text, scale)


def _power_sums_with_maxima(image: Tensor, text: Tensor, scale: Tensor) -> tuple[PowerSums, PowerSums]:
    """Return the same for exponents of any size, with two powers per cell."""
    sides = [PowerSums(x.new_full((len(x),), -math.inf), x.new_zeros(len(x))) for x in (image, text)]
    for block in _blocks(image, text):
        exponents = _logits(image, text, scale, block)
        for side, part, dim in zip(sides, block, (1, 0), strict=True):
            before, total = side.shift[part], side.sums[part]
            after = torch.maximum(before, exponents.amax(dim))
            powers = (exponents - after.unsqueeze(dim)).exp2_()
            total.mul_((before - after).exp2_()).add_(powers.sum(dim))
            before.copy_(after)
    return sides[0], sides[1]


def _probabilities(exponents: Tensor, rows: PowerSums, columns: PowerSums, block: Block) -> Tensor:
    """Return softmax over the row plus softmax over the column, cell by cell; overwrites the exponents."""
    row_weight, column_weight = 1 / rows.sums[block[0], None], 1 / columns.sums[block[1]]
    if rows.shift.ndim == 0:
        return exponents.sub_(rows.shift).exp2_().mul_(row_weight + column_weight)
    by_column = (exponents - columns.shift[block[1]]).exp2_().mul_(column_weight)
    return exponents.sub_(rows.shift[block[0], None]).exp2_().mul_(row_weight).add_(by_column)


@dataclass(frozen=True)
class _Gradients:
    """Gradients of a loss that is a function of logits = scale * image @ text^T, summed up block by block; None where not needed."""

    image: Tensor
    text: Tensor
    to_image: Tensor | None
    to_text: Tensor | None

    def add(self, block: Block, cells: Tensor) -> None:
        """Add what a block adds, given the derivatives by its logits."""
        rows, columns = block
        if self.to_image is not None:
            _add_product(self.to_image[rows], cells, self.text[columns])
        if self.to_text is not None:
            _add_product(self.to_text[columns], cells.T, self.image[rows])

    def finish(self, scale: Tensor, factor: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of image, text and scale, times a factor."""
        to_scale = None if self.to_image is None else (_dot(self.to_image, self.image) * factor).to(scale.dtype)
        whole = (scale * factor).to(scale.dtype)
        to_image, to_text = (x if x is None else x.mul_(whole) for x in (self.to_image, self.to_text))
        return to_image, to_text, to_scale


def _blocks(image: Tensor, text: Tensor) -> Iterator[Block]:
    for row in range(0, len(image), BLOCK):
        for column in range(0, len(text), BLOCK):
            yield slice(row, row + BLOCK), slice(column, column + BLOCK)


def _logits(image: Tensor, text: Tensor, scale: Tensor, block: Block) -> Tensor:
    return _product(image[block[0]], text[block[1]]).mul_(scale)


def _softplus_sum(x: Tensor) -> Tensor:
    """Return the sum of log(1 + e^x), in fp64.

    log1p is slow, so most of the sum is made a product: (1 + a)(1 + b) = 1 + (a + b + ab), exact for small a and b and, of
    a, b = e^-|x| <= 1 to begin with, at most 2^32 after five rounds.
    """
    total = x.clamp(min=0).sum().double()
    small = x.abs().mul_(-LOG2_E).exp2_().view(-1)
    for _ in range(5):
        half = len(small) // 2
        total += small[2 * half :].log1p().sum()
        small = small[:half].addcmul_(small[:half], small[half : 2 * half]).add_(small[half : 2 * half])
    return total + small.log1p_().sum()


def _sums(x: Tensor, positives: Positives | None) -> Tensor:
    """Return the sum of x over the positives of each sample, a new tensor."""
    return x.clone() if positives is None else positives.sums(x)


def _shares(x: Tensor, positives: Positives | None) -> Tensor:
    """Return sum_{j in P(i)} (1/|P(i)| + 1/|P(j)|) x_j, a new tensor; symmetric, so that it is its own gradient."""
    if positives is None:
        return 2 * x
    share = (1 / positives.counts.to(x.dtype))[:, None]
    return positives.sums(x).mul_(share).add_(positives.sums(x * share))


def _number(positives: Positives | None, x: Tensor) -> Tensor:
    """Return the number of positive cells, in fp64."""
    return x.new_tensor(len(x), dtype=torch.float64) if positives is None else positives.counts.sum().double()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of a * b, in fp64."""
    return (a * b).sum(1).double().sum()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b^T."""
    if _onednn_is_faster(a):
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")  # type: ignore[no-any-return]
    return a @ b.T


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to the total."""
    if _onednn_is_faster(a):
        total += _product(a, b.T)
    else:
        total.addmm_(a, b)


def _onednn_is_faster(x: Tensor) -> bool:
    """Return whether to ask oneDNN: torch multiplies fp32 with MKL, which leaves AVX-512 alone on AMD processors and takes twice as long."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _no_autocast(x: Tensor) -> AbstractContextManager[None]:
    return torch.autocast(x.device.type, enabled=False)
