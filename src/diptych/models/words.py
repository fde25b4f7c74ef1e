"""What a word does to the embedding of its text, and vectors in the place of words."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diptych.data.text_changes import stop_words
from diptych.data.tokenizer import Tokenizer
from diptych.data.words import Placed, Span, UniversalWord, placed_words, with_word, word_spans
from diptych.models.dual import DualEncoder, normalise
from diptych.models.embedding import embed_texts
from diptych.types import Tokens, map_tensors

UNKNOWN = "[UNK]"
"""Stands for an unknown word: one token in tokenizers of the BERT family, elsewhere the tokens of this string, as in the code of Fang et al. 2025."""

_TOGETHER = 512
"""Texts asked about at a time, each some ten times."""

Embed = Callable[[list[str]], Float[Tensor, "n d"]]


def word_importance(
    embed: Embed, texts: Sequence[str], spans: Sequence[Sequence[Span]]
) -> list[Float[Tensor, " words"]]:
    """Return how much each word matters to the embedding of its text: KL(softmax(f(text)) || softmax(f(text without the word))), >= 0.

    Args:
        embed: f, from texts to L2-normalised embeddings.
        texts: Any.
        spans: The words of each text that are asked about; `UNKNOWN` takes the place of one at a time.

    Source: Fang et al. 2025, section 3.3, after Li et al. 2020 (BERT-Attack).
    """
    counts = [len(own) for own in spans]
    without = [with_word(text, span, UNKNOWN) for text, own in zip(texts, spans, strict=True) for span in own]
    logs = embed([*texts, *without]).double().log_softmax(-1)
    clean = logs[: len(texts)].repeat_interleave(torch.tensor(counts, dtype=torch.int64), 0)
    return list((clean.exp() * (clean - logs[len(texts) :])).sum(-1).split(counts))


def key_words(embed: Embed, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[int | None]:
    """Return which word of each text matters most to its embedding, see `word_importance`; None where no word is asked about."""
    return [int(score.argmax()) if len(score) else None for score in word_importance(embed, texts, spans)]


def attacked_places(model: DualEncoder, texts: Sequence[str], language: str) -> list[Span | None]:
    """Return where a universal word goes in each text: in place of the word that matters most to the model and is no stop word.

    Args:
        model: Says what matters; equal texts are asked about once.
        texts: Any.
        language: Of the stop words, ISO 639-1.
    """
    spared, distinct = stop_words(language), list(dict.fromkeys(texts))
    found: dict[str, Span | None] = {}
    for start in range(0, len(distinct), _TOGETHER):
        some = distinct[start : start + _TOGETHER]
        spans = [word_spans(text, spared=spared) for text in some]
        keys = key_words(partial(embed_texts, model), some, spans)
        found |= {text: None if key is None else own[key] for text, own, key in zip(some, spans, keys, strict=True)}
    return [found[text] for text in texts]


def reworded(texts: Sequence[str], places: Sequence[Span | None], word: UniversalWord) -> list[str]:
    """Return the texts with the word in these places; as they are where there is none."""
    return [
        text if place is None else with_word(text, place, word.word) for text, place in zip(texts, places, strict=True)
    ]


@dataclass(frozen=True)
class Slots:
    """Texts in which one token stands for a word that is to come.

    Attributes:
        tokens: The texts. Of the word that is replaced the first token is kept, as the slot; others are dropped.
        place: Of the slot in each text.
    """

    tokens: Tokens
    place: Int64[Tensor, " n"]


def word_slots(tokenizer: Tokenizer, texts: Sequence[str], words: Sequence[Placed]) -> Slots:
    """Return texts with a slot in place of one word each."""
    dropped = [set(word.tokens[1:]) for word in words]
    sequences = [
        [number for place, number in enumerate(ids) if place not in gone]
        for ids, gone in zip(tokenizer.sequences(texts), dropped, strict=True)
    ]
    return Slots(tokenizer.pad(sequences, tokenizer.keys(texts)), torch.tensor([word.tokens[0] for word in words]))


class KeyWords:
    """The word of each text that matters most to a model; looked for when first asked about, and once."""

    def __init__(self, model: DualEncoder, texts: Iterable[str]) -> None:
        """Note texts under the keys that the model's tokenizer gives them, as in `Tokens.key`."""
        known = sorted({model.tokenizer.clean(text) for text in texts})
        self._model = model
        self._texts = dict(zip(model.tokenizer.keys(known).tolist(), known, strict=True))
        self._found: dict[int, Placed] = {}

    def slots(self, keys: Sequence[int]) -> Slots:
        """Return the texts with a slot in place of that word."""
        tokenizer = self._model.tokenizer
        if fresh := [key for key in dict.fromkeys(keys) if key not in self._found]:
            texts = [self._texts[key] for key in fresh]
            words = [placed_words(tokenizer, text) for text in texts]
            spans = [[word.span for word in own] for own in words]
            places = key_words(partial(embed_texts, self._model), texts, spans)
            self._found |= {key: own[place or 0] for key, own, place in zip(fresh, words, places, strict=True)}
        return word_slots(tokenizer, [self._texts[key] for key in keys], [self._found[key] for key in keys])


def embed_slots(model: DualEncoder, slots: Slots, vector: Float[Tensor, " e"]) -> Float[Tensor, "n d"]:
    """Return the L2-normalised embeddings of texts with a vector in their slots, with gradient to it.

    Raises:
        ConfigError: If the text tower does not show its embeddings of tokens.
    """
    slots = map_tensors(lambda tensor: tensor.to(model.device), slots)
    tokens = slots.tokens
    is_slot = torch.arange(tokens.ids.shape[1], device=model.device) == slots.place[:, None]
    vectors = torch.where(is_slot[..., None], vector, model.text.token_embeddings(tokens.ids))
    return normalise(model.text_head(model.text(tokens.ids, tokens.mask, context=vectors, context_start=0)))


def nearest_row(vector: Float[Tensor, " e"], table: Float[Tensor, "v e"]) -> int:
    """Return which row of a table is nearest to a vector, by L2."""
    return int((table - vector).norm(dim=1).argmin())
