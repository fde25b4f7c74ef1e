import numpy as np
import pytest

from diptych.data.components import connected_components


def test_diagonal_neighbours_belong_together():
    mask = np.array([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]], dtype=bool)
    assert connected_components(mask).tolist() == [[2, 0, 0, 1], [0, 2, 0, 0], [0, 0, 0, 0], [3, 3, 0, 4]]
    assert not connected_components(np.zeros((3, 4), dtype=bool)).any()
    assert connected_components(np.ones((3, 4), dtype=bool)).tolist() == [[1] * 4] * 3


@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 0.8])
def test_scipy_finds_the_same_components(density):
    label = pytest.importorskip("scipy.ndimage").label
    mask = np.random.default_rng(0).random((40, 60)) < density
    ours, (theirs, count) = connected_components(mask), label(mask, np.ones((3, 3)))
    assert ours.max() == count
    pairs = set(zip(ours[mask].tolist(), theirs[mask].tolist(), strict=True))
    assert len(pairs) == count  # one to one


def test_a_spiral_is_one_component():
    mask = np.zeros((41, 41), dtype=bool)
    row = column = 20
    for length, (down, right) in enumerate([(0, 1), (1, 0), (0, -1), (-1, 0)] * 9, 1):
        for _ in range(2 * ((length + 1) // 2)):
            if 0 <= row < 41 and 0 <= column < 41:
                mask[row, column] = True
            row, column = row + down, column + right
    assert mask.sum() > 400 and connected_components(mask).max() == 1
