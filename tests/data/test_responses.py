import numpy as np
import pytest

from diptych.data.responses import cut_windows, read_dissimilarities, read_responses
from diptych.errors import DataError


def test_files_of_every_kind(tmp_path):
    values = np.random.default_rng(0).normal(size=(7, 3, 2))
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "a.npz", responses=values[:, :, 0], sites=np.array(["left", "right", "mid"]))
    (tmp_path / "a.csv").write_text("left,right\n1,2.5\n3,4\n")
    found = read_responses(tmp_path / "a.npy")
    assert found.sites == ("0", "1", "2") and np.array_equal(found.values, values)
    assert np.array_equal(found.targets[:, 2], values[:, 1, 0])
    named = read_responses(tmp_path / "a.npz")
    assert named.sites == ("left", "right", "mid") and named.values.shape == (7, 3, 1)
    assert read_responses(tmp_path / "a.csv").values[:, :, 0].tolist() == [[1, 2.5], [3, 4]]


def test_files_that_cannot_be_used(tmp_path):
    np.savez(tmp_path / "b.npz", other=np.ones((3, 2)))
    with pytest.raises(DataError, match="no array `responses`, only other"):
        read_responses(tmp_path / "b.npz")
    np.save(tmp_path / "flat.npy", np.ones(3))
    with pytest.raises(DataError, match="shape is"):
        read_responses(tmp_path / "flat.npy")
    np.savez(tmp_path / "nan.npz", responses=np.array([[1, 2], [3, np.nan]]), sites=np.array(["x", "y"]))
    with pytest.raises(DataError, match="event 1, site y"):
        read_responses(tmp_path / "nan.npz")
    (tmp_path / "words.csv").write_text("left\nmany\n")
    with pytest.raises(DataError, match="numbers per event"):
        read_responses(tmp_path / "words.csv")
    (tmp_path / "no.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="cannot be read"):
        read_responses(tmp_path / "no.npz")


def test_windows_equal_means_taken_one_by_one():
    recording = np.random.default_rng(0).normal(size=(2000, 2))
    onsets = np.array([6.0, 9.5])
    found = cut_windows(recording, 100, onsets, window=0.2, stride=0.05, span=(-1, 1), sites=("a", "b"))
    assert found.values.shape == (2, 2, 41) and found.sites == ("a", "b")
    for event, onset in enumerate(onsets):
        for k in range(41):
            start = round((onset - 1 + 0.05 * k - 0.1) * 100)
            np.testing.assert_allclose(found.values[event, :, k], recording[start : start + 20].mean(0), atol=1e-12)
    assert cut_windows(np.ones((20_000, 1)), 2000, np.array([5.0])).values.shape == (1, 1, 161)
    with pytest.raises(DataError, match=r"1 events .* recording of 20 s, the first at 19.5 s"):
        cut_windows(recording, 100, np.array([6.0, 19.5]))


def test_dissimilarities(tmp_path):
    matrix = np.array([[0, 1.0], [1, 0]])
    np.savez(tmp_path / "d.npz", one=matrix, other=np.ones(3))
    assert list(read_dissimilarities(tmp_path / "d.npz")) == ["one"]
    np.save(tmp_path / "single.npy", matrix)
    assert list(read_dissimilarities(tmp_path / "single.npy")) == ["single"]
    np.savetxt(tmp_path / "c.csv", matrix, delimiter=",")
    assert np.array_equal(read_dissimilarities(tmp_path / "c.csv")["c"], matrix)
    np.savez(tmp_path / "skew.npz", one=np.array([[0, 1.0], [2, 0]]))
    with pytest.raises(DataError, match=r"one in .* symmetric"):
        read_dissimilarities(tmp_path / "skew.npz")
    np.savez(tmp_path / "none.npz", one=np.ones((2, 3)))
    with pytest.raises(DataError, match=r"no square matrix, only one \(2, 3\)"):
        read_dissimilarities(tmp_path / "none.npz")


@pytest.mark.data
def test_the_bundle_of_92_objects(data):
    found = read_dissimilarities(data / "brain-92-objects" / "rdms.npz")
    assert len(found) == 18 and {matrix.shape for matrix in found.values()} == {(92, 92)}
