"""A batch of texts through a tower for less work and with the same result: equal texts once, short texts apart from long ones.

A tower computes every position of a padded batch, of padding too, and every repetition of a text. Here a batch is cut into a few groups of
similar length, each as long as its own longest text. What comes out for a text, and its gradient, differs from one pass over the whole
batch by rounding only.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from diptych.models.text import AbstractTextTower
from diptych.types import TowerOutput, concatenate, fill_up, map_tensors

GROUP_COST = 256
"""What one more call of a tower costs, in tokens that it could have computed instead."""


def encode_by_length(
    tower: AbstractTextTower, ids: Int64[Tensor, "b t"], mask: Bool[Tensor, "b t"], *, group_cost: int = GROUP_COST
) -> TowerOutput:
    """Return what `tower(ids, mask)` does, but for tokens at padding, which are zeros.

    The tower is called plainly where groups would not pay, and where its output depends on padding or on chance.

    Args:
        tower: Any.
        ids: Padded behind their ends.
        mask: True at real tokens.
        group_cost: Of one call, in tokens, >= 0.
    """
    if not tower.by_row:
        return tower(ids, mask)  # type: ignore[no-any-return]
    distinct, place = torch.unique(torch.cat([ids, mask], 1), dim=0, return_inverse=True)
    ids_, mask_ = distinct[:, : ids.shape[1]], distinct[:, ids.shape[1] :].bool()
    lengths, order = torch.sort(lengths_of(mask_), stable=True)
    ends = cut(lengths.tolist(), group_cost)
    groups = list(zip([0, *ends], ends, strict=False))
    tokens = sum((end - start) * int(lengths[end - 1]) for start, end in groups)
    if tokens + group_cost * len(groups) >= ids.numel():
        return tower(ids, mask)  # type: ignore[no-any-return]
    parts: list[TowerOutput] = []
    for start, end in groups:
        rows, longest = order[start:end], int(lengths[end - 1])
        parts.append(tower(ids_[rows, :longest], mask_[rows, :longest]))
    back = torch.argsort(order)[place]
    output = map_tensors(lambda tensor: tensor.index_select(0, back), concatenate(parts))
    if output.tokens is None:
        return output
    return replace(output, tokens=fill_up(output.tokens, (ids.shape[1], output.tokens.shape[2])), mask=mask)


def lengths_of(mask: Bool[Tensor, "b t"]) -> Int64[Tensor, " b"]:
    """Return how many positions each text needs: up to its last real token, at least one."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1).clamp(min=1)


def cut(lengths: Sequence[int], group_cost: int) -> list[int]:
    """Return where each group of texts ends, for the least tokens computed plus `group_cost` per group.

    Args:
        lengths: Of the texts, ascending.
        group_cost: >= 0.
    """
    least: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for end, length in enumerate(lengths, 1):
        if end == len(lengths) or lengths[end] > length:  # texts of one length stay together
            least[end] = min(
                (cost + (end - start) * length + group_cost, [*ends, end]) for start, (cost, ends) in least.items()
            )
    return least[len(lengths)][1]
