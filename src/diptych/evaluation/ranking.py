"""Places in a ranking by cosine.

Ties go against the model: a wrong candidate that scores as high as the best right one ranks before it. A model that embeds
everything alike therefore scores 0, not 1. (Evaluators that sort, or take the argmax, give such a model hits.)
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diptych.errors import EvaluationError

TIE = 1e-6
"""Cosines no further apart than this count as equal: below it, fp32 rounding decides, which differs by batch size and processor."""


def ranks(
    queries: Float[Tensor, "q d"],
    candidates: Float[Tensor, "c d"],
    query_id: Int64[Tensor, " q"],
    candidate_id: Int64[Tensor, " c"],
    right: Int64[Tensor, "p 2"],
    *,
    chunk: int = 512,
) -> tuple[Int64[Tensor, " q"], Int64[Tensor, " q"]]:
    """Return, per query, how many wrong candidates score at least as high as its best right one, and how many right ones there are.

    The score matrix is made `chunk` rows at a time.

    Args:
        queries: L2-normalised embeddings.
        candidates: L2-normalised embeddings.
        query_id: What each query is, from 0.
        candidate_id: What each candidate is, from 0.
        right: All pairs (query id, candidate id) that belong together; every query id has one.
        chunk: Queries at once.
    """
    width, found, number = int(candidate_id.max()) + 1, [], []
    for start in range(0, len(queries), chunk):
        scores = queries[start : start + chunk] @ candidates.T
        ids, place = query_id[start : start + chunk].unique(return_inverse=True)
        here = right[torch.isin(right[:, 0], ids)]
        allowed = torch.zeros(len(ids), width, dtype=torch.bool)
        allowed[torch.searchsorted(ids, here[:, 0].contiguous()), here[:, 1]] = True
        own = allowed[place][:, candidate_id]
        best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        found.append(((scores >= best - TIE) & ~own).sum(1))
        number.append(own.sum(1))
    return torch.cat(found), torch.cat(number)


def chance_recall(right: Int64[Tensor, " q"], candidates: int, k: int) -> float:
    """Return the expected share of hits when candidates are in random order: the mean of 1 - C(c - r, k) / C(c, k).

    Args:
        right: Right candidates of each query, r.
        candidates: How many there are in all, c.
        k: How many are looked at.
    """
    wrong = candidates - right.double()
    drawn = torch.arange(
        min(k, candidates), dtype=torch.float64
    )  # the product below is the chance that k draws are all wrong
    miss = ((wrong[:, None] - drawn) / (candidates - drawn)).clamp(min=0).prod(1)
    return float(1 - miss.mean())


def check_finite(*embeddings: Tensor) -> None:
    """Raise if a number is NaN or infinite.

    Raises:
        EvaluationError: Always for a broken model.
    """
    if not all(part.isfinite().all() for part in embeddings):
        raise EvaluationError("Some embeddings are not finite. The model is broken: look at the training log.")
