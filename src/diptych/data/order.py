"""Which samples stand beside each other in a batch, where that matters: several of each group, or groups that are hard to tell apart."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from diptych.data.sources import AbstractSame, AbstractSource, Order
from diptych.errors import ConfigError, DataError


class Ordered(AbstractSame):
    """Another source, whose epochs follow an order of their own; their rows may repeat."""

    def __init__(
        self, source: AbstractSource, order: Order, notes: tuple[str, ...] = (), *, run_length: int = 1
    ) -> None:
        if source.chances is not None:
            raise DataError(
                f"{source.name} draws the samples of an epoch by chance, which an order would not follow. Order the source without its chances, and "
                "leave data.per_group at 1 for this one."
            )
        if source.order is not None:
            raise DataError(
                f"{source.name} has an order of its own already, which another would undo. Order the source that it was made from, and leave "
                "data.per_group at 1 for this one."
            )
        super().__init__(source)
        self.order, self.notes, self.run_length = order, (*source.notes, *notes), run_length


def rows_by_group(source: AbstractSource) -> dict[str, list[int]]:
    """Return the rows of each group, groups in the order of their first rows."""
    found: dict[str, list[int]] = {}
    for row in range(len(source)):
        found.setdefault(source.without_image(row).group, []).append(row)
    return found


def per_group(source: AbstractSource, count: int) -> Ordered:
    """Return a source whose epochs show `count` rows of a group, then of another, and so on: every row at least once.

    The rows of a group are shuffled and cut into runs of `count`, the last one filled up with rows of the group; the runs of all groups are
    shuffled. Groups of one row have no pair and are left out.

    Args:
        source: With groups.
        count: Rows of a group that stand together, at least 2; batches must be a multiple of it.

    Raises:
        ConfigError: If `count` is below 2.
        DataError: If no group has two rows, or the source has an order already.
    """
    if count < 2:
        raise ConfigError(f"Samples of one group are pairs from 2 per group on, not {count}.")
    groups = [np.array(rows) for rows in rows_by_group(source).values()]
    paired = [rows for rows in groups if len(rows) > 1]
    if not paired:
        raise DataError(
            f"No two of the {len(source)} samples of {source.name} share a group. Name their column: --columns.group."
        )

    alone = len(groups) - len(paired)
    order = partial(_runs_of_groups, paired, count)
    notes = (f"{alone} samples are alone in their group and left out.",) if alone else ()
    return Ordered(source, order, notes, run_length=count)


def hard_negatives(
    source: AbstractSource, embeddings: Float[Tensor, "n d"], *, neighbours: int = 3, count: int = 3
) -> Ordered:
    """Return a source whose epochs show, for each group in turn, rows of the group and then of the groups nearest to it.

    A batch must be a multiple of `neighbours` x `count` samples; it then holds what the embeddings take for one another. Mined once: call this
    again with new embeddings to mine anew. Rows are drawn in every epoch, with replacement where a group has fewer than `count`.

    Args:
        source: With groups; a training part, as holding out samples afterwards takes neighbours apart.
        embeddings: One normalised vector per sample; a group is the mean of its own.
        neighbours: k, groups that stand together, the group itself included.
        count: m, rows of each.

    Raises:
        ConfigError: If there are fewer groups than `neighbours`, or the embeddings are of other samples.
        DataError: If the source has an order already.

    Source: Arora et al. 2023 (arXiv 2304.03464), section 4.
    """
    groups = [np.array(rows) for rows in rows_by_group(source).values()]
    if len(embeddings) != len(source) or not 1 < neighbours <= len(groups) or count < 1:
        raise ConfigError(
            f"Hard negatives need one embedding for each of {len(source)} samples, 2 to {len(groups)} neighbours and a count of at least 1; "
            f"there are {len(embeddings)}, {neighbours} and {count}."
        )
    beside = nearest_groups(F.normalize(torch.stack([embeddings[rows].mean(0) for rows in groups]), dim=-1), neighbours)
    return Ordered(source, partial(_rows_of_neighbours, groups, beside, count), run_length=neighbours * count)


def nearest_groups(centres: Float[Tensor, "c d"], neighbours: int) -> Int64[np.ndarray, "c k"]:
    """Return for each normalised vector its own row and those of the nearest others, nearest first."""
    scores = centres @ centres.T
    found: np.ndarray = scores.fill_diagonal_(torch.inf).topk(neighbours).indices.numpy()
    return found


def check_batch(batch_size: int, run_length: int) -> None:
    """Raise unless a batch holds whole runs of samples.

    Raises:
        ConfigError: With the nearest size that does.
    """
    if batch_size % run_length:
        better = max(run_length, batch_size // run_length * run_length)
        raise ConfigError(
            f"Batches of {batch_size} cut through runs of {run_length} samples that belong together. Set data.batch_size to {better}."
        )


Rows = Int64[np.ndarray, " _n"]


def _runs_of_groups(groups: Sequence[Rows], count: int, rng: np.random.Generator) -> Rows:
    runs = np.concatenate([_runs(rng.permutation(rows), count, rng) for rows in groups])
    return rng.permutation(runs).flatten()


def _runs(rows: Rows, count: int, rng: np.random.Generator) -> Int64[np.ndarray, "runs count"]:
    missing = -len(rows) % count
    return np.concatenate([rows, rng.choice(rows, missing, replace=missing > len(rows))]).reshape(-1, count)


def _rows_of_neighbours(
    groups: Sequence[Rows], beside: Int64[np.ndarray, "c k"], count: int, rng: np.random.Generator
) -> Rows:
    anchors = beside[rng.permutation(len(groups))].flatten()
    return np.concatenate([rng.choice(groups[group], count, replace=len(groups[group]) < count) for group in anchors])
