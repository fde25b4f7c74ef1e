"""What tests of losses share: embeddings and batches that no tower has made."""

from collections.abc import Sequence

import torch
from torch.nn.functional import normalize

from diptych.types import Batch, PairEmbeddings, Tokens


def pairs(group: Sequence[int], *keys: Sequence[int]) -> Batch:
    """Return a batch of these groups with one text column per list of keys; equal keys are equal texts."""
    n = len(group)
    ids, mask = torch.zeros(n, 1, dtype=torch.int64), torch.ones(n, 1, dtype=torch.bool)
    columns = tuple(Tokens(ids, mask, torch.tensor([*key])) for key in keys)
    return Batch(tuple(map(str, range(n))), (), columns, torch.tensor([*group]))


def embeddings(n: int, dim: int = 6) -> PairEmbeddings:
    """Return one random view and text column; equal n, equal embeddings."""
    image, text = normalize(torch.randn(2, n, dim, generator=torch.Generator().manual_seed(n)), dim=-1)
    return PairEmbeddings((image,), (text,))
