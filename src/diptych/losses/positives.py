"""Which samples of a batch belong together, without a matrix of all pairs."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

COLUMNS = 64
"""Columns of the embeddings that are summed at a time: bounds the memory of `Positives.sums` when every sample has a duplicate."""


@dataclass(frozen=True)
class Positives:
    """Image i and text j are positives when they have one group or one text key: the union of two equivalence relations.

    A sum over all positives of a sample is then a sum over its group, plus one over its key, minus one over those that share both. So
    nothing here but `matrix` costs more than O(n d), even when all n samples are one group and there are n^2 pairs.

    Attributes:
        group: Hash of each sample's group.
        text_key: Hash of each sample's text.
    """

    group: Int64[Tensor, " n"]
    text_key: Int64[Tensor, " n"]

    @cached_property
    def counts(self) -> Int64[Tensor, " n"]:
        """Return the number of positives of each sample, itself included. The relation is symmetric: one number for row and column."""
        by_group, by_key, by_both = (torch.bincount(labels)[labels] for labels in self._classes)
        return by_group + by_key - by_both

    def matrix(self) -> Bool[Tensor, "n n"]:
        """Return True where image row and text column are positives."""
        return (self.group[:, None] == self.group) | (self.text_key[:, None] == self.text_key)

    def sums(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return `matrix() @ x`, summed in fp64. Linear and symmetric, so it is its own gradient."""
        result = x.clone()
        rows = (self.counts > 1).nonzero()[:, 0]
        if len(rows):
            classes = [labels[rows].unique(return_inverse=True) for labels in self._classes]
            for source, target in zip(x.split(COLUMNS, 1), result.split(COLUMNS, 1), strict=True):
                part = source[rows].double()
                by_group, by_key, by_both = (
                    part.new_zeros(len(names), part.shape[1]).index_add_(0, labels, part)[labels]
                    for names, labels in classes
                )
                target[rows] = by_group.add_(by_key).sub_(by_both).to(x.dtype)
        return result

    @cached_property
    def _classes(self) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"], Int64[Tensor, " n"]]:
        """Return the class of each sample by group, by key, and by both, numbered from 0."""
        by_group = self.group.unique(return_inverse=True)[1]
        by_key = self.text_key.unique(return_inverse=True)[1]
        by_both = (by_group * len(by_key) + by_key).unique(return_inverse=True)[1]
        return by_group, by_key, by_both
