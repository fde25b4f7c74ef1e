from dataclasses import replace

import pytest
import torch

from diptych.data.tokenizer import TextPolicy, Tokenizer
from diptych.errors import TextError
from diptych.models.dual import normalise
from diptych.models.prompting import plain_attention, prompted_texts, slotted
from diptych.types import fill_up

NAMES = ("dog.", "a red circle.", "elephant.")


def test_slots_stand_behind_the_first_token(make_model):
    tokenizer = make_model().tokenizer
    plain, found = tokenizer(NAMES[:1]), slotted(tokenizer, NAMES[:1], 3)
    assert found.ids.shape[1] == plain.ids.shape[1] + 3 and found.mask.all()
    assert torch.equal(found.ids[:, :1], plain.ids[:, :1]) and torch.equal(found.ids[:, 4:], plain.ids[:, 1:])
    assert torch.equal(found.key, plain.key)


@pytest.mark.parametrize("begin", [2, None])
def test_a_context_of_words_gives_the_texts_with_those_words(make_model, begin):
    """The embeddings of 'a photo of a' in the slots are the same as writing them; also where no token begins a text, as in SigLIP."""
    model = make_model(texts=["a photo of a dog.", "a photo of a elephant.", "a red circle."] * 4).eval()
    model.tokenizer = Tokenizer(model.tokenizer.engine, TextPolicy(length=16, begin=begin))
    words = model.tokenizer(["a photo of a"]).ids[0, 0 if begin is None else 1 : -1]
    names = slotted(model.tokenizer, ["dog.", "elephant."], len(words))
    with torch.no_grad():
        context = model.text.token_embedding(words)[None].expand(2, -1, -1)
        found = prompted_texts(model, names, context)
        expected = model.encode_text(model.tokenizer(["a photo of a dog.", "a photo of a elephant."]))
    torch.testing.assert_close(found, expected[None].expand(2, -1, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group_cost", [0, 10**6], ids=["by length", "together"])
def test_it_equals_a_naive_double_loop_with_its_gradient(make_model, monkeypatch, group_cost):
    monkeypatch.setattr("diptych.models.prompting.GROUP_COST", group_cost)
    model = make_model().double().requires_grad_(False).eval()
    names = slotted(model.tokenizer, NAMES, 2)
    context = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    found = prompted_texts(model, names, context)
    naive = []
    for row in range(3):
        for name in range(3):
            alone = slotted(model.tokenizer, NAMES[name : name + 1], 2)
            output = model.text(alone.ids, alone.mask, context=context[row : row + 1])
            embedded = model.text_head(output)
            naive.append((embedded / embedded.norm())[0])
    expected = torch.stack(naive).view(3, 3, -1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = [torch.autograd.grad((each * cotangent).sum(), context)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-11)


def test_a_tower_that_looks_at_padding_sees_all_of_it(make_model):
    model = make_model().requires_grad_(False).eval()
    model.text.config = replace(model.text.config, causal=False, attend_padding=True, pool="last")
    names = slotted(model.tokenizer, NAMES, 2)
    names = replace(names, ids=fill_up(names.ids, (16,)), mask=fill_up(names.mask, (16,)))
    context = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(0))
    found = prompted_texts(model, names, context)
    output = model.text(names.ids, names.mask, context=context.expand(3, -1, -1))
    torch.testing.assert_close(found[0], normalise(model.text_head(output)))


def test_plain_attention_equals_the_fused_kernel(make_model):
    model, names = make_model().eval(), slotted(make_model().tokenizer, NAMES, 2)
    context = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1)
    with torch.no_grad():
        expected = model.text(names.ids, names.mask, context=context).pooled
        with plain_attention(names.ids):
            found = model.text(names.ids, names.mask, context=context).pooled
    torch.testing.assert_close(found, expected)


def test_prompts_that_are_too_long_are_refused(make_model):
    tokenizer = make_model().tokenizer  # of 16 tokens
    with pytest.raises(
        TextError, match=r"'a red circle\.' needs \d+ tokens and the learnt prompt 14; this model takes 16"
    ):
        slotted(tokenizer, NAMES[1:2], 14)
