import pytest
import torch
from safetensors.torch import save_file

from diptych.models.shards import Shards, shard_name, shard_paths

ROWS = torch.arange(10.0).view(5, 2)


@pytest.fixture
def folder(tmp_path):
    """Return a folder with three shards of five rows; a scalar and a vector are whole in the first one."""
    for number, rows in enumerate((ROWS[:2], ROWS[2:4], ROWS[4:])):
        own = {"cut": rows.clone(), "short": torch.ones(1, 3)[number:]}
        whole = {"scalar": torch.tensor(7.0), "vector": torch.arange(4)} if number == 0 else {}
        save_file(own | whole, tmp_path / shard_name("model", (number, 3)))
    return tmp_path


def test_names(folder):
    assert [path.name for path in shard_paths(folder, "model")] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]


def test_what_was_cut_comes_back_whole(folder):
    shards = Shards(folder, "model")
    assert shards.names == {"cut", "short", "scalar", "vector"}
    assert [shards.shape(name) for name in ("cut", "short", "scalar", "vector")] == [(5, 2), (1, 3), (), (4,)]
    found = shards.whole()
    assert torch.equal(found["cut"], ROWS) and torch.equal(found["short"], torch.ones(1, 3))
    assert found["scalar"] == 7 and torch.equal(found["vector"], torch.arange(4))


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (1, 4), (3, 5), (4, 5), (2, 2), (5, 5), (1, None)])
def test_some_rows(folder, start, stop):
    assert torch.equal(Shards(folder, "model").rows("cut", start, stop), ROWS[start:stop])
    assert torch.equal(Shards(folder, "model").rows("vector", start, stop), torch.arange(4)[start:stop])


def test_a_whole_file_comes_first(folder):
    save_file({"cut": ROWS + 1}, folder / "model.safetensors")
    assert torch.equal(Shards(folder, "model").whole()["cut"], ROWS + 1)


def test_a_missing_shard_is_named(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003\.safetensors is missing"):
        Shards(folder, "model")
    with pytest.raises(FileNotFoundError, match=r"training\.safetensors is missing"):
        Shards(folder, "training")
