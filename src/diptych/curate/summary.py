"""What became of all pairs: counts, languages, head and tail of the entries, examples; merged from what each group of parts says."""

import base64
import heapq
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diptych.curate.balance import count_entries, row_hashes
from diptych.curate.entries import list_languages
from diptych.curate.reasons import kept
from diptych.data.images import decode
from diptych.errors import ImageError

KEPT = "kept"
"""Stands for no reason where reasons are counted."""
EXAMPLES = 6
"""Per reason."""
_SHOWN = 15  # entries at the head and at the tail
_SIDE, _LONGEST = 96, 300  # pixels of a picture, characters of a caption


@dataclass(frozen=True)
class Example:
    """One pair.

    Attributes:
        key: Its name.
        caption: Its beginning.
        language: None where it is unknown.
        note: What steps have found, such as a score or the pair that it repeats.
        picture: Small WebP file in base64; None where there is none.
    """

    key: str
    caption: str
    language: str | None = None
    note: str = ""
    picture: str | None = None


@dataclass(frozen=True)
class ReasonCount:
    """How many pairs have a reason, `kept` standing for none, with a random few of them."""

    reason: str
    count: int
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class LanguageCount:
    """How many pairs are in a language (`?`: unknown), and how many of them are kept."""

    language: str
    pairs: int
    kept: int


@dataclass(frozen=True)
class EntryCount:
    """In how many pairs an entry stands, before balancing and in the end."""

    language: str
    entry: str
    before: int
    after: int


@dataclass(frozen=True)
class RankCount:
    """The entries from one rank to another, the most frequent first, and how many matches they have together."""

    first: int
    last: int
    before: int
    after: int


@dataclass(frozen=True)
class Summary:
    """The result of a run.

    Attributes:
        source: As it was named.
        parts: How many it was cut into.
        pairs: Rows that were read, one per caption, those that could not be read among them.
        samples: Rows that were written.
        shards: Names of the files they are in.
        reasons: `kept` first, then the most frequent.
        languages: The most frequent first.
        head: Entries with the most matches.
        tail: Entries with the fewest.
        ranks: The entries between, in doubling steps.
        notes: What one should know about how this came about.
    """

    source: str
    parts: int
    pairs: int
    samples: int
    shards: tuple[str, ...]
    reasons: tuple[ReasonCount, ...]
    languages: tuple[LanguageCount, ...] = ()
    head: tuple[EntryCount, ...] = ()
    tail: tuple[EntryCount, ...] = ()
    ranks: tuple[RankCount, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def kept(self) -> int:
        """Return how many pairs were kept."""
        return sum(one.count for one in self.reasons if one.reason == KEPT)


class Tally:
    """Counts the pairs of one group of parts."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        """Begin at zero.

        Args:
            sizes: Entries per language; empty where nothing is matched.
        """
        self.pairs = self.samples = 0
        self._sizes = dict(sizes)
        self._reasons: dict[str, int] = {}
        self._languages: dict[str, list[int]] = {}
        self._entries = {code: np.zeros((2, size), np.int64) for code, size in sizes.items()}
        self._best: dict[str, list[tuple[int, int, Example]]] = {}

    def add(self, table: pa.Table, images: Mapping[int, bytes], first: int) -> None:
        """Count some pairs.

        Args:
            table: With their reasons.
            images: Of some of them, by row of the source from `first` on.
            first: Number of a row.
        """
        self.pairs += table.num_rows
        reason = table["reason"].fill_null(KEPT).combine_chunks().dictionary_encode()
        names, code = reason.dictionary.to_pylist(), reason.indices.to_numpy()
        for place, name in enumerate(names):
            here = np.flatnonzero(code == place)
            self._reasons[name] = self._reasons.get(name, 0) + len(here)
            self._pick(name, table.take(here), images, first)
        alive = kept(table)
        spoken = np.asarray(table["language"].fill_null("?").to_pylist(), object)
        for language in set(spoken):
            counts = self._languages.setdefault(language, [0, 0])
            counts[0] += int((spoken == language).sum())
            counts[1] += int((alive & (spoken == language)).sum())
        if self._sizes:
            lists = list_languages(table, tuple(self._sizes))
            for language, size in self._sizes.items():
                for place, rows in enumerate((lists == language, alive & (lists == language))):
                    self._entries[language][place] += count_entries(table["matches"].filter(pa.array(rows)), size)

    def _pick(self, reason: str, table: pa.Table, images: Mapping[int, bytes], first: int) -> None:
        """Keep the examples whose hashes are lowest, which are the same however the pairs are cut."""
        best = self._best.setdefault(reason, [])
        hashes = row_hashes(table["key"], 1)
        for place in np.argsort(hashes, kind="stable")[:EXAMPLES].tolist():
            low, number = int(hashes[place]), table["number"][place].as_py()
            if len(best) == EXAMPLES and (-low, -number) <= best[0][:2]:
                break
            row = table.slice(place, 1)
            image = images.get(row["row"][0].as_py() - first)
            item = (-low, -number, _example(row.drop_columns(["row"]).to_pylist()[0], image))
            heapq.heappush(best, item) if len(best) < EXAMPLES else heapq.heapreplace(best, item)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values; entries are in `entries`."""
        return {
            "pairs": self.pairs,
            "samples": self.samples,
            "reasons": self._reasons,
            "languages": self._languages,
            "examples": {
                reason: [[-low, -number, vars(example)] for low, number, example in sorted(best, reverse=True)]
                for reason, best in self._best.items()
            },
        }

    def entries(self) -> pa.Table:
        """Return the entries that have matches."""
        parts = []
        for code, counts in self._entries.items():
            entry = np.flatnonzero(counts[0])
            language = pa.array([code] * len(entry), pa.string())
            parts.append(
                pa.table({"language": language, "entry": entry, "before": counts[0][entry], "after": counts[1][entry]})
            )
        empty = {
            "entry": pa.array([], pa.int64()),
            "before": pa.array([], pa.int64()),
            "after": pa.array([], pa.int64()),
        }
        return pa.concat_tables([pa.table({"language": pa.array([], pa.string()), **empty}), *parts])


def _example(row: Mapping[str, Any], image: bytes | None) -> Example:
    silent = ("key", "group", "number", "place", "caption", "language", "reason", "matches", "image")
    said = [
        f"{name.replace('_', ' ')} {f'{value:.3g}' if isinstance(value, float) else value}"
        for name, value in row.items()
        if name not in silent and value is not None
    ]
    return Example(row["key"], (row["caption"] or "")[:_LONGEST], row["language"], ", ".join(said), _small(image))


def _small(image: bytes | None) -> str | None:
    try:
        picture = None if image is None else decode(image)
    except ImageError:
        return None
    if picture is None:
        return None
    picture.thumbnail((_SIDE, _SIDE))
    picture.save(file := io.BytesIO(), "WEBP", quality=80)
    return base64.b64encode(file.getvalue()).decode()


def merge_tallies(
    tallies: Iterable[Mapping[str, Any]],
    entries: Iterable[pa.Table],
    lists: Mapping[str, tuple[str, ...]],
    *,
    source: str,
    parts: int,
    shards: tuple[str, ...],
    notes: tuple[str, ...],
) -> Summary:
    """Return what all groups say together.

    Args:
        tallies: `Tally.to_json` of each group, in order.
        entries: `Tally.entries` of each group.
        lists: Word lists by language.
        source: As it was named.
        parts: How many it was cut into.
        shards: Names of the files.
        notes: For the reader.
    """
    pairs = samples = 0
    reasons: dict[str, int] = {KEPT: 0}
    languages: dict[str, list[int]] = {}
    examples: dict[str, list[Any]] = {}
    for tally in tallies:
        pairs, samples = pairs + tally["pairs"], samples + tally["samples"]
        for reason, count in tally["reasons"].items():
            reasons[reason] = reasons.get(reason, 0) + count
        for language, counts in tally["languages"].items():
            old = languages.get(language, [0, 0])
            languages[language] = [old[0] + counts[0], old[1] + counts[1]]
        for reason, best in tally["examples"].items():
            examples[reason] = sorted([*examples.get(reason, []), *best], key=lambda item: item[:2])[:EXAMPLES]
    head, tail, ranks = _distribution(entries, lists)
    return Summary(
        source,
        parts,
        pairs,
        samples,
        shards,
        tuple(
            ReasonCount(reason, count, tuple(Example(**own) for _, _, own in examples.get(reason, [])))
            for reason, count in sorted(reasons.items(), key=lambda item: (item[0] != KEPT, -item[1], item[0]))
        ),
        tuple(
            LanguageCount(language, *counts)
            for language, counts in sorted(languages.items(), key=lambda item: (-item[1][0], item[0]))
        ),
        head,
        tail,
        ranks,
        notes,
    )


def _distribution(
    entries: Iterable[pa.Table], lists: Mapping[str, tuple[str, ...]]
) -> tuple[tuple[EntryCount, ...], tuple[EntryCount, ...], tuple[RankCount, ...]]:
    """Return the most and the least frequent entries, and all between by rank."""
    sums = {code: np.zeros((2, len(own)), np.int64) for code, own in lists.items()}
    for table in entries:
        for code, own in sums.items():
            here = table.filter(pc.equal(table["language"], code))
            for place, name in enumerate(("before", "after")):
                np.add.at(own[place], here["entry"].to_numpy(), here[name].to_numpy())
    rows = [(code, entry, own) for code, own in sums.items() for entry in np.flatnonzero(own[0]).tolist()]
    rows.sort(key=lambda row: (-row[2][0, row[1]], lists[row[0]][row[1]]))
    found = [EntryCount(code, lists[code][entry], int(own[0, entry]), int(own[1, entry])) for code, entry, own in rows]
    return tuple(found[:_SHOWN]), tuple(found[_SHOWN:][-_SHOWN:]), tuple(_by_rank(found))


def _by_rank(found: list[EntryCount]) -> Iterable[RankCount]:
    first = 1
    while first <= len(found):
        own = found[first - 1 : 2 * first - 1]
        yield RankCount(first, first + len(own) - 1, sum(e.before for e in own), sum(e.after for e in own))
        first *= 2


def markdown(summary: Summary) -> str:
    """Return the summary as Markdown, without pictures."""
    lines = [
        f"# Curation of {_cell(summary.source)}",
        "",
        f"{summary.pairs:,} pairs were read in {summary.parts:,} parts, {summary.kept:,} are kept "
        f"({_share(summary.kept, summary.pairs)}), as {summary.samples:,} samples in {len(summary.shards):,} shards.",
        *(f"\n{note}" for note in summary.notes),
        "",
        "## What became of the pairs",
        "",
        "| reason | pairs | share |",
        "|---|---:|---:|",
        *(f"| {_cell(one.reason)} | {one.count:,} | {_share(one.count, summary.pairs)} |" for one in summary.reasons),
    ]
    if summary.languages:
        lines += ["", "## Languages", "", "| language | pairs | kept | share kept |", "|---|---:|---:|---:|"]
        lines += [
            f"| {one.language} | {one.pairs:,} | {one.kept:,} | {_share(one.kept, one.pairs)} |"
            for one in summary.languages
        ]
    if summary.ranks:
        lines += ["", "## Entries", "", "| ranks | matches before | after | share kept |", "|---|---:|---:|---:|"]
        lines += [
            f"| {one.first:,} to {one.last:,} | {one.before:,} | {one.after:,} | {_share(one.after, one.before)} |"
            for one in summary.ranks
        ]
    for title, entries in (("Head", summary.head), ("Tail", summary.tail)):
        if entries:
            lines += ["", f"### {title}", "", "| entry | before | after |", "|---|---:|---:|"]
            lines += [f"| {_cell(one.entry)} | {one.before:,} | {one.after:,} |" for one in entries]
    lines += ["", "## Examples"]
    for one in summary.reasons:
        lines += ["", f"### {_cell(one.reason)}", ""]
        lines += [
            f"- `{_cell(e.key)}` {_cell(e.caption) or '(no caption)'}{f' ({_cell(e.note)})' if e.note else ''}"
            for e in one.examples
        ]
    return "\n".join(lines) + "\n"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _cell(text: str) -> str:
    r"""Return a user's text as it can stand in a line or in a cell."""
    plain = " ".join(text.split())
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>#|" else c for c in plain)


def encode_json(value: Any) -> str:
    """Return JSON, the same text for the same value."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, indent=1) + "\n"
