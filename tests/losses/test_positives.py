import pytest
import torch

from diptych.losses.positives import Positives


@pytest.mark.parametrize(
    ("group", "key"),
    [
        ([1, 2, 3, 1], [7, 8, 8, 9]),
        ([5, 5, 5, 5], [1, 2, 3, 4]),
        ([1, 2, 3, 4], [1, 2, 3, 4]),
        ([5, 5, 6, 6], [7, 7, 8, 8]),
        ([1, 1, 2, 2], [3, 4, 4, 3]),
        ([-(2**63), 2**63 - 1, -(2**63), 0], [0, 0, 1, 2]),
    ],
)
def test_counts_and_cells_are_those_of_the_matrix(group, key):
    positives = Positives(torch.tensor(group), torch.tensor(key))
    expected = [[group[i] == group[j] or key[i] == key[j] for j in range(4)] for i in range(4)]
    assert positives.matrix().tolist() == expected
    assert positives.counts.tolist() == [sum(row) for row in expected]
    for size in (1, 2, 3, 4):
        found = torch.zeros(4, 4, dtype=torch.int64)
        for top in range(0, 4, size):
            for left in range(0, 4, size):
                i, j = positives.cells(slice(top, top + size), slice(left, left + size))
                found[top + i, left + j] += 1  # each at most once
        assert found.tolist() == [[int(cell) for cell in row] for row in expected]


def test_counts_of_one_group_need_no_matrix():
    n = 300_000  # whose matrix would be 90 GB
    positives = Positives(torch.zeros(n, dtype=torch.int64), torch.arange(n) // 2)
    assert (positives.counts == n).all()
