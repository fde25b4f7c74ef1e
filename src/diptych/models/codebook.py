"""Heads that spell images and texts in one vocabulary: both are sparse mixtures over the same learnt codes.

For the positions j of one sample (patches or tokens), queries q_j = query(h_j) and codes c_k of dimension d:

    s_jk = q_j . c_k / sqrt(d)          what position j asks of code k
    r_k  = max_j s_jk / T               pooled over the real positions
    a    = sparsemax(r)                 weights: >= 0, sum 1, most of them exactly 0
    f    = sum_k a_k c_k                the vector of the sample, not yet normalised

The queries of images and of texts have weights of their own; the codes are one matrix, key and value at once.

Source: Chen et al. 2023, arXiv 2303.14865, section 3; sparsemax: Martins and Astudillo 2016, arXiv 1602.02068.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diptych.errors import ConfigError, TextError
from diptych.losses.full import full
from diptych.models.dual import DualEncoder
from diptych.types import TowerOutput

Normaliser = Literal["sparsemax", "softmax", "sigmoid"]
Pool = Literal["max", "mean", "sum"]
Pad = Literal["neg_inf", "zero"]

SCORE_STD = 3**-0.5
"""Spread of s_jk before training: a fresh Linear layer gives normed inputs a variance of 1/3, and codes are drawn from N(0, 1)."""


@dataclass(frozen=True)
class CodebookHeadConfig:
    """A head that mixes codes. Both heads of a model have one, with equal `codes`, `dim` and `shared`.

    Attributes:
        codes: Size of the vocabulary; 16,384 in the paper.
        dim: Of a code, which is the embedding size; 512 in the paper.
        temperature: T > 0: the larger, the more codes a sample uses. It goes with `codes`, see `suggest_temperature`; 1000 in the
            released configuration, for 16,384 codes.
        normaliser: `sparsemax`, or the ablations `softmax` and `sigmoid`.
        pool: Over positions: `max`, or the ablations `mean` and `sum`.
        pad: `neg_inf` leaves padding out. `zero` gives padding the score 0, as the released code does: a text with any padding then has
            no r_k below 0, and `mean` divides by the padding too.
        shared: One codebook for images and texts. False gives each its own, an ablation.
    """

    codes: int = 16384
    dim: int = 512
    temperature: float = 1000.0
    normaliser: Normaliser = "sparsemax"
    pool: Pool = "max"
    pad: Pad = "neg_inf"
    shared: bool = True


@dataclass(frozen=True)
class Mixture:
    """What a codebook head makes of a batch.

    Attributes:
        weights: a, one weight per code; they sum to 1, except for `sigmoid`, whose features are divided by their sum.
        features: f, not yet normalised.
    """

    weights: Float[Tensor, "b k"]
    features: Float[Tensor, "b d"]


class CodebookHead(nn.Module):
    """Turns the patches or tokens of a tower into a mixture of codes.

    The head that makes the codes registers them; a head that is given a `lender` reads the lender's. So they are one parameter with
    one name, in the state dict, the optimiser and the average, wherever the model is moved or copied as a whole.
    """

    codes: nn.Parameter | None

    def __init__(self, width: int, config: CodebookHeadConfig, lender: "CodebookHead | None" = None) -> None:
        super().__init__()
        if config.codes < 1 or config.dim < 1:
            raise ConfigError(f"A codebook needs codes >= 1 and dim >= 1, not {config.codes} and {config.dim}.")
        if not config.temperature > 0:
            raise ConfigError(f"The temperature of a codebook must be > 0, not {config.temperature}.")
        if lender is not None and lender.codebook.shape != (config.codes, config.dim):
            raise ConfigError(
                f"Images and texts share one codebook, so their heads need equal codes and dim; one has {tuple(lender.codebook.shape)}, "
                f"the other {(config.codes, config.dim)}."
            )
        self.config = config
        self.query = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, config.dim),
            nn.GELU(),
            nn.LayerNorm(config.dim),
            nn.Linear(config.dim, config.dim),
        )
        self.codes = nn.Parameter(torch.randn(config.codes, config.dim)) if lender is None else None
        # A tuple hides the lender from the submodules, so that its codes keep one name.
        self._lender: tuple[CodebookHead, ...] = () if lender is None else (lender,)

    @property
    def codebook(self) -> Float[Tensor, "k d"]:
        """Return the codes, its own or the lender's."""
        return self._lender[0].codebook if self.codes is None else self.codes

    def scores(self, output: TowerOutput) -> Float[Tensor, "b n k"]:
        """Return s, the score of every position for every code; of padding too, which means nothing.

        Raises:
            ConfigError: If the tower gives a pooled vector only.
        """
        if output.tokens is None:
            raise ConfigError(
                "Codebook heads need patches or tokens, but this tower gives one pooled vector only. Use a tower that gives them."
            )
        return (self.query(output.tokens) * self.config.dim**-0.5) @ self.codebook.T  # type: ignore[no-any-return]

    def pooled(self, output: TowerOutput) -> Float[Tensor, "b k"]:
        """Return r, how much each sample asks of each code; at least fp32.

        Raises:
            ConfigError: If the tower gives a pooled vector only.
            TextError: If all positions of a sample are padding.
        """
        config = self.config
        scores = pool_scores(self.scores(output), output.mask, pool=config.pool, pad=config.pad)
        return full(scores) / config.temperature

    def mix(self, output: TowerOutput) -> Mixture:
        """Return weights and features; for errors see `pooled`."""
        pooled = self.pooled(output)
        with torch.autocast(
            pooled.device.type, enabled=False
        ):  # near-uniform mixtures differ in digits that bf16 lacks
            weights = normalise_scores(pooled, self.config.normaliser)
            features = weights @ self.codebook.to(weights.dtype)
            if self.config.normaliser == "sigmoid":
                features = features / weights.sum(-1, keepdim=True)
        return Mixture(weights, features)

    def forward(self, output: TowerOutput) -> Float[Tensor, "b d"]:
        """Return the features; for errors see `pooled`."""
        return self.mix(output).features


def codebook_heads(
    image_width: int, image: CodebookHeadConfig, text_width: int, text: CodebookHeadConfig
) -> tuple[CodebookHead, CodebookHead]:
    """Return both heads of a model, the text head reading the codes of the image head if they are shared.

    Raises:
        ConfigError: If the two do not fit each other.
    """
    if image.shared != text.shared or image.dim != text.dim:
        raise ConfigError(
            f"Both heads need equal `shared` and `dim`; image_head has {image.shared} and {image.dim}, text_head {text.shared} and {text.dim}."
        )
    head = CodebookHead(image_width, image)
    return head, CodebookHead(text_width, text, head if image.shared else None)


def has_codebook(model: DualEncoder) -> bool:
    """Return whether a model has codebook heads."""
    return isinstance(model.image_head, CodebookHead)


def add_codebook(model: DualEncoder, config: CodebookHeadConfig) -> None:
    """Put new codebook heads on the towers of a model, in place of its own heads; seed torch first if it must be repeatable.

    The towers stay as they are. The heads are random, so the temperature of the logits starts anew from `model.config.scale`.
    """
    heads = codebook_heads(model.vision.width, config, model.text.width, config)
    model.image_head, model.text_head = (head.to(model.device) for head in heads)
    model.config = replace(model.config, image_head=config, text_head=config)
    with torch.no_grad():
        model.log_scale.fill_(model.config.scale.log_scale)


def pool_scores(
    scores: Float[Tensor, "b n k"], mask: Bool[Tensor, "b n"] | None, *, pool: Pool, pad: Pad
) -> Float[Tensor, "b k"]:
    """Return one score per code.

    Args:
        scores: Of every position.
        mask: True at real positions; None when all are.
        pool: `max`, `mean` or `sum`.
        pad: `neg_inf` pools over real positions only; `zero` counts padding as positions of score 0.

    Raises:
        TextError: If a sample has no real position.
    """
    count: int | Tensor = scores.shape[1]
    if mask is not None:
        if not mask.any(1).all():
            row = int(mask.any(1).long().argmin())
            raise TextError(f"Text {row} of {len(mask)} is all padding. Give every text a token, or drop the row.")
        hidden = -torch.inf if (pool, pad) == ("max", "neg_inf") else 0.0
        scores = scores.masked_fill(~mask[..., None], hidden)
        count = mask.sum(1, keepdim=True) if pad == "neg_inf" else count
    if pool == "max":
        return scores.max(1).values
    return scores.sum(1) / (count if pool == "mean" else 1)


def normalise_scores(scores: Float[Tensor, "*b k"], normaliser: Normaliser) -> Float[Tensor, "*b k"]:
    """Return weights: `sparsemax` and `softmax` sum to 1, each `sigmoid` lies in (0, 1) by itself."""
    if normaliser == "sparsemax":
        return sparsemax(scores)
    return scores.softmax(-1) if normaliser == "softmax" else scores.sigmoid()


def sparsemax(scores: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
    """Return the point of the simplex nearest to `scores`, along the last dimension, in fp32 at least.

    a_k = max(r_k - tau, 0), with tau such that the weights sum to 1. Codes whose score is 1 or more below the largest have weight 0
    exactly; equal scores give 1/k each, and adding a constant to all changes nothing.

    Source: Martins and Astudillo 2016, algorithm 1; its Jacobian is their equation 9.
    """
    with torch.autocast(scores.device.type, enabled=False):
        return _Sparsemax.apply(full(scores))  # type: ignore[no-any-return]


class _Sparsemax(torch.autograd.Function):
    """Sparsemax with its closed gradient, which saves one tensor: g - mean(g) inside the support and 0 outside.

    A score that lies exactly on tau has no gradient; there half of it flows, as in torch's `maximum` and so in the released code.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        shifted = scores - scores.amax(-1, keepdim=True)
        largest = shifted.sort(-1, descending=True).values
        total = largest.cumsum(-1)
        rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
        size = (1 + rank * largest > total).sum(-1, keepdim=True)
        tau = (total.gather(-1, size - 1) - 1) / size
        excess = shifted - tau
        ctx.save_for_backward(excess)
        return excess.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        excess: Tensor = ctx.saved_tensors[0]
        inside = excess > 0
        flow = gradient * torch.heaviside(excess, excess.new_tensor(0.5))
        return flow - inside * (flow.sum(-1, keepdim=True) / inside.sum(-1, keepdim=True))


def suggest_temperature(num_codes: int, num_positions: int, target_support: float = 0.05) -> float:
    """Return the temperature at which a fresh head gives about `target_support` of the codes a weight.

    Sparsemax keeps the k best codes when T lies between g(k) and g(k + 1), where g(k) = sum_{i <= k} (r_i - r_k) over the scores at
    T = 1 in descending order. Those are taken where they are expected: at the quantiles of the maximum of `num_positions` draws from
    N(0, 1/3). Patches of one image are alike, so real heads start a little sparser: at 0.22 to 0.25 where 0.3 was asked for. Training
    then moves the scores.

    Args:
        num_codes: Size of the codebook, at least 1.
        num_positions: Patches of an image, or tokens of a text, at least 1.
        target_support: Share of the codes in (0, 1).

    Raises:
        ConfigError: If an argument is out of range.
    """
    if num_codes < 1 or num_positions < 1 or not 0 < target_support < 1:
        raise ConfigError(
            "suggest_temperature needs num_codes >= 1, num_positions >= 1 and target_support in (0, 1), not "
            f"{num_codes}, {num_positions} and {target_support}."
        )
    share = (torch.arange(num_codes, 0, -1, dtype=torch.float64) - 0.5) / num_codes
    scores = SCORE_STD * torch.special.ndtri(share ** (1 / num_positions))
    bound = scores.cumsum(0) - torch.arange(1, num_codes + 1) * scores
    kept = max(1, min(round(target_support * num_codes), num_codes - 1))
    low, high = bound[kept - 1].item(), bound[min(kept, num_codes - 1)].item()
    return (low + high) / 2 or 1.0  # one code has weight 1 at any temperature
