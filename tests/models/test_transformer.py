import math

import pytest
import torch
from torch.nn import functional as F

from diptych.models.transformer import (
    Attention,
    AttentionPool,
    Block,
    Transformer,
    attend,
    attention_weights,
    drop_path,
    dropping,
    make_activation,
)

CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()
PADDED = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)[:, None, None, :]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive(q, k, v, mask):
    """Attend one query at a time, exp over sum of exp."""
    allowed = torch.ones(*q.shape[:3], k.shape[2], dtype=torch.bool) if mask is None else mask
    allowed = allowed.expand(*q.shape[:3], k.shape[2])
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=v.dtype)
    for b in range(q.shape[0]):
        for head in range(q.shape[1]):
            for i in range(q.shape[2]):
                seen = [j for j in range(k.shape[2]) if allowed[b, head, i, j]]
                weight = [math.exp(float(q[b, head, i] @ k[b, head, j]) / math.sqrt(q.shape[3])) for j in seen]
                parts = [w * v[b, head, j] for w, j in zip(weight, seen, strict=True)]
                out[b, head, i] = sum(parts) / sum(weight)
    return out


def tower(depth: int = 3, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    stack = Transformer(16, depth, 4, 24, activation="gelu", epsilon=1e-5).double()
    with torch.no_grad():
        for parameter in stack.parameters():  # off zero biases and unit norms
            parameter.add_(0.2 * torch.randn_like(parameter))
    return stack


@pytest.mark.parametrize("mask", [None, CAUSAL, PADDED])
def test_attend_is_the_naive_softmax(mask):
    q, k, v = normal(2, 3, 5, 4), normal(2, 3, 5, 4, seed=1), normal(2, 3, 5, 4, seed=2)
    expected = naive(q, k, v, mask)
    torch.testing.assert_close(attend(q, k, v, mask), expected, rtol=1e-12, atol=1e-12)
    weights = attention_weights(q, k, mask)
    torch.testing.assert_close(weights @ v, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))
    if mask is not None:
        assert not weights.masked_select(~mask).any()


def test_queries_and_context_may_differ_in_length():
    q, k, v = normal(2, 3, 2, 4), normal(2, 3, 5, 4, seed=1), normal(2, 3, 5, 4, seed=2)
    torch.testing.assert_close(attend(q, k, v, None), naive(q, k, v, None), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", [None, CAUSAL, PADDED])
def test_the_short_bf16_path_is_as_exact_as_the_fused_kernel(mask):
    exact = [normal(2, 3, 5, 8, seed=i).bfloat16().double().requires_grad_() for i in range(3)]
    short, fused = ([x.detach().bfloat16().requires_grad_() for x in exact] for _ in range(2))
    upstream = normal(2, 3, 5, 8, seed=3)
    outputs = [
        F.scaled_dot_product_attention(*exact, attn_mask=mask),
        attend(*short, mask),
        F.scaled_dot_product_attention(*fused, attn_mask=mask),
    ]
    for output in outputs:
        output.backward(upstream.to(output.dtype))
    assert outputs[1].dtype == torch.bfloat16
    results = [
        [output.detach(), *(x.grad for x in inputs)]
        for output, inputs in zip(outputs, (exact, short, fused), strict=True)
    ]
    for truth, ours, kernel in zip(*results, strict=True):
        error, kernel_error = (float((value.double() - truth).abs().max()) for value in (ours, kernel))
        assert error <= 2 * kernel_error + 2**-8 * float(truth.abs().max())


def test_probabilities_are_those_that_attention_uses():
    torch.manual_seed(0)
    attention, x = Attention(16, 4).double(), normal(2, 5, 16)
    values = attention.split(attention.value(x))
    joined = (attention.probabilities(x, PADDED) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x, x, PADDED), attention.out(joined))


def test_nothing_is_dropped_unless_asked_for_and_in_training():
    stack, x = tower().train(), normal(2, 5, 16)
    plain, state = stack(x)[0], torch.get_rng_state()
    with dropping(stack):
        assert torch.equal(stack(x)[0], plain)
    with dropping(stack.eval(), stream=0.5, path=0.5):
        assert torch.equal(stack(x)[0], plain)
    assert torch.equal(torch.get_rng_state(), state)
    with dropping(stack.train(), stream=0.5):
        assert not torch.equal(stack(x)[0], plain)
    assert torch.equal(stack(x)[0], plain)  # and it ends with the context
    with pytest.raises(RuntimeError), dropping(stack, stream=0.5):
        raise RuntimeError
    assert torch.equal(stack(x)[0], plain)


def test_the_stream_is_dropped_at_the_input_of_each_block():
    stack, x = tower().train(), normal(2, 5, 16)
    with dropping(stack, stream=0.3):
        torch.manual_seed(1)
        found = stack(x, CAUSAL)[0]
    torch.manual_seed(1)
    for block in stack.blocks:
        x = block(F.dropout(x, 0.3), CAUSAL)
    assert torch.equal(found, x)


def test_a_dropped_path_leaves_samples_whole():
    update = normal(4000, 2, 3)
    torch.manual_seed(0)
    found = drop_path(update, 0.25)
    kept = found.flatten(1).any(1)
    torch.testing.assert_close(found[kept], update[kept] / 0.75)
    assert not found[~kept].any() and (~kept).float().mean().item() == pytest.approx(0.25, abs=0.028)
    assert drop_path(update, 0.0) is update
    stack, x = tower().train(), normal(50, 5, 16)
    with dropping(stack, path=0.9):
        out = stack(x)[0]
    same = (out == x).flatten(1).all(1).float().mean().item()
    assert same == pytest.approx(0.9**6, abs=0.28)  # both updates of three blocks dropped


def test_heads_do_not_mix():
    attention, x = Attention(8, 2).double(), normal(1, 3, 8)
    heads = attention.split(x)
    assert torch.equal(heads[0, 0], x[0, :, :4]) and torch.equal(heads[0, 1], x[0, :, 4:])


def test_under_a_causal_mask_later_tokens_change_nothing_earlier():
    stack, x = tower(), normal(1, 5, 16)
    other = x.clone()
    other[:, 3] += normal(16, seed=1)
    difference = (stack(x, CAUSAL)[0] - stack(other, CAUSAL)[0]).abs().amax(-1)[0]
    assert not difference[:3].any() and (difference[3:] > 1e-3).all()
    free = (stack(x)[0] - stack(other)[0]).abs().amax(-1)[0]
    assert (free > 1e-6).all()


def test_layers_are_the_stream_after_each_block():
    stack, x = tower(), normal(2, 5, 16)
    out, (last, first), _ = stack(x, PADDED, layers=(2, 0))
    assert torch.equal(out, last)
    assert torch.equal(first, stack.blocks[0](x, PADDED))
    assert torch.equal(stack.blocks[2](stack.blocks[1](first, PADDED), PADDED), out)
    assert torch.equal(stack(x, PADDED)[0], out)  # asking changes nothing


def test_a_block_can_be_recomputed_from_its_attention():
    stack, x = tower(), normal(2, 5, 16)
    out, (before,), (second, last) = stack(x, CAUSAL, layers=(1,), attention=(1, 2))
    assert second.shape == last.shape == (2, 4, 5, 5) and not torch.equal(second, last)
    block = stack.blocks[2]
    values = block.attention.split(block.attention.value(block.norm_attention(before)))
    middle = before + block.attention.out((last @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(middle + block.mlp(block.norm_mlp(middle)), out)


def test_gradients_of_a_block_are_exact():
    torch.manual_seed(0)
    block = Block(8, 2, 12, activation="quick_gelu", epsilon=1e-5).double()
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    assert torch.autograd.gradcheck(lambda x: block(x, mask), (normal(1, 3, 8).requires_grad_(),))


def test_weights_that_write_into_the_stream_shrink_with_depth():
    torch.manual_seed(0)
    width, depth = 64, 8
    block = Transformer(width, depth, 4, 256, activation="gelu", epsilon=1e-5).blocks[5]
    into_stream = width**-0.5 * (2 * depth) ** -0.5
    assert block.attention.query.weight.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert block.attention.out.weight.std().item() == pytest.approx(into_stream, rel=0.05)
    assert block.mlp.down.weight.std().item() == pytest.approx(into_stream, rel=0.05)
    assert not block.mlp.up.bias.any()


@pytest.mark.parametrize(
    ("name", "at_one"),
    [("gelu", 0.8413447), ("gelu_tanh", 0.8411920), ("quick_gelu", 1 / (1 + math.exp(-1.702)))],
)
def test_activations(name, at_one):
    assert make_activation(name)(torch.tensor(1.0)).item() == pytest.approx(at_one, abs=1e-6)


def test_the_attention_pool_is_blind_to_order_and_not_to_content():
    torch.manual_seed(0)
    pool, x = AttentionPool(16, 4, 24, activation="gelu", epsilon=1e-5).double(), normal(2, 5, 16)
    torch.testing.assert_close(pool(x[:, [4, 2, 0, 1, 3]]), pool(x))
    other = x.clone()
    other[:, 2] += 1
    assert ((pool(other) - pool(x)).abs().amax(1) > 1e-3).all()
    torch.testing.assert_close(pool(x), torch.cat([pool(row[None]) for row in x]))
