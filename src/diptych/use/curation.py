"""The page of a curation: what became of the pairs, with pictures; languages; head and tail of the entries."""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image

from diptych.curate.summary import KEPT, EntryCount, Example, ReasonCount, Summary
from diptych.use.page import Line, line_chart, page, thumbnail, words


def curation_page(summary: Summary) -> str:
    """Return the summary as an HTML document."""
    share = f" ({summary.kept / summary.pairs:.1%})" if summary.pairs else ""
    body = (
        f"<h1>{words(summary.source)}, curated</h1>"
        f'<p class="lead">{summary.pairs:,} pairs were read, {summary.kept:,} are kept{share}: {summary.samples:,} samples in '
        f"{len(summary.shards):,} shards. {escape(' '.join(summary.notes))}</p>"
        f"<h2>What became of the pairs</h2>{_reasons(summary)}"
        f"{_entries(summary)}{_languages(summary)}"
        f"<h2>Some of each</h2>{''.join(map(_examples, summary.reasons))}"
    )
    return page(f"{summary.source}, curated", body)


def _reasons(summary: Summary) -> str:
    rows = (
        (escape(one.reason), f"{one.count:,}", _share(one.count, summary.pairs, good=one.reason == KEPT))
        for one in summary.reasons
    )
    return _table(("reason", "pairs", "share of all"), rows)


def _languages(summary: Summary) -> str:
    rows = (
        (escape(one.language), f"{one.pairs:,}", f"{one.kept:,}", _share(one.kept, one.pairs, good=True))
        for one in summary.languages
    )
    return f"<h2>Languages</h2>{_table(('language', 'pairs', 'kept', 'share kept'), rows)}" if summary.languages else ""


def _entries(summary: Summary) -> str:
    """Return the mean number of matches per entry by rank, on logarithmic axes, and the ends of the list in words."""
    if not summary.ranks:
        return ""
    curves = [
        Line(
            name,
            tuple(
                (math.log10(math.sqrt(one.first * one.last)), math.log10(max(1, count / (one.last - one.first + 1))))
                for one, count in zip(summary.ranks, counts, strict=True)
            ),
        )
        for name, counts in (
            ("before balancing", [one.before for one in summary.ranks]),
            ("kept", [one.after for one in summary.ranks]),
        )
    ]
    chart = line_chart("log10 of matches per entry", curves, x_name="log10 of the entry's rank")
    ranks = _table(
        ("ranks", "matches before", "kept", "share kept"),
        (
            (
                f"{one.first:,} to {one.last:,}",
                f"{one.before:,}",
                f"{one.after:,}",
                _share(one.after, one.before, good=True),
            )
            for one in summary.ranks
        ),
    )
    ends = "".join(
        f'<div class="card"><strong>{title}</strong>{_entry_table(entries)}</div>'
        for title, entries in (("Most frequent entries", summary.head), ("Least frequent entries", summary.tail))
        if entries
    )
    return f'<h2>Head and tail</h2><div class="charts">{chart}{ends}</div>{ranks}'


def _entry_table(entries: Sequence[EntryCount]) -> str:
    rows = ((words(one.entry), one.language, f"{one.before:,}", f"{one.after:,}") for one in entries)
    return _table(("entry", "language", "before", "kept"), rows)


def _examples(one: ReasonCount) -> str:
    if not one.examples:
        return ""
    figures = "".join(map(_example, one.examples))
    return f'<h3>{escape(one.reason)} <small>{one.count:,}</small></h3><div class="gallery">{figures}</div>'


def _example(example: Example) -> str:
    picture = ""
    if example.picture is not None:
        picture = thumbnail(Image.open(io.BytesIO(base64.b64decode(example.picture))), example.caption)
    said = [
        escape(example.key),
        *([example.language] if example.language else []),
        *filter(None, [escape(example.note)]),
    ]
    caption = words(example.caption) if example.caption else '<span class="soft">(no caption)</span>'
    return f'<div class="card"><div class="query">{picture}<span>{caption}</span></div><small>{" · ".join(said)}</small></div>'


def _share(part: int, whole: int, *, good: bool) -> str:
    """Return a share as a number and a bar."""
    share, colour = (part / whole if whole else 0.0), "var(--good)" if good else "var(--left)"
    return (
        f'{share:.1%} <svg viewBox="0 0 120 6" style="width:7rem;display:inline-block;vertical-align:middle" aria-hidden="true">'
        f'<rect width="120" height="6" rx="3" fill="var(--line)"/><rect width="{120 * share:.1f}" height="6" rx="3" fill="{colour}"/></svg>'
    )


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are HTML already; all but the first are numbers."""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr><td>{first}</td>{''.join(f'<td class=number>{cell}</td>' for cell in rest)}</tr>" for first, *rest in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
