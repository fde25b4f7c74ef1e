"""Contrastive losses between two sets of embeddings. Pure functions of tensors, computed in fp32 whatever the autocast.

The seam is always the same: `image` and `text` are L2-normalised [n, d] and row i of one belongs to row i of the other;
logits are scale * image @ text^T + bias. Small batches take the plain form that is written here, which holds the n x n matrix; large ones go
through `tiled`, which does not. Values and gradients are the same up to rounding.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from diptych.losses.positives import Positives
from diptych.losses.tiled import tiled_info_nce, tiled_sigmoid_loss

TILED_FROM = {"cpu": 512, "cuda": 8192}
"""Samples from which the losses are computed block by block. On CPU that takes less time from about 300 on (benchmarks/loss.py); on CUDA
the number is a guess by memory, not measured. Other devices always take the plain form."""


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
        image, text = _full(image), _full(text)
        plain = ignored is None and label_smoothing == 0 and candidate_gradient
        if plain and not isinstance(positives, Tensor) and _large(image):
            return tiled_info_nce(image, text, _like(scale, image), positives)
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
        image, text = _full(image), _full(text)
        if not isinstance(positives, Tensor) and _large(image):
            return tiled_sigmoid_loss(image, text, _like(scale, image), _like(bias, image), positives)
        logits = scale * image @ text.T + bias
        if isinstance(positives, Positives):
            positives = positives.matrix()
        if positives is None:
            positives = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        return -F.logsigmoid(torch.where(positives, logits, -logits)).sum() / len(logits)


def shared_positives(group: Int64[Tensor, " n"], text_key: Int64[Tensor, " n"]) -> Positives | None:
    """Return which image-text cells are positives: same group, or the very same string. None when only the diagonal is.

    Args:
        group: Hash of each sample's group.
        text_key: Hash of each sample's text.
    """
    if len(group.unique()) == len(group) and len(text_key.unique()) == len(text_key):
        return None
    return Positives(group, text_key)


def _full(x: Tensor) -> Tensor:
    """Return at least fp32; fp64 stays, for gradient checks."""
    return x if x.dtype == torch.float64 else x.float()


def _large(image: Tensor) -> bool:
    return len(image) >= TILED_FROM.get(image.device.type, len(image) + 1)


def _like(number: Tensor | float, x: Tensor) -> Tensor:
    """Return a number as a tensor of the type and on the device of x; the gradient passes."""
    return torch.as_tensor(number, dtype=x.dtype, device=x.device)
