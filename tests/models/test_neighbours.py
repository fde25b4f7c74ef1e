import numpy as np
import pytest
import torch

from diptych.errors import InputError
from diptych.models.neighbours import nearest


@pytest.mark.parametrize(("chunk", "block"), [(1024, 65_536), (3, 4), (1, 1)])
@pytest.mark.parametrize("count", [1, 3, 50])
def test_it_equals_sorting_all_scores(chunk, block, count):
    rng = torch.Generator().manual_seed(0)
    queries, candidates = torch.randn(10, 5, generator=rng), torch.randn(17, 5, generator=rng)
    scores, rows = nearest(queries, candidates, count, chunk=chunk, block=block)
    expected = (queries @ candidates.T).sort(1, descending=True)
    assert torch.equal(rows, expected.indices[:, :count])
    torch.testing.assert_close(scores, expected.values[:, :count])


def test_no_queries_give_no_neighbours():
    assert len(nearest(torch.empty(0, 3), torch.ones(2, 3), 1)[0]) == 0


@pytest.mark.parametrize(
    ("candidates", "count", "words"),
    [
        (torch.empty(0, 3), 1, "there are 1 and 0"),
        (torch.ones(2, 3), 0, "there are 0 and 2"),
        (torch.tensor([[1.0, 1, 1], [0, np.nan, 0]]), 1, "Row 1 of the candidate"),
    ],
)
def test_what_cannot_be_searched(candidates, count, words):
    with pytest.raises(InputError, match=words):
        nearest(torch.ones(1, 3), candidates, count)
