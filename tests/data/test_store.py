import pickle

import numpy as np
import pytest
import torch

from diptych.data import store as module
from diptych.data.store import TensorStore, hash_bytes


def filled(folder, *shards) -> TensorStore:
    store = TensorStore(folder)
    for keys in shards:
        rows = torch.tensor(keys)
        parts = [torch.full((key % 4 + 1, 2), float(key)) for key in keys]
        store.add(rows, {"pooled": rows[:, None].to(torch.bfloat16).expand(-1, 3)}, ragged={"tokens": parts})
    return store


def test_rows_come_back_in_any_order_from_any_shard(tmp_path):
    store = filled(tmp_path, [7, 3], [9, 1, 4])
    keys = torch.tensor([4, 7, 5, 1, 4])
    rows = store.find(keys)
    assert (rows >= 0).tolist() == [True, True, False, True, True]
    found = store.take("pooled", rows[rows >= 0])
    assert found.dtype == torch.bfloat16 and found[:, 0].tolist() == [4, 7, 1, 4]
    tokens = store.take_ragged("tokens", rows[rows >= 0], 5)
    assert tokens.shape == (4, 5, 2)
    for row, key in zip(tokens, (4, 7, 1, 4), strict=True):
        assert row[: key % 4 + 1].unique().tolist() == [key] and not row[key % 4 + 1 :].any()


def test_an_empty_store_finds_nothing(tmp_path):
    store = TensorStore(tmp_path / "none")
    assert len(store) == 0 and store.columns == set()
    assert store.find(torch.tensor([1, 2])).tolist() == [-1, -1]


def test_what_is_written_is_there_for_the_next_process(tmp_path):
    filled(tmp_path, [1, 2])
    assert TensorStore(tmp_path).find(torch.tensor([2])).tolist() != [-1]


def test_a_copy_keeps_its_row_numbers_though_shards_were_added(tmp_path):
    store = filled(tmp_path, [5], [6])
    rows = store.find(torch.tensor([5, 6]))
    for key in range(20, 40):
        filled(tmp_path, [key])
    copy = pickle.loads(pickle.dumps(store))
    assert copy.take("pooled", rows)[:, 0].tolist() == [5, 6]


def test_a_damaged_shard_counts_as_absent_and_is_made_again(tmp_path):
    filled(tmp_path, [1, 2], [3])
    first = next(path for path in tmp_path.iterdir() if path.stat().st_size and 1 in module.load_file(path)["keys"])
    first.write_bytes(first.read_bytes()[:-5])
    store = TensorStore(tmp_path)
    assert (store.find(torch.tensor([1, 2, 3])) < 0).tolist() == [True, True, False]
    again = filled(tmp_path, [1, 2])
    assert again.take("pooled", again.find(torch.tensor([2, 3])))[:, 0].tolist() == [2, 3]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise module.SafetensorError("No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        filled(tmp_path, [1])
    assert list(tmp_path.iterdir()) == []


def test_hashes_see_every_byte_and_the_shape():
    pixels = np.zeros((2, 6, 3), np.uint8)
    other = pixels.copy()
    other[1, 5, 2] = 1
    found = {
        hash_bytes(b"a"),
        hash_bytes(b"b"),
        hash_bytes(pixels),
        hash_bytes(other),
        hash_bytes(pixels.reshape(6, 2, 3)),
    }
    assert len(found) == 5 and hash_bytes(b"a") == hash_bytes(b"a")
