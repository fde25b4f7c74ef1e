"""Contrastive losses between two sets of embeddings. Pure functions of tensors, computed in fp32 whatever the autocast.

The seam is always the same: `image` and `text` are L2-normalised [n, d] and row i of one belongs to row i of the other;
logits are scale * image @ text^T + bias. Small batches take the plain form that is written here, which holds the n x n matrix; large ones go
through `tiled`, which does not, or through `fused`, its kernels for GPUs, if asked. Values and gradients are the same up to rounding.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from diptych.errors import require
from diptych.losses.full import full
from diptych.losses.positives import Positives
from diptych.losses.tiled import tiled_info_nce, tiled_sigmoid_loss
from diptych.types import Batch

TILED_FROM = {"cpu": 512, "cuda": 8192}
"""Samples from which the losses are computed block by block. On CPU that takes less time from about 300 on (`diptych bench loss`); on CUDA
the number is a guess by memory, not measured. Other devices always take the plain form."""

FUSED_FROM: int | None = None
"""Samples from which fp32 losses on CUDA take the kernels of `fused`; None: never, because nobody has run them on a GPU yet. To try them:
`from diptych.losses import contrastive; contrastive.FUSED_FROM = 1024`, with the extra `triton` installed."""

Form = Literal["plain", "tiled", "fused"]


def choose_form(n: int, device: torch.device, dtype: torch.dtype) -> tuple[Form, str]:
    """Return how a loss of n samples is computed, and why.

    Positives as a matrix and options of `info_nce` take the plain form whatever this says.

    Args:
        n: Samples of the loss, of all processes together.
        device: Where the embeddings lie.
        dtype: Of the computation: fp64 for fp64 embeddings, fp32 for all others.
    """
    kind = device.type
    if FUSED_FROM is not None and kind == "cuda" and dtype == torch.float32 and n >= FUSED_FROM:
        return "fused", f"fused kernels: {n} samples on {kind}, asked for from FUSED_FROM = {FUSED_FROM} on"
    if kind not in TILED_FROM:
        return "plain", f"the whole matrix: nothing else was tried on {kind}"
    if n < TILED_FROM[kind]:
        return "plain", f"the whole matrix: {n} samples on {kind}, fewer than TILED_FROM = {TILED_FROM[kind]}"
    return "tiled", f"block by block: {n} samples on {kind}, from TILED_FROM = {TILED_FROM[kind]} on"


def info_nce(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    scale: Float[Tensor, ""] | float,
    *,
    positives: Positives | Bool[Tensor, "n n"] | None = None,
    ignored: Bool[Tensor, "n n"] | None = None,
    label_smoothing: float = 0.0,
    candidate_gradient: bool = True,
) -> Float[Tensor, ""]:
    """Return the symmetric InfoNCE loss.

    L = (CE(S) + CE(S^T)) / 2 with S = scale * image @ text^T and CE(S) = -mean_i mean_{j in P(i)} log softmax(S_i)_j.
    Without `positives`, P(i) = {i}, CLIP's loss. With it, every positive of a row gets an equal share (SupCon's outer sum).

    Args:
        image: Normalised embeddings.
        text: Normalised embeddings.
        scale: 1 / temperature, > 0.
        positives: Which image rows and text columns belong together. As a matrix: True where they do, the diagonal included; then, as with
            any of the options below, the plain form is taken whatever the size.
        ignored: True where a cell takes no part at all, neither as positive nor as negative; never on the diagonal.
        label_smoothing: Share of each target that is spread evenly over all n candidates, in [0, 1); no effect at chance. Not together
            with `ignored`, whose cells would then be candidates again.
        candidate_gradient: False lets a row's gradient reach only the embedding that asks, not those it is compared with, as when
            candidates are gathered from other processes without gradient. The value is the same.

    Returns:
        A scalar, log(n) at chance; at least the mean log of the number of positives; 0 for n = 1.

    Source: Radford et al. 2021, figure 3; Khosla et al. 2020, equation 2.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text = full(image), full(text)
        form, _ = choose_form(len(image), image.device, image.dtype)
        plain = ignored is None and label_smoothing == 0 and candidate_gradient
        if form != "plain" and plain and not isinstance(positives, Tensor):
            without_matrix = tiled_info_nce if form == "tiled" else _fused().fused_info_nce
            return without_matrix(image, text, _like(scale, image), positives)
        if isinstance(positives, Positives):
            positives = positives.matrix()
        logits = scale * image @ text.T
        transposed = logits.T
        if not candidate_gradient:
            logits, transposed = scale * image @ text.detach().T, scale * text @ image.detach().T
        if ignored is not None:  # the lowest number and not -inf, of which a share of 0 would be NaN
            lowest = torch.finfo(logits.dtype).min
            logits, transposed = logits.masked_fill(ignored, lowest), transposed.masked_fill(ignored.T, lowest)
        if positives is None:
            target = transposed_target = torch.arange(len(logits), device=logits.device)
        else:
            share = positives.to(logits.dtype)
            target, transposed_target = share / share.sum(1, keepdim=True), (share / share.sum(0)).T
        return (
            F.cross_entropy(logits, target, label_smoothing=label_smoothing)
            + F.cross_entropy(transposed, transposed_target, label_smoothing=label_smoothing)
        ) / 2


def sigmoid_loss(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    scale: Float[Tensor, ""] | float,
    bias: Float[Tensor, ""] | float,
    *,
    positives: Positives | Bool[Tensor, "n n"] | None = None,
) -> Float[Tensor, ""]:
    """Return the pairwise sigmoid loss: every cell of the matrix is a binary decision of its own.

    L = -1/n sum_ij log sigmoid(z_ij (scale * image_i . text_j + bias)), z = 1 for positives and -1 elsewhere.

    Args:
        image: Normalised embeddings.
        text: Normalised embeddings.
        scale: 1 / temperature, > 0; SigLIP starts at 10.
        bias: Added to every logit; SigLIP starts at -10, about -log(n).
        positives: Which image rows and text columns belong together; the diagonal when absent. As a matrix: True where they do; then the
            plain form is taken whatever the size.

    Returns:
        A scalar; n log 2 when all logits are 0.

    Source: Zhai et al. 2023, section 3.2, algorithm 1.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text = full(image), full(text)
        form, _ = choose_form(len(image), image.device, image.dtype)
        if form != "plain" and not isinstance(positives, Tensor):
            without_matrix = tiled_sigmoid_loss if form == "tiled" else _fused().fused_sigmoid_loss
            return without_matrix(image, text, _like(scale, image), _like(bias, image), positives)
        logits = scale * image @ text.T + bias
        if isinstance(positives, Positives):
            positives = positives.matrix()
        if positives is None:
            positives = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        return -F.logsigmoid(torch.where(positives, logits, -logits)).sum() / len(logits)


def info_nce_of_views(
    images: Sequence[Float[Tensor, "n d"]],
    texts: Sequence[Float[Tensor, "n d"]],
    batch: Batch,
    scale: Float[Tensor, ""] | float,
    *,
    multi_positive: bool,
) -> Float[Tensor, ""]:
    """Return InfoNCE of each view with each text column, averaged over all of them; log n at chance.

    Args:
        images: Normalised embeddings, one tensor per view; at least one.
        texts: Normalised embeddings, one tensor per text column of `batch`, from the first; at least one.
        batch: Says which samples share a group, and which texts of a column are equal.
        scale: 1 / temperature, > 0.
        multi_positive: Such samples are positives of each other. False: the diagonal only.
    """
    losses = [
        info_nce(image, text, scale, positives=shared_positives(batch.group, column.key) if multi_positive else None)
        for text, column in zip(texts, batch.texts, strict=False)
        for image in images
    ]
    return torch.stack(losses).mean()


def shared_positives(group: Int64[Tensor, " n"], text_key: Int64[Tensor, " n"]) -> Positives | None:
    """Return which image-text cells are positives: same group, or the very same string. None when only the diagonal is.

    Args:
        group: Hash of each sample's group.
        text_key: Hash of each sample's text.
    """
    if len(group.unique()) == len(group) and len(text_key.unique()) == len(text_key):
        return None
    return Positives(group, text_key)


def _fused() -> ModuleType:
    require("triton", "triton")
    from diptych.losses import fused

    return fused


def _like(number: Tensor | float, x: Tensor) -> Tensor:
    """Return a number as a tensor of the type and on the device of x; the gradient passes."""
    return torch.as_tensor(number, dtype=x.dtype, device=x.device)
