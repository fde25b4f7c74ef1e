"""Records linked by one vector each: what is nearest in another list, and what belongs together in one."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from PIL import Image
from torch import Tensor

from diptych.data.images import decode
from diptych.data.ocr import Reader
from diptych.data.sources import AbstractSource
from diptych.errors import ConfigError, ImageError, InputError
from diptych.evaluation.linkage import (
    LinkScores,
    PairCounts,
    adjusted_rand_index,
    best_cut,
    cut,
    link_scores,
    spanning_tree,
    tune_threshold,
)
from diptych.models.dual import DualEncoder
from diptych.models.embedding import ProgressBar, embed_source_images, embed_texts, no_progress
from diptych.models.memory import Shown
from diptych.models.neighbours import nearest
from diptych.models.pooling import pool
from diptych.types import Sample, Text
from diptych.use.gallery import Candidate, Card

WEIGHTS = tuple(round(0.1 * step, 1) for step in range(11))
"""Shares of the image that are tried where the weight is tuned."""

FEWEST = 20
"""Labelled records from which half can choose a threshold and half can judge it."""


@dataclass(frozen=True)
class Records:
    """Records as a model sees them.

    Attributes:
        keys: In their source.
        rows: In their source.
        texts: What was embedded; empty where a record has none.
        groups: Equal ones are one entity; None where nobody knows.
        images: Normalised embeddings; rows of 0 where a record has no image.
        text_embeddings: Alike.
    """

    keys: tuple[str, ...]
    rows: tuple[int, ...]
    texts: tuple[str, ...]
    groups: tuple[str, ...] | None
    images: Float[Tensor, "n d"]
    text_embeddings: Float[Tensor, "n d"]

    def __len__(self) -> int:
        return len(self.keys)

    def pooled(self, image_weight: float) -> Float[Tensor, "n d"]:
        """Return one vector per record; a record with one modality is that one, whatever the weight."""
        has_image, has_text = (part.any(1) for part in (self.images, self.text_embeddings))
        both = has_image & has_text
        found = torch.where(has_image[:, None], self.images, self.text_embeddings)
        found[both] = pool(self.images[both], self.text_embeddings[both], image_weight)
        return found


class WithReadTexts(AbstractSource):
    """Another source, of whose samples some have a text that was read from their image.

    Attributes:
        source: The other one; its images stay where they are.
        read: Text by row.
    """

    def __init__(self, source: AbstractSource, read: Mapping[int, str]) -> None:
        self.source, self.read = source, dict(read)
        self.name, self.notes = source.name, source.notes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return replace(self.source[index], texts=self.texts(index))

    def without_image(self, index: int) -> Sample:
        """Return one sample without its image."""
        return replace(self.source.without_image(index), texts=self.texts(index))

    def texts(self, index: int) -> tuple[Text, ...]:
        """Return the texts of one sample."""
        return (Text(self.read[index]),) if index in self.read else self.source.texts(index)


def read_missing_texts(source: AbstractSource, reader: Reader, *, progress: ProgressBar = no_progress) -> WithReadTexts:
    """Return a source whose samples without a text have the one that `reader` finds in their image, if it can be read and says anything."""
    read: dict[int, str] = {}
    silent = [row for row in range(len(source)) if not source.texts(row)]
    with progress("reading", len(silent)) as advance:
        for row in silent:
            with suppress(ImageError):
                image = source[row].image
                if image is not None and (spoken := reader(decode(image))):
                    read[row] = spoken
            advance(1)
    return WithReadTexts(source, read)


def embed_records(model: DualEncoder, source: AbstractSource, *, progress: ProgressBar | None = None) -> Records:
    """Return the records of a source; the first text of a sample counts, and its group where groups are known.

    A record whose image is missing or cannot be read is its text, one without text its image, one without both is left out.

    Raises:
        InputError: If no record can be used.
    """
    try:
        shown, images = embed_source_images(model, source, progress=progress)
    except ImageError:
        shown, images = Shown((), (), ()), torch.empty(0, 0)
    pictured = dict(zip(shown.rows, images, strict=True))
    texts = [next((text.text for text in source.texts(row)), "") for row in range(len(source))]
    rows = [row for row, text in enumerate(texts) if text or row in pictured]
    if not rows:
        raise InputError(f"None of the {len(source)} records of {source.name} has a text or an image that can be read.")
    spoken = [row for row in rows if texts[row]]
    embedded = embed_texts(model, [texts[row] for row in spoken])
    said = dict(zip(spoken, embedded, strict=True))
    samples = [source.without_image(row) for row in rows]
    nothing = torch.zeros(max(images.shape[1], embedded.shape[1]))
    return Records(
        tuple(sample.key for sample in samples),
        tuple(rows),
        tuple(texts[row] for row in rows),
        tuple(sample.group for sample in samples) if any(s.group != s.key for s in samples) else None,
        torch.stack([pictured.get(row, nothing) for row in rows]),
        torch.stack([said.get(row, nothing) for row in rows]),
    )


@dataclass(frozen=True)
class Linked:
    """Records of one list and what each is linked to in another.

    Attributes:
        nearest: Rows of the best candidates of each query, best first.
        score: Their cosines.
        threshold: A link is a nearest candidate that scores above it; None links all.
        image_weight: Share of the image in the vectors.
        judged: Queries that played no part in any choice, on which `scores` is; None where nobody knows what is right.
        scores: How well they were linked.
    """

    nearest: Int64[np.ndarray, "q k"]
    score: Float[np.ndarray, "q k"]
    threshold: float | None
    image_weight: float
    judged: Int64[np.ndarray, " j"] | None = None
    scores: LinkScores | None = None

    @property
    def kept(self) -> Bool[np.ndarray, " q"]:
        """Return which queries have a link."""
        return self.score[:, 0] > (-np.inf if self.threshold is None else self.threshold)


def link_records(
    queries: Records,
    references: Records,
    *,
    threshold: float | None = None,
    image_weight: float | None = None,
    count: int = 3,
    seed: int = 0,
) -> Linked:
    """Return what each query is linked to.

    Where groups are known, half of the queries, drawn with `seed`, choose what was not given (the weight among `WEIGHTS`, the
    threshold among all there are, both by F1), and the other half says how well that links.

    Args:
        queries: What to link.
        references: What to link to.
        threshold: Cosine above which the nearest is a link; None: chosen, or no threshold where groups are not known.
        image_weight: Share of the image; None: chosen, or 0.5.
        count: Candidates that are kept for showing.
        seed: Of the halves and of the intervals.

    Raises:
        ConfigError: If groups are known and there are fewer than 20 queries to choose with.
    """
    known = queries.groups is not None and references.groups is not None
    if not known:
        weight = 0.5 if image_weight is None else image_weight
        score, rows = _nearest(queries, references, weight, count)
        return Linked(rows, score, threshold, weight)
    assert queries.groups is not None and references.groups is not None
    choose, judge = _halves(len(queries), seed)
    names = np.array(references.groups)
    matched = np.isin(np.array(queries.groups), names)
    tried = []
    for weight in WEIGHTS if image_weight is None else (image_weight,):
        score, rows = _nearest(queries, references, weight, count)
        right = names[rows[:, 0]] == np.array(queries.groups)
        best, f1 = tune_threshold(score[choose, 0], right[choose], matched[choose])
        tried.append((f1, -abs(weight - 0.5), best, weight, score, rows, right))
    _, _, best, weight, score, rows, right = max(tried, key=lambda one: one[:2])
    used = best if threshold is None else threshold
    scores = link_scores(score[judge, 0], right[judge], matched[judge], used, seed=seed)
    return Linked(rows, score, used, weight, judge, scores)


@dataclass(frozen=True)
class Clustered:
    """Records that belong together.

    Attributes:
        cluster: Number of each record's cluster, in the order of their first records.
        threshold: Cosine distance up to which records are joined.
        image_weight: Share of the image in the vectors.
        metrics: Adjusted Rand index and pairwise precision, recall and F1 on records that played no part in any choice; empty where
            nobody knows what is right.
    """

    cluster: Int64[np.ndarray, " n"]
    threshold: float
    image_weight: float
    metrics: dict[str, float]


_NO_THRESHOLD = (
    "Clusters need a threshold, or a column `group` to choose it with. Set --threshold to a distance, such as 0.2."
)


def check_labelled(source: AbstractSource) -> None:
    """Refuse a source that cannot choose a threshold of clusters, before anything is read or embedded.

    Raises:
        ConfigError: If nothing says which records are one entity.
    """
    if all(sample.group == sample.key for sample in map(source.without_image, range(len(source)))):
        raise ConfigError(_NO_THRESHOLD)


def cluster_records(
    records: Records, *, threshold: float | None = None, image_weight: float | None = None, seed: int = 0
) -> Clustered:
    """Return single-linkage clusters by cosine distance.

    Where groups are known, the records of half of the groups, drawn with `seed`, choose what was not given (by the adjusted Rand index, over
    every threshold there is), and the records of the other half, clustered by themselves, say how well that works.

    Args:
        records: What to cluster.
        threshold: Distance in [0, 2]; must be given where groups are not known.
        image_weight: Share of the image; None: chosen, or 0.5.
        seed: Of the halves.

    Raises:
        ConfigError: If there is no threshold and none can be chosen.
    """
    if records.groups is None:
        if threshold is None:
            raise ConfigError(_NO_THRESHOLD)
        weight = 0.5 if image_weight is None else image_weight
        return Clustered(cut(spanning_tree(records.pooled(weight)), threshold), threshold, weight, {})
    number = np.unique(np.array(records.groups), return_inverse=True)[1]
    chosen, _ = _halves(int(number.max()) + 1, seed)
    choose = np.isin(number, chosen)
    tried = []
    for weight in WEIGHTS if image_weight is None else (image_weight,):
        vectors = records.pooled(weight)
        best, ari = best_cut(spanning_tree(vectors[torch.from_numpy(choose)]), number[choose])
        tried.append((ari, -abs(weight - 0.5), best, weight, vectors))
    _, _, best, weight, vectors = max(tried, key=lambda one: one[:2])
    used = best if threshold is None else threshold
    apart = cut(spanning_tree(vectors[torch.from_numpy(~choose)]), used)
    return Clustered(cut(spanning_tree(vectors), used), used, weight, _judge(apart, number[~choose]))


def link_cards(
    linked: Linked,
    queries: Records,
    references: Records,
    sources: tuple[AbstractSource, AbstractSource],
    *,
    count: int = 60,
) -> list[Card]:
    """Return cards of queries with their nearest candidates, the least sure links first: those whose score is next to the threshold.

    A hit is rightly linked, or rightly linked to nothing.
    """
    edge = linked.score[:, 0] - (0.0 if linked.threshold is None else linked.threshold)
    pool_of = np.arange(len(queries)) if linked.judged is None else linked.judged
    chosen = pool_of[np.argsort(np.abs(edge[pool_of]), kind="stable")[:count]].tolist()

    known = queries.groups is not None and references.groups is not None
    listed = set(references.groups or ())

    def right(query: int, row: int) -> bool | None:
        return queries.groups[query] == references.groups[row] if known else None  # type: ignore[index]

    def hit(query: int) -> bool | None:
        """Return whether a query is rightly linked, or rightly to nothing."""
        if not known or linked.kept[query]:
            return right(query, int(linked.nearest[query, 0]))
        return queries.groups[query] not in listed  # type: ignore[index]

    return [
        Card(
            (queries.texts[query] or queries.keys[query]) + ("" if linked.kept[query] else " (no link)"),
            _picture(sources[0], queries.rows[query]),
            tuple(
                Candidate(
                    float(score),
                    references.texts[row] or references.keys[row],
                    _picture(sources[1], references.rows[row]),
                    right(query, row),
                )
                for score, row in zip(linked.score[query], linked.nearest[query].tolist(), strict=True)
            ),
            hit(query),
        )
        for query in chosen
    ]


def cluster_cards(found: Clustered, records: Records, source: AbstractSource, *, count: int = 40) -> list[Card]:
    """Return cards of the largest clusters: the first record, then up to ten others with their cosine to it. A hit holds one entity only."""
    vectors, sizes = records.pooled(found.image_weight), np.bincount(found.cluster)
    cards = []
    for number in np.argsort(-sizes, kind="stable")[:count].tolist():
        first, *others = np.nonzero(found.cluster == number)[0].tolist()
        cards.append(
            Card(
                f"{records.texts[first] or records.keys[first]} ({sizes[number]} records)",
                _picture(source, records.rows[first]),
                tuple(
                    Candidate(
                        float(vectors[first] @ vectors[row]),
                        records.texts[row] or records.keys[row],
                        _picture(source, records.rows[row]),
                        None if records.groups is None else records.groups[row] == records.groups[first],
                    )
                    for row in others[:10]
                ),
                None if records.groups is None else len({records.groups[row] for row in (first, *others)}) == 1,
            )
        )
    return cards


def _nearest(queries: Records, references: Records, weight: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    score, rows = nearest(queries.pooled(weight), references.pooled(weight), count)
    return score.numpy(), rows.numpy()


def _halves(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    if count < FEWEST:
        raise ConfigError(
            f"With {count} labelled queries or groups, half of them cannot choose a threshold and the other half judge it; {FEWEST} are "
            "needed. Leave out the column `group` and set --threshold."
        )
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[: count // 2]), np.sort(order[count // 2 :])


def _judge(cluster: Int64[np.ndarray, " n"], label: Int64[np.ndarray, " n"]) -> dict[str, float]:
    pairs = PairCounts.of(cluster, label)
    names = {"precision": pairs.precision, "recall": pairs.recall, "f1": pairs.f1}
    return {"adjusted_rand_index": adjusted_rand_index(cluster, label), **names}


def _picture(source: AbstractSource, row: int) -> Image.Image | None:
    try:
        image = source[row].image
        return None if image is None else decode(image)
    except ImageError:
        return None
