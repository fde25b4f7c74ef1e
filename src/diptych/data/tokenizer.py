"""Text to token ids: one wrapper around `tokenizers`, with the policy that a checkpoint must carry."""

import hashlib
import html
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from diptych.errors import TextError
from diptych.types import Tokens


@dataclass(frozen=True)
class TextPolicy:
    """How strings become ids. Travels inside every checkpoint.

    Attributes:
        length: Longest sequence, special tokens included; longer texts are cut, their end token kept.
        clean: `whitespace` folds white space; `lower` also unescapes HTML, straightens quotes and lower-cases (CLIP);
            `canonicalize` lower-cases and drops punctuation (SigLIP).
        begin: Id put first, or None.
        end: Id put last, or None.
        pad: Id that fills up.
        pad_to: `longest` pads to the longest of the batch, `length` always to `length` (for towers that look at padding).
    """

    length: int = 32
    clean: Literal["whitespace", "lower", "canonicalize"] = "whitespace"
    begin: int | None = 2
    end: int | None = 1
    pad: int = 0
    pad_to: Literal["longest", "length"] = "longest"


class Tokenizer:
    """A `tokenizers` engine and a text policy."""

    def __init__(self, engine: Engine, policy: TextPolicy) -> None:
        self.engine = engine
        self.policy = policy
        engine.no_truncation()
        engine.no_padding()

    @property
    def size(self) -> int:
        """Return the number of ids."""
        return int(self.engine.get_vocab_size())

    def clean(self, text: str) -> str:
        """Return the text as the tokenizer will see it."""
        if self.policy.clean == "lower":
            text = html.unescape(html.unescape(text)).translate(_STRAIGHT_QUOTES).lower()
        elif self.policy.clean == "canonicalize":
            text = text.replace("_", " ").translate(_NO_PUNCTUATION).lower()
        return re.sub(r"\s+", " ", text).strip()

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return how many ids each text needs, special tokens included, before any cut."""
        special = (self.policy.begin is not None) + (self.policy.end is not None)
        return [len(encoding.ids) + special for encoding in self._encode(texts)]

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Return padded ids.

        Raises:
            TextError: If a text has no content, or holds half a surrogate pair.
        """
        return self.pad(self.sequences(texts), self.keys(texts))

    def keys(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the hash of each text as the tokenizer sees it."""
        return hash_strings(map(self.clean, texts))

    def sequences(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, special tokens included, cut to the longest length; see `__call__`."""
        begin = [] if self.policy.begin is None else [self.policy.begin]
        end = [] if self.policy.end is None else [self.policy.end]
        room = self.policy.length - len(begin) - len(end)
        return [begin + encoding.ids[:room] + end for encoding in self._encode(texts)]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Return which characters of the cleaned text each id of `sequences` stands for: first, and behind the last; (0, 0) for special tokens."""
        begin, end = ([] if token is None else [(0, 0)] for token in (self.policy.begin, self.policy.end))
        spans: list[tuple[int, int]] = self._encode([text])[0].offsets
        return begin + spans[: self.policy.length - len(begin) - len(end)] + end

    def pad(self, sequences: Sequence[Sequence[int]], keys: torch.Tensor) -> Tokens:
        """Return what `sequences` and `keys` gave as one record."""
        longest = self.policy.length if self.policy.pad_to == "length" else max(map(len, sequences))
        ids = torch.full((len(sequences), longest), self.policy.pad)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = True
        return Tokens(ids, mask, keys)

    def _encode(self, texts: Sequence[str]) -> list:  # type: ignore[type-arg]  # tokenizers.Encoding is untyped
        cleaned = [self.clean(text) for text in texts]
        if "" in cleaned:
            row = cleaned.index("")
            raise TextError(
                f"Text {row} of {len(texts)} is empty ({texts[row]!r}). Give every text a word, or drop the row."
            )
        try:
            return self.engine.encode_batch(cleaned, add_special_tokens=False)
        except TypeError as error:
            raise TextError(
                "A text holds half a surrogate pair, as undecodable bytes on a command line do. Write it in UTF-8."
            ) from error

    def to_json(self) -> str:
        """Return the engine as the text of a tokenizer.json."""
        return str(self.engine.to_str())

    @classmethod
    def from_json(cls, text: str, policy: TextPolicy) -> "Tokenizer":
        """Return the tokenizer that `to_json` wrote."""
        return cls(Engine.from_str(text), policy)

    @classmethod
    def train(cls, texts: Iterable[str], *, vocabulary: int = 4096, length: int = 32) -> "Tokenizer":
        """Return a byte-level BPE learnt from `texts`; any script works, no id is ever unknown.

        Args:
            texts: Strings to learn from, a few thousand suffice.
            vocabulary: Number of ids, at least 259 (three special ones and 256 bytes).
            length: Longest sequence, special tokens included.
        """
        engine = Engine(models.BPE())
        engine.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        engine.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            # The end is not id 2: transformers' CLIP takes that id for a sign of its own first release.
            special_tokens=["<pad>", "<end>", "<begin>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        engine.train_from_iterator(texts, trainer)
        return cls(engine, TextPolicy(length=length))


_STRAIGHT_QUOTES = str.maketrans("‘’‚‛“”„‟", "'" * 4 + '"' * 4)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def hash_strings(strings: Iterable[str]) -> torch.Tensor:
    """Return one int64 per string, equal exactly when the strings are (up to a 2^-64 collision), the same in every process."""
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in strings)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)
