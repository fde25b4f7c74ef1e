"""Steps of curation by a word list: which entries stand in a caption, and fewer captions of frequent entries."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64, Int64

from diptych.curate.balance import (
    count_entries,
    entry_probabilities,
    keep_probabilities,
    language_thresholds,
    row_uniforms,
    threshold_for_share,
    threshold_for_size,
)
from diptych.curate.match import Matcher, match_batches
from diptych.curate.metadata import build_metadata, words_of
from diptych.curate.reasons import kept, with_column, with_reason
from diptych.errors import ConfigError
from diptych.verbs import AbstractCurator, AbstractSurveyor

UNMATCHED, NO_LIST, BALANCED = "no entry", "no word list for its language", "entries over the threshold"

TAIL_SHARE = 0.06
"""What the paper of MetaCLIP keeps when a pool grows."""

_MATCHES = pa.list_(pa.int32())
_BATCH = 1 << 16  # texts that one process matches at once


@dataclass(frozen=True)
class MatchConfig:
    """The word list.

    Attributes:
        on: Whether captions are matched.
        words: Lists as `diptych.curate.metadata.words_of` knows them, the most important first. `de=words:de` is one for captions in German; without
            a code it is for all captions, or for those in `anchor` where other languages have lists.
        budget: Most entries per language.
        fold_case: `Cat` matches `cat`. Ready lists are in lower case; the papers' lists have case, and there it counts.
        unspaced: Match scripts written without spaces, too.
        need: Drop captions without any entry.
        anchor: Language whose threshold is given when there are several.
    """

    on: bool = True
    words: tuple[str, ...] = ("words:en",)
    budget: int | None = 500_000
    fold_case: bool = True
    unspaced: bool = True
    need: bool = True
    anchor: str = "en"


@dataclass(frozen=True)
class BalanceConfig:
    """How many captions an entry keeps: by a threshold, by the tail's share, or by size; 6 % of all matches are the tail's where none is given.

    Attributes:
        on: Whether frequent entries lose captions.
        threshold: Captions that each entry keeps in expectation.
        tail_share: Share of all matches that belong to entries below the threshold, which follows; 0.06 where neither of the others is given.
        size: Pairs kept in expectation; the threshold follows, from some fifty readings of all matches. For one language.
        online: Drop nothing; write the column `chance` only, for draws that are repeated in every epoch.
        seed: Of the draws.
    """

    on: bool = True
    threshold: float | None = None
    tail_share: float | None = None
    size: float | None = None
    online: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.threshold, self.tail_share, self.size).count(None) < 2:
            raise ConfigError(
                "Give one of threshold, tail_share and size, and leave out the others; balance has "
                f"{self.threshold}, {self.tail_share} and {self.size}."
            )


def word_lists(config: MatchConfig) -> dict[str, tuple[str, ...]]:
    """Return the entries by language, sorted; `anchor` has those without a code.

    Raises:
        ConfigError: If a list is not known, or the anchor has none.
    """
    specs: dict[str, list[str]] = {}
    for spec in config.words:
        code, _, rest = spec.partition("=")
        named = len(code) == 2 and bool(rest)
        specs.setdefault(code if named else config.anchor, []).append(rest if named else spec)
    if config.anchor not in specs:
        raise ConfigError(
            f"match.words has lists for {', '.join(specs) or 'no language'}, and none for match.anchor, {config.anchor!r}. Add one, or name "
            "another anchor."
        )
    return {
        code: build_metadata({spec: _words(spec, config) for spec in own}, budget=config.budget).entries
        for code, own in specs.items()
    }


def _words(spec: str, config: MatchConfig) -> list[str]:
    return [word.lower() for word in words_of(spec)] if config.fold_case else words_of(spec)


class Matching(AbstractCurator):
    """Adds the column `matches`: ids of the entries in each caption, in the list of its language."""

    def __init__(
        self, entries: Mapping[str, Sequence[str]], config: MatchConfig = MatchConfig(), *, processes: int = 1
    ) -> None:
        """Make the curator.

        Args:
            entries: Word list by language, as `word_lists` gives them.
            config: The rest.
            processes: That match a table, see `match_batches`; for large ones.
        """
        self.config, self.processes = config, processes
        self._matchers = {code: Matcher(own, unspaced=config.unspaced) for code, own in entries.items()}

    def curate(self, table: pa.Table) -> pa.Table:
        """Return the table with matches, rows without any dropped."""
        alive, spoken = kept(table), list_languages(table, tuple(self._matchers))
        rows, found = [], []
        for code, matcher in self._matchers.items():
            here = alive & (spoken == code)
            rows.append(np.flatnonzero(here))
            found += self._match(matcher, table["caption"].filter(pa.array(here)))
        row = np.concatenate(rows)
        place = np.full(table.num_rows, len(row))  # where in `found`, whose last list is for all others
        place[row] = np.arange(len(row))
        matches = pa.chunked_array([*found, pa.array([[]], _MATCHES)]).take(pa.array(place))
        table = with_column(table, "matches", matches)
        table = with_reason(table, spoken == "", NO_LIST)
        none = pc.equal(pc.list_value_length(matches), 0).to_numpy()
        return with_reason(table, none, UNMATCHED) if self.config.need else table

    def _match(self, matcher: Matcher, texts: pa.ChunkedArray) -> list[pa.ListArray]:
        texts = pc.utf8_lower(texts) if self.config.fold_case else texts
        batches = pa.table({"text": texts}).to_batches(max_chunksize=_BATCH)
        return [batch["matches"] for batch in match_batches(matcher, batches, "text", processes=self.processes)]


def list_languages(table: pa.Table, codes: Sequence[str]) -> np.ndarray:
    """Return whose word list each row takes: the only one if there is no other, else its language's; empty if that has none."""
    if len(codes) == 1:
        return np.full(table.num_rows, codes[0], object)
    spoken = table["language"] if "language" in table.column_names else pa.nulls(table.num_rows, pa.string())
    known = pc.is_in(spoken, value_set=pa.array(codes))
    return np.asarray(pc.if_else(known, spoken, "").to_pylist(), object)


class Balance(AbstractSurveyor):
    """Counts entries over all rows, then keeps each row with its chance."""

    def __init__(
        self, sizes: Mapping[str, int], config: BalanceConfig = BalanceConfig(), *, anchor: str = "en"
    ) -> None:
        """Make the surveyor.

        Args:
            sizes: How many entries the word list of each language has.
            config: What is kept.
            anchor: Language whose threshold is given, where there are several.

        Raises:
            ConfigError: If a size is wanted of several languages.
        """
        if config.size is not None and len(sizes) > 1:
            raise ConfigError(
                f"balance.size is for one word list; there are some for {', '.join(sizes)}. Give a threshold or a tail share."
            )
        self.sizes, self.config = dict(sizes), config
        self.anchor = anchor if len(sizes) > 1 else next(iter(sizes))

    def survey(self, table: pa.Table) -> pa.Table:
        """Return in how many rows each entry stands, those that stand somewhere; with a size wanted, the matches themselves."""
        table = table.filter(pa.array(kept(table)))
        if self.config.size is not None:
            return pa.table({"matches": table["matches"]})
        spoken, parts = list_languages(table, tuple(self.sizes)), []
        for code, size in self.sizes.items():
            counts = count_entries(table["matches"].filter(pa.array(spoken == code)), size)
            parts.append(_sparse(code, counts))
        return pa.concat_tables(parts)

    def merge(self, surveys: Iterable[pa.Table]) -> pa.Table:
        """Return the counts over all rows, and the threshold of each language.

        Raises:
            DataError: If a threshold has to follow from matches and there are none.
            ConfigError: If no threshold gives the size.
        """
        totals = {code: np.zeros(size, np.int64) for code, size in self.sizes.items()}
        for survey in surveys:
            if self.config.size is not None:
                totals[self.anchor] += count_entries(survey["matches"], self.sizes[self.anchor])
                continue
            for code, own in totals.items():
                here = survey.filter(pc.equal(survey["language"], code))
                np.add.at(own, here["entry"].to_numpy(), here["count"].to_numpy())
        thresholds = self._choose(totals, surveys)
        return pa.concat_tables(
            [
                _sparse(code, own).append_column(
                    "threshold", pa.array(np.full(np.count_nonzero(own), thresholds[code]))
                )
                for code, own in totals.items()
            ]
        )

    def _choose(
        self, totals: Mapping[str, Int64[np.ndarray, " _entries"]], surveys: Iterable[pa.Table]
    ) -> dict[str, float]:
        if self.config.size is not None:
            matches = _Column(surveys, "matches")
            return {self.anchor: threshold_for_size(matches, totals[self.anchor], self.config.size)}
        threshold = self.config.threshold
        if threshold is None:
            share = TAIL_SHARE if self.config.tail_share is None else self.config.tail_share
            several = len(totals) > 1
            return {
                code: 1.0 if several and not own.any() else float(threshold_for_share(own, share))
                for code, own in totals.items()
            }
        if len(totals) == 1:
            return {self.anchor: threshold}
        return language_thresholds(totals, threshold, anchor=self.anchor)

    def informed(self, merged: pa.Table) -> AbstractCurator:
        """Return the curator that draws."""
        thresholds = thresholds_of(merged)
        counts = {code: counts_of(merged, code, size) for code, size in self.sizes.items()}
        return _Draw({c: entry_probabilities(own, thresholds.get(c, 1.0)) for c, own in counts.items()}, self.config)


def counts_of(merged: pa.Table, code: str, size: int) -> Int64[np.ndarray, " entries"]:
    """Return in how many rows each entry of a language stands, from what `Balance.merge` gives."""
    own, counts = merged.filter(pc.equal(merged["language"], code)), np.zeros(size, np.int64)
    counts[own["entry"].to_numpy()] = own["count"].to_numpy()
    return counts


def thresholds_of(merged: pa.Table) -> dict[str, float]:
    """Return the threshold of each language that has matches, from what `Balance.merge` gives."""
    codes = pc.unique(merged["language"])
    first = pc.index_in(codes, merged["language"].combine_chunks())
    return dict(zip(codes.to_pylist(), merged["threshold"].take(first).to_pylist(), strict=True))


class _Draw(AbstractCurator):
    """Writes the column `chance` of rows without a reason, and drops those of them that are not drawn."""

    def __init__(self, probabilities: Mapping[str, Float64[np.ndarray, " _entries"]], config: BalanceConfig) -> None:
        self._probabilities, self._config = dict(probabilities), config

    def curate(self, table: pa.Table) -> pa.Table:
        spoken, chance = list_languages(table, tuple(self._probabilities)), np.zeros(table.num_rows)
        for code, probabilities in self._probabilities.items():
            here = spoken == code
            chance[here] = keep_probabilities(table["matches"].filter(pa.array(here)), probabilities)
        earlier = table["chance"] if "chance" in table.column_names else pa.scalar(None, pa.float64())
        table = with_column(table, "chance", pc.if_else(pa.array(kept(table)), pa.array(chance), earlier))
        if self._config.online:
            return table
        return with_reason(table, row_uniforms(table["key"], self._config.seed) >= chance, BALANCED)


class _Column:
    """One column of tables that are gone through again and again."""

    def __init__(self, tables: Iterable[pa.Table], name: str) -> None:
        self._tables, self._name = tables, name

    def __iter__(self) -> Iterator[pa.ChunkedArray]:
        return (table[self._name] for table in self._tables)


def _sparse(code: str, counts: Int64[np.ndarray, " entries"]) -> pa.Table:
    entry = np.flatnonzero(counts)
    return pa.table(
        {
            "language": pa.array([code] * len(entry), pa.string()),
            "entry": pa.array(entry, pa.int32()),
            "count": pa.array(counts[entry], pa.int64()),
        }
    )
