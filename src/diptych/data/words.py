"""Words of a text: where they stand, which tokens they are, which tokens are words, and another word in their place.

A word is what white space separates, without the punctuation around it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from diptych.data.text_changes import WORD, stop_words
from diptych.data.tokenizer import Tokenizer
from diptych.errors import ConfigError

Span = tuple[int, int]
"""The first character of a word, and the one behind its last."""


@dataclass(frozen=True)
class UniversalWord:
    """One word that takes the place of a word in every text.

    Attributes:
        word: The word.
        language: Whose stop words stay where they are, ISO 639-1.

    Raises:
        ConfigError: If it is no word, or the language has no stop words.
    """

    word: str
    language: str = "en"

    def __post_init__(self) -> None:
        stop_words(self.language)
        if not WORD.fullmatch(self.word):
            raise ConfigError(
                f"A word has letters or digits, and no space or punctuation around it; not {self.word!r}."
            )


@dataclass(frozen=True)
class Placed:
    """A word of a text, and its tokens.

    Attributes:
        span: In the cleaned text.
        tokens: Places in the sequence of ids, special ones counted; at least one.
    """

    span: Span
    tokens: tuple[int, ...]


def word_spans(text: str, *, spared: frozenset[str] = frozenset()) -> list[Span]:
    """Return where the words of a text stand.

    Args:
        text: Any.
        spared: Words that are left out, lower case.
    """
    return [found.span() for found in WORD.finditer(text) if found[0].lower() not in spared]


def with_word(text: str, span: Span, word: str) -> str:
    """Return the text with another word in this place; everything around it stays."""
    return text[: span[0]] + word + text[span[1] :]


def placed_words(tokenizer: Tokenizer, text: str) -> list[Placed]:
    """Return the words that a model reads of a text: those with tokens before its longest length. The whole text, where no word has any."""
    offsets, cleaned = tokenizer.offsets(text), tokenizer.clean(text)

    def tokens_of(span: Span) -> tuple[int, ...]:
        first = span[0] - cleaned[: span[0]].endswith(" ")  # some tokenizers give the space before a word a token
        return tuple(place for place, (start, end) in enumerate(offsets) if start < span[1] and end > first)

    found = [Placed(span, places) for span in word_spans(cleaned) if (places := tokens_of(span))]
    return found or [Placed((0, len(cleaned)), tokens_of((0, len(cleaned))))]


def whole_words(tokenizer: Tokenizer, *, spared: frozenset[str] = frozenset()) -> Mapping[int, str]:
    """Return the ids that are a whole word each, with the word: two letters or more, which tokenise to just that id.

    Args:
        tokenizer: Of any kind.
        spared: Words that are left out, lower case.

    Raises:
        ConfigError: If there is none, as with single characters or bytes for tokens.
    """
    decoded = tokenizer.engine.decode_batch([[number] for number in range(tokenizer.size)])
    # "</w>" is CLIP's mark of a word's end, which its decoder leaves.
    read = ((number, text.replace("</w>", "").strip()) for number, text in enumerate(decoded))
    words = {number: text for number, text in read if len(text) > 1 and text.isalpha() and text.lower() not in spared}
    special = len([token for token in (tokenizer.policy.begin, tokenizer.policy.end) if token is not None])
    begin = int(tokenizer.policy.begin is not None)
    sequences = tokenizer.sequences(list(words.values()))
    found = {
        number: word
        for (number, word), ids in zip(words.items(), sequences, strict=True)
        if len(ids) == 1 + special and ids[begin] == number
    }
    if not found:
        raise ConfigError(
            "None of the tokens of this model's tokenizer is a whole word. Use a model whose tokenizer has words."
        )
    return found


def random_word(tokenizer: Tokenizer, word: UniversalWord, *, seed: int = 0) -> UniversalWord:
    """Return another one of the `whole_words` by chance, stop words left out: the baseline of a word that was learnt."""
    others = list(whole_words(tokenizer, spared=stop_words(word.language) | {word.word.lower()}).values())
    return UniversalWord(others[int(np.random.default_rng(seed).integers(len(others)))], word.language)
