from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diptych.types import Batch, Encoded, Interval, Losses, PairEmbeddings, Text, Tokens, concatenate, map_tensors, rows


@dataclass(frozen=True)
class Deep(Encoded):
    plain: Tensor
    pair: PairEmbeddings
    named: Mapping[str, Tensor]
    nothing: Tensor | None = None
    word: str = "kept"


def batch(count: int) -> Batch:
    ids = torch.arange(count * 5).reshape(count, 5)
    images = torch.arange(count * 12, dtype=torch.uint8).reshape(count, 3, 2, 2)
    return Batch(
        tuple(f"k{i}" for i in range(count)),
        (images, images.repeat(1, 1, 2, 2)),
        (Tokens(ids, ids > 2, torch.arange(count)), Tokens(ids + 1, ids > 3, torch.arange(count) + 9)),
        torch.arange(count) // 2,
        ("7: gone",),
    )


def deep(count: int) -> Deep:
    values = torch.arange(count * 2.0).reshape(count, 2)
    return Deep(values, PairEmbeddings((values + 1, values + 2), (values + 3,)), {"x": values + 4, "y": values + 5})


def tensors(record) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(keep, record)
    return found


def test_every_tensor_is_reached_and_nothing_else():
    record = deep(3)
    assert [tensor[0, 0].item() for tensor in tensors(record)] == [0, 1, 2, 3, 4, 5]
    doubled = map_tensors(lambda tensor: tensor * 2, record)
    assert isinstance(doubled, Deep) and isinstance(doubled.pair, PairEmbeddings)
    assert torch.equal(doubled.pair.images[1], record.pair.images[1] * 2)
    assert torch.equal(doubled.named["y"], record.named["y"] * 2)
    assert doubled.nothing is None and doubled.word == "kept"
    assert record.plain[0, 1] == 1  # the original is untouched
    assert map_tensors(lambda tensor: tensor + 1, Interval(1, 0, 2)) == Interval(1, 0, 2)
    assert map_tensors(lambda tensor: tensor + 1, Text) is Text  # a class is no record


def test_losses_are_detached_part_by_part():
    weight = torch.tensor(2.0, requires_grad=True)
    found = map_tensors(torch.Tensor.detach, Losses(weight * 3, {"a": weight, "b": weight + 1}))
    assert not found.total.requires_grad and {name: part.item() for name, part in found.parts.items()} == {
        "a": 2,
        "b": 3,
    }


def test_rows_cut_every_tensor_and_the_keys():
    found = rows(batch(5), 1, 3)
    assert found.keys == ("k1", "k2") and len(found) == 2 and found.skipped == ("7: gone",)
    assert [len(tensor) for tensor in tensors(found)] == [2] * len(tensors(batch(5)))
    assert torch.equal(found.images[1], batch(5).images[1][1:3])
    assert found.texts[1].key.tolist() == [10, 11] and found.group.tolist() == [0, 1]
    assert len(rows(batch(5), 3, 99)) == 2


@pytest.mark.parametrize("cuts", [(0, 5), (0, 2, 4, 5), (0, 1, 2, 3, 4, 5), (0, 4, 5)])
def test_concatenate_undoes_rows(cuts):
    whole = batch(5)
    found = concatenate([rows(whole, start, stop) for start, stop in pairwise(cuts)])
    assert isinstance(found, Batch) and found.keys == whole.keys and found.skipped == whole.skipped
    assert len(tensors(found)) == len(tensors(whole))
    assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(whole), strict=True))


def test_concatenate_joins_what_encode_returns():
    whole = deep(5)
    chunks = [map_tensors(lambda tensor, cut=cut: tensor[cut], whole) for cut in (slice(0, 3), slice(3, 5))]
    found = concatenate(chunks)
    assert isinstance(found, Deep) and found.nothing is None and found.word == "kept"
    assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(whole), strict=True))


def test_gradients_pass_through_concatenate():
    values = torch.ones(4, 2, requires_grad=True)
    joined = concatenate(
        [PairEmbeddings((values[:1],), (values[:1] * 2,)), PairEmbeddings((values[1:],), (values[1:],))]
    )
    (joined.images[0] + joined.texts[0]).sum().backward()
    assert values.grad[:, 0].tolist() == [3, 2, 2, 2]


def test_records_of_different_form_are_not_joined():
    one = deep(2)
    with pytest.raises(ValueError, match="shorter"):
        concatenate([one, replace(one, pair=PairEmbeddings(one.pair.images[:1], one.pair.texts))])


def test_an_interval_reads_well():
    assert str(Interval(0.12345, 0.1, 0.2)) == "0.123 [0.100, 0.200]"
