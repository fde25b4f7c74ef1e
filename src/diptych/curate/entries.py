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
from diptych.curate.match import Matcher
from diptych.curate.metadata import build_metadata, words_of
from diptych.curate.reasons import kept, with_column, with_reason
from diptych.errors import ConfigError
from diptych.verbs import AbstractCurator, AbstractSurveyor

UNMATCHED, NO_LIST, BALANCED = "no entry", "no word list for its language", "entries over the threshold"


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
    """How many captions an entry keeps. One of threshold, tail share and size is given; the others are None.

    Attributes:
        on: Whether frequent entries lose captions.
        threshold: Captions that each entry keeps in expectation.
        tail_share: Share of all matches that belong to entries below the threshold, which follows.
        size: Pairs kept in expectation; the threshold follows, from some fifty readings of all matches. For one language.
        online: Drop nothing; write the column `chance` only, for draws that are repeated in every epoch.
        seed: Of the draws.
    """

    on: bool = True
    threshold: float | None = None
    tail_share: float | None = 0.06
    size: float | None = None
    online: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.threshold, self.tail_share, self.size).count(None) != 2:
            raise ConfigError(
                "Give one of balance.threshold, balance.tail_share and balance.size, and None for the others; they are "
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

    def __init__(self, entries: Mapping[str, Sequence[str]], config: MatchConfig = MatchConfig()) -> None:
        """Make the curator.

        Args:
            entries: Word list by language, as `word_lists` gives them.
            config: The rest.
        """
        self.config = config
        self._matchers = {code: Matcher(own, unspaced=config.unspaced) for code, own in entries.items()}

    def curate(self, table: pa.Table) -> pa.Table:
        """Return the table with matches, rows without any dropped."""
        alive = kept(table)
        spoken = list_languages(table, tuple(self._matchers), self.config.anchor)
        rows, counts, ids = [], [], []
        for code, matcher in self._matchers.items():
            here = np.flatnonzero(alive & (spoken == code))
            texts = table["caption"].take(here).combine_chunks().cast(pa.string())
            found = matcher(pc.utf8_lower(texts) if self.config.fold_case else texts)
            rows.append(here)
            counts.append(np.diff(found.offsets.to_numpy()))
            ids.append(found.values.to_numpy())
        matches = _lists(table.num_rows, rows, counts, ids)
        table = with_column(table, "matches", matches)
        table = with_reason(table, spoken == "", NO_LIST)
        return with_reason(table, np.diff(matches.offsets.to_numpy()) == 0, UNMATCHED) if self.config.need else table


def _lists(count: int, rows: list[np.ndarray], counts: list[np.ndarray], ids: list[np.ndarray]) -> pa.ListArray:
    """Return one list per row from those of some rows each, which come in any order; empty ones for the rest."""
    row, number = np.concatenate(rows), np.concatenate(counts)
    length = np.zeros(count, np.int64)
    length[row] = number
    order = np.argsort(np.repeat(row, number), kind="stable")
    values = np.concatenate(ids)[order]
    ends = np.concatenate([[0], length.cumsum()])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values, pa.int32()))


def list_languages(table: pa.Table, codes: Sequence[str], anchor: str) -> np.ndarray:
    """Return whose word list each row takes: the anchor's if there is no other, else its language's; empty if that has none."""
    if len(codes) == 1:
        return np.full(table.num_rows, anchor, object)
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
            anchor: Language whose threshold is given.

        Raises:
            ConfigError: If a size is wanted of several languages.
        """
        if config.size is not None and len(sizes) > 1:
            raise ConfigError(
                f"balance.size is for one word list; there are some for {', '.join(sizes)}. Give a threshold or a tail share."
            )
        self.sizes, self.config, self.anchor = dict(sizes), config, anchor

    def survey(self, table: pa.Table) -> pa.Table:
        """Return in how many rows each entry stands, those that stand somewhere; with a size wanted, the matches themselves."""
        table = table.filter(pa.array(kept(table)))
        if self.config.size is not None:
            return pa.table({"matches": table["matches"]})
        spoken, parts = list_languages(table, tuple(self.sizes), self.anchor), []
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
            assert self.config.tail_share is not None
            share = self.config.tail_share
            return {code: float(threshold_for_share(own, share)) if own.any() else 1.0 for code, own in totals.items()}
        if len(totals) == 1:
            return {self.anchor: threshold}
        return language_thresholds(totals, threshold, anchor=self.anchor)

    def informed(self, merged: pa.Table) -> AbstractCurator:
        """Return the curator that draws."""
        chances = {}
        for code, size in self.sizes.items():
            own, counts = merged.filter(pc.equal(merged["language"], code)), np.zeros(size, np.int64)
            counts[own["entry"].to_numpy()] = own["count"].to_numpy()
            chances[code] = entry_probabilities(counts, own["threshold"][0].as_py()) if own.num_rows else np.ones(size)
        return _Draw(chances, self.config, self.anchor)


class _Draw(AbstractCurator):
    """Adds the column `chance`, and drops the rows that are not drawn."""

    def __init__(
        self, probabilities: Mapping[str, Float64[np.ndarray, " _entries"]], config: BalanceConfig, anchor: str
    ) -> None:
        self._probabilities, self._config, self._anchor = dict(probabilities), config, anchor

    def curate(self, table: pa.Table) -> pa.Table:
        spoken, chance = list_languages(table, tuple(self._probabilities), self._anchor), np.zeros(table.num_rows)
        for code, probabilities in self._probabilities.items():
            here = spoken == code
            chance[here] = keep_probabilities(table["matches"].filter(pa.array(here)), probabilities)
        chance[~kept(table)] = np.nan
        table = with_column(table, "chance", pa.array(chance, from_pandas=True))
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
