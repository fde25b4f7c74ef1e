r"""Captions that no picture needs: too short or long, markup, addresses, file names, standard phrases, hardly a letter.

Rules are regular expressions of RE2 over whole columns of text; the first one that a caption breaks is its reason.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diptych.curate.reasons import kept, with_reason
from diptych.errors import ConfigError
from diptych.verbs import AbstractCurator

SHORT, LONG, FEW_WORDS, MANY_WORDS = "too short", "too long", "too few words", "too many words"
MARKUP, ADDRESS, BOILERPLATE, LETTERS = "markup", "an address or a file name", "boilerplate", "hardly any letters"

_MARKUP = r"</?[A-Za-z][^<>]*>|&#?\w{2,8};|\[/?(?:url|img|b|i|quote)\b[^\]]*\]|\{\{|\}\}|\bfunction\s*\(|\$\(document|\bvar \w+ ?="
_ADDRESS = (
    r"^(?:(?:https?://|www\.)\S+|\S+@\S+\.\w+|\S*\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|html?|php)|(?:img|dsc|dscn|dscf|pict|p|image|photo|picture"
    r"|screen ?shot|untitled|thumbnail)[ _#-]*\d*)$"
)
_BOILERPLATE = (
    r"^(?:click|tap) (?:here|to|for)\b",
    r"^(?:image|photo|picture|no image|image not) (?:not )?available",
    r"^(?:loading|advertisement|sponsored|read more|share (?:this|on)|follow us|subscribe|sign up|log ?in|add to (?:cart|wishlist))\W*$",
    r"^default (?:image|avatar|profile)\b",
    r"\ball rights reserved\b",
    r"\bcookies?\b.{0,40}\b(?:accept|policy|consent)\b",
)


@dataclass(frozen=True)
class RulesConfig:
    """What a caption must be. The defaults are mild.

    Attributes:
        on: Whether any rule counts.
        min_chars: Characters; two ideographs can be a caption.
        max_chars: Characters.
        min_words: Runs without a blank.
        max_words: Likewise.
        min_letters: Share of letters among all characters but blanks, in [0, 1].
        markup: Drop what holds tags, entities or scripts.
        addresses: Drop what is nothing but an address or the name of a file.
        boilerplate: Regular expressions (RE2, case is ignored) of phrases that say nothing about a picture; empty for none.
    """

    on: bool = True
    min_chars: int = 2
    max_chars: int = 1000
    min_words: int = 1
    max_words: int = 256
    min_letters: float = 0.3
    markup: bool = True
    addresses: bool = True
    boilerplate: tuple[str, ...] = _BOILERPLATE

    def __post_init__(self) -> None:
        if self.min_chars > self.max_chars or self.min_words > self.max_words or not 0 <= self.min_letters <= 1:
            raise ConfigError(f"A least must not be above its most, and min_letters lies in [0, 1]; this is {self}.")


class Rules(AbstractCurator):
    """Drops rows whose caption breaks a rule."""

    def __init__(self, config: RulesConfig = RulesConfig()) -> None:
        """Make the curator.

        Raises:
            ConfigError: If a regular expression of the user's is none.
        """
        self.config = config
        for pattern in config.boilerplate:
            try:
                pc.match_substring_regex(pa.array([""]), pattern)
            except pa.ArrowInvalid as error:
                raise ConfigError(f"{pattern!r} in `boilerplate` is no regular expression of RE2: {error}") from error

    def curate(self, table: pa.Table) -> pa.Table:
        """Return the table, rows that break a rule dropped."""
        alive = np.flatnonzero(kept(table))
        for reason, broken in self._broken(table["caption"].take(alive)):
            rows = np.zeros(table.num_rows, np.bool_)
            rows[alive] = pc.fill_null(broken, True).to_numpy()
            table = with_reason(table, rows, reason)
        return table

    def _broken(self, texts: pa.ChunkedArray) -> Iterator[tuple[str, pa.ChunkedArray]]:
        """Yield each rule's reason and which texts break it."""
        config, length = self.config, pc.utf8_length(texts)
        yield SHORT, pc.less(length, config.min_chars)
        yield LONG, pc.greater(length, config.max_chars)
        texts = pc.utf8_slice_codeunits(texts, 0, config.max_chars)  # what is longer has its reason already
        number = pc.count_substring_regex(texts, r"[^\s\p{Z}]+")
        yield FEW_WORDS, pc.less(number, config.min_words)
        yield MANY_WORDS, pc.greater(number, config.max_words)
        if config.markup:
            yield MARKUP, pc.match_substring_regex(texts, _MARKUP, ignore_case=True)
        if config.addresses:
            yield ADDRESS, pc.match_substring_regex(texts, _ADDRESS, ignore_case=True)
        if config.boilerplate:  # as one expression, which RE2 reads a text for once
            any_of_them = "|".join(f"(?:{pattern})" for pattern in config.boilerplate)
            yield BOILERPLATE, pc.match_substring_regex(texts, any_of_them, ignore_case=True)
        seen = pc.count_substring_regex(texts, r"[^\s\p{Z}]")
        letters = pc.count_substring_regex(texts, r"[\p{L}\p{M}]")
        yield LETTERS, pc.less(letters.cast(pa.float64()), pc.multiply(seen.cast(pa.float64()), config.min_letters))
