"""An oracle of another make: the tiled forward pass of Inf-CL, a running log-sum-exp of each row, written from its paper.

Source: Cheng et al. 2024, "Breaking the Memory Barrier: Near Infinite Batch Size Scaling for Contrastive Loss", arXiv 2410.17243, section 3.1.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diptych.losses import tiled
from diptych.losses.contrastive import TILED_FROM, info_nce
from diptych.losses.tiled import tiled_info_nce


def log_sum_exps(queries: Tensor, keys: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    """Return log sum_j exp(scale * queries_i . keys_j), tile by tile.

    What is known of a row, l, takes in what a tile says of it, t: l <- l + log(1 + exp(t - l)), where t = m + log sum_j exp(x_j - m) with the
    tile's maximum m. It starts from nothing, l = -inf; l and t may change places, so that no power is above 1.
    """
    found = []
    for some in queries.split(rows):
        known = some.new_full((len(some),), -math.inf)
        for others in keys.split(columns):
            cells = scale * some @ others.T
            highest = cells.max(1).values
            tile = highest + torch.log(torch.exp(cells - highest[:, None]).sum(1))
            above, below = torch.maximum(known, tile), torch.minimum(known, tile)
            known = above + torch.log1p(torch.exp(below - above))
        found.append(known)
    return torch.cat(found)


def reference(image: Tensor, text: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    """Return the mean over both directions of log-sum-exp minus the matching logit."""
    matching = scale * (image * text).sum(1)
    by_row = log_sum_exps(image, text, scale, rows, columns) - matching
    by_column = log_sum_exps(text, image, scale, rows, columns) - matching
    return (by_row.mean() + by_column.mean()) / 2


def pairs(n: int, d: int, *, opposite: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, noise = normalize(torch.randn(2, n, d, generator=generator, dtype=torch.float64), dim=-1)
    return image, -image if opposite else normalize(image + noise, dim=-1)


@pytest.mark.parametrize("opposite", [False, True])
@pytest.mark.parametrize("scale", [1.0, 100.0, 900.0])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 7), (16, 5), (64, 64)])
@pytest.mark.parametrize(("n", "d"), [(1, 3), (23, 6)])
def test_the_tiled_and_the_plain_form_are_the_papers(n, d, rows, columns, scale, opposite, monkeypatch):
    """Up to scale 900, where exp(scale) is no number in fp64 any more."""
    monkeypatch.setattr(tiled, "BLOCK", 8)
    monkeypatch.setitem(TILED_FROM, "cpu", 10**9)
    image, text = pairs(n, d, opposite=opposite)
    factor = torch.tensor(scale, dtype=torch.float64)
    expected = reference(image, text, factor, rows, columns)
    for found in (tiled_info_nce(image, text, factor, None), info_nce(image, text, factor)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_oracle_itself_at_chance_and_by_hand():
    """Log n when all is equal; two pairs at right angles, scale s: log(1 + e^-s)."""
    same = torch.ones(5, 1, dtype=torch.float64)
    scale = torch.tensor(2.0, dtype=torch.float64)
    assert reference(same, same, scale, 2, 3).item() == pytest.approx(math.log(5))
    eye = torch.eye(2, dtype=torch.float64)
    assert reference(eye, eye, scale, 1, 1).item() == pytest.approx(math.log(1 + math.exp(-2)))
