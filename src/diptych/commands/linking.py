"""`link`, `cluster`: which records are one entity, from tables to tables."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from diptych.commands.terminal import chosen, progress, say
from diptych.data.ocr import read_line, read_text
from diptych.data.sources import AbstractSource, Columns, open_source
from diptych.files import atomic_file, write_text
from diptych.models.dual import DualEncoder
from diptych.models.weights import load
from diptych.use.gallery import Card, render
from diptych.use.linkage import (
    Clustered,
    Linked,
    Records,
    cluster_cards,
    cluster_records,
    embed_records,
    link_cards,
    link_records,
    read_missing_texts,
)
from diptych.use.page import page

Ocr = Literal["page", "line", "off"]


def link(
    queries: Positional[str],
    references: Positional[str],
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
        threshold: Cosine above which the nearest record is a link; chosen when absent, or none where nothing says what is right.
        image_weight: Share of the image in a record's vector, in [0, 1]; chosen when absent, or 0.5.
        ocr: Where a source has no text at all, read it from the images (extra `ocr`): lines on a `page`, or crops of one `line`.
        columns: What the columns of both tables mean.
        html: Also write a page with the links that are least sure.
        seed: Of the halves and of the intervals.
        offline: Never touch the network.
    """
    encoder = load(chosen(model), offline=offline)
    (asking, asked), (answering, known) = (_records(encoder, spec, columns, ocr) for spec in (queries, references))
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
    used = "without a threshold" if found.threshold is None else f"above a cosine of {found.threshold:.3f}"
    say(
        f"{sum(kept):,} of {len(asked):,} records are linked, {used}, image weight {found.image_weight}; they are in {out}."
    )
    if found.scores is not None and found.judged is not None:
        _say_all(f"On {len(found.judged):,} queries that chose nothing:", vars(found.scores))
    if html is not None:
        lead = "The links that are least sure: each record, then the nearest ones of the other list."
        _write_page(html, "Links", lead, link_cards(found, asked, known, (asking, answering)))
    return found


def cluster(
    source: Positional[str],
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
        ocr: Where the source has no text at all, read it from the images (extra `ocr`): lines on a `page`, or crops of one `line`.
        columns: What the columns of the table mean.
        html: Also write a page with the largest clusters.
        seed: Of the halves.
        offline: Never touch the network.
    """
    encoder = load(chosen(model), offline=offline)
    samples, records = _records(encoder, source, columns, ocr)
    found = cluster_records(records, threshold=threshold, image_weight=image_weight, seed=seed)
    _write(
        out, ("key", "cluster", "text"), zip(records.keys, map(str, found.cluster.tolist()), records.texts, strict=True)
    )
    say(
        f"{len(records):,} records are {found.cluster.max() + 1:,} clusters at a distance of {found.threshold:.3f}, image weight "
        f"{found.image_weight}; they are in {out}."
    )
    if found.metrics:
        _say_all("On entities that chose nothing:", {name: f"{value:.3f}" for name, value in found.metrics.items()})
    if html is not None:
        lead = "The largest clusters: one record, then up to ten others with their cosine to it."
        _write_page(html, "Clusters", lead, cluster_cards(found, records, samples))
    return found


def _records(model: DualEncoder, spec: str, columns: Columns, ocr: Ocr) -> tuple[AbstractSource, Records]:
    """Return the samples of a source, and what a model makes of them."""
    source = open_source(spec, columns=columns)
    for sentence in source.notes:
        say(sentence)
    source = _spoken(source, ocr)
    return source, embed_records(model, source, progress=progress)


def _spoken(source: AbstractSource, ocr: Ocr) -> AbstractSource:
    """Return the source; if it has no text at all, with the text that stands in its images."""
    if ocr == "off" or any(source.texts(row) for row in range(len(source))):
        return source
    say(f"{source.name} has no texts: reading them from {len(source):,} images.")
    return read_missing_texts(source, read_text if ocr == "page" else read_line)


def _say_all(lead: str, numbers: Mapping[str, object]) -> None:
    say(lead)
    for name, value in numbers.items():
        say(f"  {name:32} {value}")


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with atomic_file(path) as place, place.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _write_page(path: Path, title: str, lead: str, cards: Sequence[Card]) -> None:
    write_text(path, page(title, f'<h1>{title}</h1><p class="lead">{lead}</p>{render(cards)}'))
    say(f"The pictures are in {path}.")
