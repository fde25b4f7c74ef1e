"""Prompts with learnt vectors in place of words: "[begin][v1]...[vc] dog.[end]", for methods that learn prompts on frozen towers."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diptych.data.tokenizer import TextPolicy, Tokenizer
from diptych.errors import TextError
from diptych.losses.full import full
from diptych.models.by_length import GROUP_COST, cut, lengths_of
from diptych.models.dual import DualEncoder
from diptych.models.transformer import plain_up_to
from diptych.types import Tokens


def slotted(tokenizer: Tokenizer, texts: Sequence[str], count: int) -> Tokens:
    """Return the ids of texts with `count` slots before the words, for a tower's `context`.

    They stand behind the token that begins every text; at the front where none does, as in SigLIP.

    Raises:
        TextError: If slots and words are more than a text may have; names the text.
    """
    policy, start = tokenizer.policy, _first_slot(tokenizer.policy)
    for text, length in zip(texts, tokenizer.lengths(texts), strict=True):
        if length + count > policy.length:
            raise TextError(
                f"{text!r} needs {length} tokens and the learnt prompt {count}; this model takes {policy.length} together. Shorten the name, "
                "or learn fewer vectors."
            )
    slots = [policy.pad] * count
    sequences = [ids[:start] + slots + ids[start:] for ids in tokenizer.sequences(texts)]
    return tokenizer.pad(sequences, tokenizer.keys(texts))


def _first_slot(policy: TextPolicy) -> int:
    return 0 if policy.begin is None else 1


def prompted_texts(model: DualEncoder, texts: Tokens, context: Float[Tensor, "b c w"]) -> Float[Tensor, "b k d"]:
    """Return the L2-normalised embedding of every text with every context in its slots, with gradient to the context.

    Args:
        model: Its text tower is asked b k times, on a CPU in groups of texts of similar length.
        texts: k of them, from `slotted`.
        context: As many vectors as there are slots.
    """
    b, lengths, start = len(context), lengths_of(texts.mask), _first_slot(model.tokenizer.policy)

    def ask(rows: Int64[Tensor, " some"], length: int) -> Float[Tensor, "b some d"]:
        ids, mask = texts.ids[rows, :length], texts.mask[rows, :length]
        with plain_attention(ids):
            vectors = context.repeat_interleave(len(rows), 0)
            output = model.text(ids.repeat(b, 1), mask.repeat(b, 1), context=vectors, context_start=start)
        embedded: Tensor = F.normalize(full(model.text_head(output)), dim=-1).unflatten(0, (b, len(rows)))
        return embedded

    order = lengths.argsort(stable=True)
    if not (model.texts_by_length and texts.ids.device.type == "cpu" and model.text.by_row):
        return ask(order, texts.ids.shape[1])[:, order.argsort()]
    ends = cut((lengths[order] * b).tolist(), GROUP_COST)
    parts = [ask(order[start:end], int(lengths[order[end - 1]])) for start, end in pairwise([0, *ends])]
    return torch.cat(parts, 1)[:, order.argsort()]


def plain_attention(ids: Int64[Tensor, "k t"]) -> AbstractContextManager[None]:
    """Return the context in which attention over short texts on a CPU is two matmuls and a softmax, in every tower; equal but for rounding.

    There the gradient of the fused kernel takes several times as long: for 112 texts of 12 tokens through MiniLM in bf16, one thread, 0.35 s
    of 0.45 s a step; with matmuls 0.08 s of 0.18 s.
    """
    short = ids.device.type == "cpu" and ids.shape[1] <= plain_up_to(ids.device, torch.bfloat16)
    return sdpa_kernel(SDPBackend.MATH) if short else nullcontext()
