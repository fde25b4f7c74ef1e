"""Texts encoded by length: equal to one pass over the whole batch, in value and gradient, wherever it is used."""

import pytest
import torch
from torch import nn

from diptych.models.by_length import GROUP_COST, cut, encode_by_length, lengths_of
from diptych.models.foreign import HFTextConfig, HFTextTower
from diptych.models.text import AbstractTextTower, TextConfig, TextTransformer
from diptych.models.transformer import dropping

LENGTHS = (3, 12, 4, 3, 7, 12, 1, 3, 4, 9)
REPEATED = (0, 1, 2, 0, 4, 5, 6, 3, 2, 9)


def ours(**changes) -> TextTransformer:
    torch.manual_seed(0)
    tower = TextTransformer(TextConfig(vocabulary=50, length=16, width=16, depth=2, heads=2, mlp_width=24, **changes))
    nn.init.normal_(tower.position)  # as drawn, positions hardly differ from each other
    return tower.double()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    settings = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    settings.save_pretrained(folder)

    def make(pool: str = "mean") -> HFTextTower:
        torch.manual_seed(0)
        return HFTextTower(HFTextConfig(str(folder), pool)).double()

    return make


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return ten texts of one to twelve tokens, some of them equal, padded to fourteen."""
    ids = torch.randint(1, 50, (10, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(14) < torch.tensor(LENGTHS)[:, None]
    place = torch.tensor(REPEATED)
    return ids[place].where(mask[place], 0), mask[place]


class Calls:
    """Notes the sizes of what a tower is called with."""

    def __init__(self, tower: AbstractTextTower) -> None:
        self.sizes: list[tuple[int, ...]] = []
        tower.register_forward_pre_hook(lambda module, inputs: self.sizes.append(tuple(inputs[0].shape)))


def assert_equal_to_one_pass(tower: AbstractTextTower) -> None:
    """Compare pooled vectors, tokens at real positions and the gradient of a function of both."""
    ids, mask = batch()
    weight = torch.randn(10, 14, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for encode in (tower, lambda *texts: encode_by_length(tower, *texts, group_cost=0)):
        tower.zero_grad()
        output = encode(ids, mask)
        tokens = output.tokens * mask[..., None]
        ((output.pooled.sin() * weight[:, 0]).sum() + (tokens.cos() * weight).sum()).backward()
        gradients = {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}
        found.append((output.pooled.detach(), tokens.detach(), output.mask, gradients))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pool": "mean"},
        {"pool": "first", "causal": False},
        {"pool": "mean", "causal": False},
        {"attend_padding": True},  # a causal tower never sees what comes after a text
    ],
)
def test_our_tower_gives_the_same(changes):
    tower = ours(**changes)
    calls = Calls(tower)
    assert_equal_to_one_pass(tower)
    assert calls.sizes[0] == (10, 14) and len(calls.sizes) > 3


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_a_tower_of_transformers_gives_the_same(bert, pool):
    tower = bert(pool).eval()
    calls = Calls(tower)
    assert_equal_to_one_pass(tower)
    assert len(calls.sizes) > 3


def test_equal_texts_are_encoded_once_and_each_group_is_as_long_as_its_longest():
    tower, (ids, mask) = ours(), batch()
    calls = Calls(tower)
    encode_by_length(tower, ids, mask, group_cost=0)
    distinct = {tuple(row[real].tolist()) for row, real in zip(ids, mask, strict=True)}
    lengths = sorted(len(text) for text in distinct)
    assert len(distinct) == 8
    assert calls.sizes == [(lengths.count(length), length) for length in sorted(set(lengths))]


def test_padding_comes_out_as_zeros_at_the_full_length():
    tower, (ids, mask) = ours(), batch()
    output = encode_by_length(tower, ids, mask, group_cost=0)
    assert output.tokens.shape == (10, 14, 16) and not output.tokens[:, 12:].any()
    assert torch.equal(output.mask, mask)


def test_equal_ids_under_another_mask_are_other_texts():
    tower = ours(pool="mean", causal=False)
    ids = torch.full((40, 12), 7)
    mask = torch.arange(12) < torch.tensor([[3], [8]]).repeat(20, 1)
    output = encode_by_length(tower, ids, mask, group_cost=0)
    torch.testing.assert_close(output.pooled, tower(ids, mask).pooled, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(output.pooled[0], output.pooled[1])


def test_a_tower_that_sees_padding_or_drops_at_random_is_called_plainly(bert):
    dropping_bert, still = bert().train(), ours(pool="mean").train()
    for tower in (ours(pool="last"), ours(pool="mean", causal=False, attend_padding=True), dropping_bert):
        calls = Calls(tower)
        encode_by_length(tower, *batch(), group_cost=0)
        assert calls.sizes == [(10, 14)] and not tower.by_row
    assert still.by_row and dropping_bert.eval().by_row
    for rates in ({"stream": 0.1}, {"path": 0.1}):
        with dropping(still, **rates):
            assert not still.by_row and still.eval().by_row
            still.train()
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(dropping_bert.model.config, name, 0.0)
    assert not dropping_bert.train().by_row  # its modules still drop
    for module in dropping_bert.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert dropping_bert.by_row


def test_small_batches_are_left_alone():
    tower, (ids, mask) = ours(), batch()
    calls = Calls(tower)
    assert ids.numel() < GROUP_COST
    output = encode_by_length(tower, ids, mask)
    assert calls.sizes == [(10, 14)] and torch.equal(output.pooled, tower(ids, mask).pooled)


@pytest.mark.parametrize("cost", [0, 3, 10, 30, 1000])
def test_the_cut_is_the_best_of_all(cost):
    lengths = sorted([2, 2, 3, 5, 5, 8, 9, 9, 14])

    def price(ends: list[int]) -> int:
        starts = [0, *ends[:-1]]
        return sum((end - start) * lengths[end - 1] + cost for start, end in zip(starts, ends, strict=True))

    every = [
        [i for i in range(1, 9) if choice >> (i - 1) & 1] + [9] for choice in range(2**8)
    ]  # a group may end behind each of the first eight texts, or not
    assert price(cut(lengths, cost)) == min(map(price, every))
    assert cut([4, 4, 4], cost) == [3]


def test_a_length_reaches_to_the_last_real_token():
    mask = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4])
    assert lengths_of(mask).tolist() == [3, 1, 4]


def test_a_model_encodes_by_length_unless_told_otherwise(make_model):
    words = ["red", "a red circle on a blue square and a green one", "blue square"]
    model = make_model(0, words).eval()
    tokens = model.tokenizer(words * 60)
    calls = Calls(model.text)
    by_length = model.encode_text(tokens)
    assert len(calls.sizes) > 1 or calls.sizes[0][0] == 3
    calls.sizes.clear()
    model.texts_by_length = False
    together = model.encode_text(tokens)
    assert calls.sizes == [tuple(tokens.ids.shape)]
    torch.testing.assert_close(by_length, together)
