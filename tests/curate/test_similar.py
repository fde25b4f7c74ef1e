import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.curate import similar
from diptych.curate.similar import close_in_direction, first_of_similar, sharing_a_band, spans


def one_by_one(matrix: np.ndarray) -> list[int]:
    """Return what stands for each row by the loop that the module describes."""
    stands: list[int] = []
    for row in range(len(matrix)):
        stands.append(next((one for one in range(row) if stands[one] == one and matrix[one, row]), row))
    return stands


def neighbours_in(matrix: np.ndarray):
    def neighbours(rows, others):
        one, other = np.nonzero(matrix[np.ix_(rows, others)])
        yield rows[one], others[other]

    return neighbours


@given(st.integers(0, 60), st.floats(0, 0.6), st.integers(0, 2**32), st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_blocks_give_what_the_loop_gives(count, share, seed, first):
    matrix = np.random.default_rng(seed).random((count, count)) < share
    matrix |= matrix.T | np.eye(count, dtype=bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similar, "_FIRST", first)
        assert first_of_similar(count, neighbours_in(matrix)).tolist() == one_by_one(matrix)


def test_a_chain_does_not_fall_to_one_row():
    near = np.abs(np.subtract.outer(np.arange(7), np.arange(7))) <= 1
    assert first_of_similar(7, neighbours_in(near)).tolist() == [0, 0, 2, 2, 4, 4, 6]


@given(st.integers(0, 80), st.integers(1, 4), st.integers(2, 6), st.integers(0, 2**32), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_bands_give_all_pairs_that_share_one(count, width, values, seed, at_once):
    bands = np.random.default_rng(seed).integers(values, size=(count, width)).astype(np.uint64)
    shared = (bands[:, None] == bands[None]).any(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similar, "_PAIRS", at_once)
        half = np.arange(count // 2)
        find = sharing_a_band(bands, lambda one, other: (one + other) % 3 > 0)
        found = {pair for one, other in find(half, np.arange(count)) for pair in zip(one, other, strict=True)}
    expected = {(i, j) for i in half for j in range(count) if i != j and shared[i, j] and (i + j) % 3}
    assert found == expected


def test_bands_without_pairs_are_not_compared():
    asked = []
    bands = np.arange(5000, dtype=np.uint64)[:, None]
    bands[4000] = 7
    kept = first_of_similar(5000, sharing_a_band(bands, lambda one, _: asked.append(len(one)) or one >= 0))
    assert np.flatnonzero(kept != np.arange(5000)).tolist() == [4000] and kept[4000] == 7
    assert sum(asked) == 1  # not 12,497,500


def test_many_similar_rows_cost_little_in_a_random_order():
    asked = []
    bands = np.zeros((50_000, 1), np.uint64)
    kept = first_of_similar(50_000, sharing_a_band(bands, lambda one, _: asked.append(len(one)) or one >= 0))
    assert not kept.any()
    assert sum(asked) < 1024**2 + 50_000  # and not 1,249,975,000


@pytest.mark.parametrize("tile", [3, 2048])
def test_directions(monkeypatch, tile):
    monkeypatch.setattr(similar, "_TILE", tile)
    angles = np.array([0, 10, 50, 58, 200, 355]) * np.pi / 180
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    close = first_of_similar(6, close_in_direction(vectors, float(np.cos(np.pi / 15))))  # 12 degrees
    assert close.tolist() == [0, 0, 2, 2, 4, 0]


def test_spans():
    assert spans(np.array([3, 5, 5]), np.array([5, 5, 8])).tolist() == [3, 4, 5, 6, 7]
    assert spans(np.array([], np.int64), np.array([], np.int64)).tolist() == []
