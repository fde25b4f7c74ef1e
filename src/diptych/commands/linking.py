"""`link`, `cluster`: which records are one entity, from tables to tables."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from diptych.commands.terminal import chosen, progress, say
from diptych.data.ocr import read_line, read_text
from diptych.data.sources import AbstractSource, Columns, open_source
from diptych.files import atomic_file, write_text
from diptych.models.dual import DualEncoder
from diptych.models.pooling import check_weight
from diptych.models.weights import load
from diptych.use.gallery import Card, render
from diptych.use.linkage import (
    Clustered,
    Linked,
    Records,
    check_labelled,
    cluster_cards,
    cluster_records,
    embed_records,
    link_cards,
    link_records,
    read_missing_texts,
)
from diptych.use.page import facts, interval_table, page

Ocr = Literal["page", "line", "off"]


def link(
    queries: Annotated[Positional[str], arg(metavar="QUERIES")],
    references: Annotated[Positional[str], arg(metavar="REFERENCES")],
    *,
    model: str = "auto",
    out: Path,
    threshold: float | None = None,
    image_weight: float | None = None,
    ocr: Ocr = "page",
    columns: Columns = Columns(),
    html: Path | None = None,
    seed: int = 0,
    offline: bool = False,
) -> Linked:
    """Link the records of one source to those of another: the nearest by the pooled vector of image and text, if it is near enough.

    Where both have a column `group` that says which records are one entity, half of the queries choose threshold and weight, and the other
    half says how well that works.

    Args:
        queries: Records to link: a csv, or anything else that `train` takes; with texts, images, or both.
        references: Records to link them to.
        model: Anything `diptych.load` takes; `auto` is lite0-minilm where its packages are installed, else mini.
        out: A csv file: query, reference (empty where there is no link), score, and both texts.
        threshold: Cosine above which the nearest record is a link; chosen when absent. Where nothing says what is right, all are linked then.
        image_weight: Share of the image in a record's vector, in [0, 1]; chosen when absent, or 0.5.
        ocr: Where a source has no text at all, read it from the images (extra `ocr`): lines on a `page`, or crops of one `line`, which is
            several times faster. Latin letters, Chinese and Japanese are known; Cyrillic, Arabic and Korean are not.
        columns: What the columns of both tables mean.
        html: Also write a page with the links that are least sure.
        seed: Of the halves and of the intervals.
        offline: Never touch the network.
    """
    check_weight(image_weight)
    sources = [_opened(spec, columns) for spec in (queries, references)]
    encoder = load(chosen(model), offline=offline)
    (asking, asked), (answering, known) = (_records(encoder, source, ocr) for source in sources)
    found = link_records(asked, known, threshold=threshold, image_weight=image_weight, seed=seed)
    kept = found.kept.tolist()
    _write(
        out,
        ("query", "reference", "score", "query_text", "reference_text"),
        (
            (key, known.keys[best] if linked else "", f"{score:.4f}", text, known.texts[best] if linked else "")
            for key, text, best, score, linked in zip(
                asked.keys, asked.texts, found.nearest[:, 0].tolist(), found.score[:, 0].tolist(), kept, strict=True
            )
        ),
    )
    used = "" if found.threshold is None else f" above a cosine of {found.threshold:.3f}"
    summary = f"{sum(kept):,} of {len(asked):,} records are linked{used}, image weight {found.image_weight}"
    say(f"{summary}; they are in {out}.")
    if found.threshold is None:
        say(
            "Every record is linked to its nearest, however far that is: set --threshold, or give both tables a column `group`."
        )
    if found.scores is not None and found.judged is not None:
        _say_all(f"On {len(found.judged):,} queries that chose nothing:", vars(found.scores))
    if html is not None:
        lead = f"{summary}. Below are those that are least sure: a record, then the nearest ones of the other list with their cosine."
        _write_page(html, "Links", lead, _judged(found), link_cards(found, asked, known, (asking, answering)))
    return found


def cluster(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    *,
    model: str = "auto",
    out: Path,
    threshold: float | None = None,
    image_weight: float | None = None,
    ocr: Ocr = "page",
    columns: Columns = Columns(),
    html: Path | None = None,
    seed: int = 0,
    offline: bool = False,
) -> Clustered:
    """Cluster records by single linkage on their pooled vectors of image and text.

    Where a column `group` says which records are one entity, half of the entities choose threshold and weight, and the other half says how
    well that works.

    Args:
        source: Records: a csv, or anything else that `train` takes; with texts, images, or both.
        model: Anything `diptych.load` takes; `auto` is lite0-minilm where its packages are installed, else mini.
        out: A csv file: key, cluster, text.
        threshold: Cosine distance up to which records are joined; needed where nothing says what is right.
        image_weight: Share of the image in a record's vector, in [0, 1]; chosen when absent, or 0.5.
        ocr: Where the source has no text at all, read it from the images (extra `ocr`): lines on a `page`, or crops of one `line`, which is
            several times faster. Latin letters, Chinese and Japanese are known; Cyrillic, Arabic and Korean are not.
        columns: What the columns of the table mean.
        html: Also write a page with the largest clusters.
        seed: Of the halves.
        offline: Never touch the network.
    """
    check_weight(image_weight)
    opened = _opened(source, columns)
    if threshold is None:
        check_labelled(opened)
    encoder = load(chosen(model), offline=offline)
    samples, records = _records(encoder, opened, ocr)
    found = cluster_records(records, threshold=threshold, image_weight=image_weight, seed=seed)
    _write(
        out, ("key", "cluster", "text"), zip(records.keys, map(str, found.cluster.tolist()), records.texts, strict=True)
    )
    summary = (
        f"{len(records):,} records are {found.cluster.max() + 1:,} clusters at a distance of {found.threshold:.3f}, image weight "
        f"{found.image_weight}"
    )
    say(f"{summary}; they are in {out}.")
    numbers = {name: f"{value:.3f}" for name, value in found.metrics.items()}
    if numbers:
        _say_all("On entities that chose nothing:", numbers)
    if html is not None:
        lead = f"{summary}. Below are the largest: one record, then up to ten others with their cosine to it."
        table = (
            f'<p class="soft">{_HITS_OF_CLUSTERS}</p>'
            + facts((name.replace("_", " "), value) for name, value in numbers.items())
            if numbers
            else ""
        )
        _write_page(html, "Clusters", lead, table, cluster_cards(found, records, samples))
    return found


_HITS_OF_CLUSTERS = (
    "HIT: all records of the cluster are one entity. The numbers are those of entities that chose nothing."
)


def _judged(found: Linked) -> str:
    """Return what HIT means and how well queries were linked, as HTML; nothing where nobody knows."""
    if found.scores is None or found.judged is None:
        return ""
    meaning = f"HIT: rightly linked, or rightly not. Measured on {len(found.judged):,} queries that chose nothing; those are shown."
    return f'<p class="soft">{meaning}</p>{interval_table((name, value, None) for name, value in vars(found.scores).items())}'


def _opened(spec: str, columns: Columns) -> AbstractSource:
    source = open_source(spec, columns=columns)
    for sentence in source.notes:
        say(sentence)
    return source


def _records(model: DualEncoder, source: AbstractSource, ocr: Ocr) -> tuple[AbstractSource, Records]:
    """Return the samples of a source, and what a model makes of them."""
    source = _spoken(source, ocr)
    records = embed_records(model, source, progress=progress)
    if len(records) < len(source):
        say(
            f"{len(source) - len(records):,} records of {source.name} have no text and no image that can be read: they are left out."
        )
    return source, records


def _spoken(source: AbstractSource, ocr: Ocr) -> AbstractSource:
    """Return the source; if it has no text at all, with the text that stands in its images."""
    if ocr == "off" or any(source.texts(row) for row in range(len(source))):
        return source
    say(f"{source.name} has no texts: reading them from {len(source):,} images.")
    found = read_missing_texts(source, read_text if ocr == "page" else read_line, progress=progress)
    if len(found.read) < len(source):
        say(f"Nothing could be read in {len(source) - len(found.read):,} of them.")
    return found


def _say_all(lead: str, numbers: Mapping[str, object]) -> None:
    say(lead)
    for name, value in numbers.items():
        say(f"  {name:32} {value}")


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with atomic_file(path) as place, place.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _write_page(path: Path, title: str, lead: str, table: str, cards: Sequence[Card]) -> None:
    write_text(path, page(title, f'<h1>{title}</h1><p class="lead">{escape(lead)}</p>{table}<p></p>{render(cards)}'))
    say(f"The pictures are in {path}.")
