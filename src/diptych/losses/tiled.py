"""Contrastive losses that never hold the n x n matrix: exact, block by block, in O(n d) memory.

InfoNCE: the forward pass keeps the sum of each row and column, the backward pass computes every block again. Sigmoid: the gradient of a
cell needs no other cell, so one pass gives loss and gradient.

Cost of n pairs of d dimensions, forward and backward, beside the plain form that `contrastive` holds:

|         | matrix products of 2 n^2 d | passes over n^2 cells       | floats beside inputs and their gradients |
|---------|----------------------------|-----------------------------|------------------------------------------|
| InfoNCE | 4; plain 3                 | 10, in cache; plain, in RAM | 3 blocks; plain 4 n^2, positives 7 n^2   |
| sigmoid | 3; plain 3                 | 16, in cache; plain, in RAM | 3 blocks + 2 n d; plain 4 n^2            |

The fourth product is paid for by passes that stay in cache, by one power for row sum and column sum together, by powers of 2 instead of e, and
in the sigmoid loss by one logarithm for 32 cells. Duplicates add a comparison of the keys inside each block. Figures:
benchmarks/results/loss.md. Written for eager PyTorch on CPU and CUDA; `fused` holds kernels for GPUs.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.errors import TrainingError
from diptych.losses.positives import Positives

BLOCK = 1024
"""Rows and columns of a block: 4 MB in fp32, so that the two or three copies of it that live at a time stay in cache."""

LOG2_E = 1 / math.log(2)
"""Powers of 2 are several times as fast as powers of e: exponents are logits in units of log 2."""

ROOM = 72.0
"""The largest exponent after the shift: far from overflow in fp32 (2^128) even when a million cells are summed."""

LEAST = 2.0**-83
"""A sum of at least this has lost nothing: terms that underflow, below 2^-126, are a share of less than n 2^-43 of it."""

CHAIN = 128
"""Products added up by oneDNN before rounding errors are cut off: fewer errors than MKL makes, for a sixth more time than one chain."""

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
    train = torch.is_grad_enabled()  # inside a Function it never is
    return _Sigmoid.apply(image.contiguous(), text.contiguous(), scale, bias, positives, train)  # type: ignore[no-any-return]


class _InfoNCE(torch.autograd.Function):
    """(log-sum-exps of rows and columns - sum over positives of (1/|P(i)| + 1/|P(j)|) logit) / 2n."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, positives: Positives | None) -> Tensor:
        share = image.new_ones(len(image)) if positives is None else 1 / positives.counts.to(image.dtype)
        with _no_autocast(image):
            rows, columns, matched = _power_sums(image, text, scale * LOG2_E, share, positives)
            total = rows.logs().sum() + columns.logs().sum() - matched
        ctx.save_for_backward(image, text, scale, share, rows.shift, rows.sums, columns.shift, columns.sums)
        ctx.positives = positives
        return (total / (2 * len(image) * LOG2_E)).to(image.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        image, text, scale, share, *sums = ctx.saved_tensors
        rows, columns = PowerSums(*sums[:2]), PowerSums(*sums[2:])
        with _no_autocast(image):
            gradients = Gradients.zeros(image, text, ctx.needs_input_grad)
            for block in _blocks(image, text):
                cells = _probabilities(_logits(image, text, scale * LOG2_E, block), rows, columns, block)
                i, j = _positive_cells(ctx.positives, block, share)
                cells[i, j] -= share[block[0]][i] + share[block[1]][j]
                gradients.add(block, cells)
            return *gradients.finish(scale, gradient / (2 * len(image))), None


class _Sigmoid(torch.autograd.Function):
    """Sum over all cells of softplus(-z logit), divided by n; z = 1 for positives and -1 elsewhere."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, positives: Positives | None, train: bool
    ) -> Tensor:
        total, to_bias = (image.new_zeros((), dtype=torch.float64) for _ in range(2))
        with _no_autocast(image):
            gradients = Gradients.zeros(image, text, [train and need for need in ctx.needs_input_grad])
            for block in _blocks(image, text):
                cells = _logits(image, text, scale, block).add_(bias)
                positive = _positive_cells(positives, block, image)
                cells[positive] *= -1
                total += _softplus_sum(cells)
                if train:
                    cells.sigmoid_()
                    cells[positive] *= -1
                    to_bias += cells.sum()
                    gradients.add(block, cells)
            if train:
                share = total.new_tensor(1 / len(image))
                ctx.save_for_backward(*gradients.finish(scale, share), (to_bias * share).to(bias.dtype))
        return (total / len(image)).to(image.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        return *(None if part is None else gradient * part for part in ctx.saved_tensors), None, None


@dataclass(frozen=True)
class PowerSums:
    """The sum of 2^exponent over each row, or over each column: sums * 2^shift.

    Attributes:
        shift: One for all, or one each.
        sums: Of 2^(exponent - shift).
    """

    shift: Float[Tensor, "*one"]
    sums: Float[Tensor, " n"]

    def logs(self) -> Float[Tensor, " n"]:
        """Return the logarithms to base 2, in fp64."""
        return self.shift + self.sums.double().log2()


def _power_sums(
    image: Tensor, text: Tensor, scale: Tensor, share: Tensor, positives: Positives | None
) -> tuple[PowerSums, PowerSums, Tensor]:
    """Return the sums over rows and columns of 2^(scale * image @ text^T), and the exponents of the positives summed by their shares.

    One power serves both sums, with one shift for all cells: |scale| max |image_i| max |text_j| bounds the exponents, so none can overflow.
    Only if a whole row or column lies so far below the bound that its sum may be lost, a second pass keeps a maximum for each.
    """
    shift = (scale.abs() * image.norm(dim=1).amax() * text.norm(dim=1).amax() - ROOM).clamp(min=0)
    rows, columns = PowerSums(shift, image.new_zeros(len(image))), PowerSums(shift, text.new_zeros(len(text)))
    matched = 2.0 * len(image) * shift.double()
    for block in _blocks(image, text):
        cells = _logits(image, text, scale, block).sub_(shift)
        matched += _matched(cells, share, positives, block)
        cells.exp2_()
        rows.sums[block[0]] += cells.sum(1)
        columns.sums[block[1]] += cells.sum(0)
    if bool(torch.minimum(rows.sums.min(), columns.sums.min()) >= LEAST):
        return rows, columns, matched
    return _power_sums_with_maxima(image, text, scale, share, positives)


def _power_sums_with_maxima(
    image: Tensor, text: Tensor, scale: Tensor, share: Tensor, positives: Positives | None
) -> tuple[PowerSums, PowerSums, Tensor]:
    """Return the same for exponents of any size, at the price of two powers per cell here and in the backward pass."""
    rows, columns = (PowerSums(x.new_full((len(x),), -math.inf), x.new_zeros(len(x))) for x in (image, text))
    matched = torch.zeros_like(scale, dtype=torch.float64)
    for block in _blocks(image, text):
        cells = _logits(image, text, scale, block)
        matched += _matched(cells, share, positives, block)
        for side, part, dim in ((rows, block[0], 1), (columns, block[1], 0)):
            before, total = side.shift[part], side.sums[part]
            after = torch.maximum(before, cells.amax(dim))
            total.mul_((before - after).exp2_()).add_((cells - after.unsqueeze(dim)).exp2_().sum(dim))
            before.copy_(after)
    return rows, columns, matched


def _matched(cells: Tensor, share: Tensor, positives: Positives | None, block: Block) -> Tensor:
    """Return the sum over the positives of a block of (1/|P(i)| + 1/|P(j)|) cell."""
    i, j = _positive_cells(positives, block, share)
    return (cells[i, j] * (share[block[0]][i] + share[block[1]][j])).double().sum()


def _probabilities(exponents: Tensor, rows: PowerSums, columns: PowerSums, block: Block) -> Tensor:
    """Return softmax over the row plus softmax over the column of each cell; overwrites the exponents."""
    row, column = 1 / rows.sums[block[0], None], 1 / columns.sums[block[1]]
    if rows.shift.ndim == 0:
        return exponents.sub_(rows.shift).exp2_().mul_(row + column)
    by_column = (exponents - columns.shift[block[1]]).exp2_().mul_(column)
    return exponents.sub_(rows.shift[block[0], None]).exp2_().mul_(row).add_(by_column)


@dataclass(frozen=True)
class Gradients:
    """What collects the gradient of a function of logits = scale * image @ text^T, block by block.

    Attributes:
        image: Embeddings.
        text: Embeddings.
        to_image: Gradient of the images divided by the scale, or None if neither they nor the scale need one.
        to_text: The same for the texts.
    """

    image: Tensor
    text: Tensor
    to_image: Tensor | None
    to_text: Tensor | None

    @classmethod
    def zeros(cls, image: Tensor, text: Tensor, needs: Sequence[bool]) -> "Gradients":
        """Return zeros, given which of image, text and scale need a gradient."""
        return cls(
            image,
            text,
            torch.zeros_like(image) if needs[0] or needs[2] else None,
            torch.zeros_like(text) if needs[1] else None,
        )

    def add(self, block: Block, cells: Tensor) -> None:
        """Add what one block gives, from the gradient of its logits."""
        if self.to_image is not None:
            _add_product(self.to_image[block[0]], cells, self.text[block[1]])
        if self.to_text is not None:
            _add_product(self.to_text[block[1]], cells.T, self.image[block[0]])

    def finish(self, scale: Tensor, factor: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of image, text and scale, times a factor."""
        to_scale = None
        if self.to_image is not None:
            to_scale = ((self.to_image * self.image).sum(1).double().sum() * factor).to(scale.dtype)
            self.to_image.mul_(scale * factor)
        if self.to_text is not None:
            self.to_text.mul_(scale * factor)
        return self.to_image, self.to_text, to_scale


def _blocks(image: Tensor, text: Tensor) -> Iterator[Block]:
    for row in range(0, len(image), BLOCK):
        for column in range(0, len(text), BLOCK):
            yield slice(row, row + BLOCK), slice(column, column + BLOCK)


def _logits(image: Tensor, text: Tensor, scale: Tensor, block: Block) -> Tensor:
    return _product(image[block[0]], text[block[1]]).mul_(scale)


def _positive_cells(positives: Positives | None, block: Block, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return row and column, counted from the start of the block, of its positives; the diagonal's without `positives`."""
    if positives is not None:
        return positives.cells(*block)
    diagonal = torch.arange(len(like[block[0]]) if block[0] == block[1] else 0, device=like.device)
    return diagonal, diagonal


def _softplus_sum(x: Tensor) -> Tensor:
    """Return the sum of log(1 + e^x), in fp64.

    Logarithms are slow, so most of the sum is taken as a product: (1 + a)(1 + b) = 1 + (a + b + ab) loses nothing of a small a or b, and
    starting from e^-|x| <= 1 five rounds of it stay below 2^32.
    """
    total = x.clamp(min=0).sum().double()
    small = x.abs().mul_(-LOG2_E).exp2_().view(-1)
    for _ in range(5):
        half = len(small) // 2
        total += small[2 * half :].log1p().sum()
        first, second = small[:half], small[half : 2 * half]
        small = first.addcmul_(first, second).add_(second)
    return total + small.log1p_().sum()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b^T.

    oneDNN adds up all d terms in one chain, and powers enlarge its rounding error, so it gets CHAIN terms at a time. Of the second matrix it
    needs a copy: it takes a thousand times as long when the rows of that lie apart.
    """
    if not _onednn_is_faster(a):
        return a @ b.T
    total, *others = (_linear(x, y.contiguous()) for x, y in zip(a.split(CHAIN, 1), b.split(CHAIN, 1), strict=True))
    for other in others:
        total += other
    return total


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to the total."""
    if _onednn_is_faster(a):
        total += _linear(a, b.T)
    else:
        total.addmm_(a, b)


def _linear(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")  # type: ignore[no-any-return]


def _onednn_is_faster(x: Tensor) -> bool:
    """Return whether to ask oneDNN: torch multiplies fp32 with MKL, which does not use AVX-512 on AMD processors and takes twice as long."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def refuse_second_derivatives() -> None:
    """Stop where `once_differentiable` would let a gradient penalty go missing in silence."""
    if torch.is_grad_enabled():
        raise TrainingError(
            "create_graph=True asks for second derivatives, which the loss of a large batch does not have: it is computed in blocks. "
            "Give `positives` as a matrix (torch.eye(n, dtype=torch.bool) for the diagonal) to hold all pairs instead."
        )


def _no_autocast(x: Tensor) -> AbstractContextManager[None]:
    return torch.autocast(x.device.type, enabled=False)
