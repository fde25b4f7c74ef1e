"""Captions in one spelling: Unicode composed, entities and tags of HTML gone, one space where there were several."""

import html
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diptych.curate.reasons import kept, with_column, with_reason
from diptych.verbs import AbstractCurator

NO_TEXT = "no text"
"""Reason of rows without a caption, or with nothing but blanks in it."""

# Control characters, soft hyphen, zero-width space, marks and overrides of direction, byte order mark. The joiners U+200C and U+200D stay:
# Persian, Hindi and emoji need them.
_UNSEEN = "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff]"
_BLANKS = r"[\s\p{Z}\x85]+"
_TAGS = r"</?[A-Za-z][^<>]*>|<!--[^<>]*-->"


@dataclass(frozen=True)
class NormaliseConfig:
    """What is done to captions.

    Attributes:
        on: Whether anything is.
        entities: `&amp;` becomes `&`.
        tags: Tags of HTML are taken out, what stands between them stays.
        form: Unicode normal form; NFKC also makes full-width letters and ligatures plain.
    """

    on: bool = True
    entities: bool = True
    tags: bool = True
    form: str = "NFC"


class Normaliser(AbstractCurator):
    """Changes captions; a caption of which nothing is left drops its row."""

    def __init__(self, config: NormaliseConfig = NormaliseConfig()) -> None:
        self.config = config

    def curate(self, table: pa.Table) -> pa.Table:
        """Return the table with captions in one spelling."""
        stays = pa.array(kept(table))
        texts = table["caption"].combine_chunks().cast(pa.string())
        changed = self.normalise(texts.filter(stays))
        table = with_column(table, "caption", pc.replace_with_mask(texts, stays, changed))
        return with_reason(table, blank(table["caption"]), NO_TEXT)

    def normalise(self, texts: pa.Array) -> pa.Array:
        """Return texts in one spelling, nulls as they are."""
        if self.config.entities:
            texts = _unescape(texts)
        if self.config.tags:
            texts = pc.replace_substring_regex(texts, _TAGS, " ")
        texts = pc.utf8_normalize(texts, form=self.config.form)
        texts = pc.replace_substring_regex(pc.replace_substring_regex(texts, _UNSEEN, ""), _BLANKS, " ")
        return pc.utf8_trim_whitespace(texts)


def blank(texts: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return which texts are null or hold nothing but blanks."""
    trimmed = pc.utf8_trim_whitespace(texts)
    return np.asarray(pc.fill_null(pc.equal(trimmed, ""), True).to_numpy(zero_copy_only=False))


def _unescape(texts: pa.Array) -> pa.Array:
    escaped = pc.fill_null(pc.match_substring(texts, "&"), False)
    plain = [html.unescape(text) for text in texts.filter(escaped).to_pylist()]
    # `&#xd83d;` is a number that is no character: unescape gives U+FFFD for it, so all of these are valid.
    return pc.replace_with_mask(texts, escaped, pa.array(plain, pa.string()))
