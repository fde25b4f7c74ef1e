"""Which samples of a batch belong together, without a matrix of all pairs."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int64
from torch import Tensor


@dataclass(frozen=True)
class Positives:
    """Image i and text j are positives when they have one group or one text key.

    The pairs are never listed as a whole: with all n samples in one group there are n^2 of them.

    Attributes:
        group: Hash of each sample's group.
        text_key: Hash of each sample's text.
    """

    group: Int64[Tensor, " n"]
    text_key: Int64[Tensor, " n"]

    @cached_property
    def counts(self) -> Int64[Tensor, " n"]:
        """Return the number of positives of each sample, itself included; the relation is symmetric, so of a row as of a column."""
        group = self.group.unique(return_inverse=True)[1]
        key = self.text_key.unique(return_inverse=True)[1]
        both = group * len(key) + key  # one number per pair
        return _sizes(group) + _sizes(key) - _sizes(both)

    def matrix(self) -> Bool[Tensor, "n n"]:
        """Return True where image row and text column are positives."""
        return (self.group[:, None] == self.group) | (self.text_key[:, None] == self.text_key)

    def cells(self, rows: slice, columns: slice) -> tuple[Int64[Tensor, " p"], Int64[Tensor, " p"]]:
        """Return the row and column, counted from the start of the block, of each positive in a block of the matrix.

        Keys are compared inside the block only. Off the diagonal, a sample with no positive but itself has none there.
        """
        i, j = (torch.arange(len(self.group[part]), device=self.group.device) for part in (rows, columns))
        if rows != columns:
            i, j = (self.counts[part].gt(1).nonzero()[:, 0] for part in (rows, columns))
        same_group = self.group[rows][i, None] == self.group[columns][j]
        same_key = self.text_key[rows][i, None] == self.text_key[columns][j]
        row, column = (same_group | same_key).nonzero(as_tuple=True)
        return i[row], j[column]


def _sizes(labels: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """Return how often the label of each sample occurs."""
    inverse = labels.unique(return_inverse=True)[1]
    return torch.bincount(inverse)[inverse]
