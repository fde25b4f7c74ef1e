"""Nearest rows of one matrix for the rows of another, without the matrix of all scores."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diptych.errors import InputError


def nearest(
    queries: Float[Tensor, "q d"],
    candidates: Float[Tensor, "c d"],
    count: int,
    *,
    chunk: int = 1024,
    block: int = 65_536,
) -> tuple[Float[Tensor, "q k"], Int64[Tensor, "q k"]]:
    """Return inner products and rows of the `count` best candidates of each query, best first; all where there are fewer. Exact.

    At most `chunk` times `block` scores are held at once. Which of several equal scores at the end comes along is not said.

    Args:
        queries: Normalised, for cosines.
        candidates: Normalised.
        count: k, at least 1.
        chunk: Queries at once.
        block: Candidates at once.

    Raises:
        InputError: If there are no candidates, `count` is below 1, or a number is not finite.
    """
    if count < 1 or not len(candidates):
        raise InputError(
            f"Neighbours need a count of at least 1 and a candidate; there are {count} and {len(candidates)}."
        )
    for name, part in (("query", queries), ("candidate", candidates)):
        if not part.isfinite().all():
            row = int((~part.isfinite().all(1)).nonzero()[0])
            raise InputError(f"Row {row} of the {name} embeddings is not finite. The model is broken, or its input is.")
    found = [_best(part, candidates, min(count, len(candidates)), block) for part in queries.split(chunk)]
    if not found:
        return queries.new_empty(0, 0), torch.empty(0, 0, dtype=torch.int64)
    scores, rows = zip(*found, strict=True)
    return torch.cat(scores), torch.cat(rows)


def _best(queries: Tensor, candidates: Tensor, count: int, block: int) -> tuple[Tensor, Tensor]:
    scores, rows = (
        queries.new_empty(len(queries), 0),
        torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device),
    )
    for start in range(0, len(candidates), block):
        part = queries @ candidates[start : start + block].T
        own = part.topk(min(count, part.shape[1]))
        scores, rows = torch.cat([scores, own.values], 1), torch.cat([rows, own.indices + start], 1)
        best = scores.topk(min(count, scores.shape[1]))
        scores, rows = best.values, rows.gather(1, best.indices)
    return scores, rows
