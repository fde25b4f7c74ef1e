"""MetaCLIP: image-text pairs chosen by metadata.

Papers: Xu et al., "Demystifying CLIP Data", ICLR 2024, arXiv 2309.16671; several languages: Chuang et al., "Meta CLIP 2", 2025, arXiv 2507.22062.
Official code: github.com/facebookresearch/MetaCLIP.

Idea: what made CLIP is the distribution of its data, and that takes no model to repeat. Texts are matched against half a million entries: synsets,
frequent words, pairs of words, titles. Entries with many texts then keep only some of them, drawn at random, and those with few keep all,
so that training sees the tail of the world instead of more of its head.

Equations (section 3, algorithm 1), with s(x) = x between spaces, punctuation set apart (`diptych.curate.match`):
    e matches x iff " e " is a substring of s(x);  N_e = number of texts that e matches
    p_e = min(1, t / N_e);  P(keep x) = 1 - product over e in x of (1 - p_e), 0 without any e.
Tail share: sum of N_e over N_e < t, over the sum of all N_e; t = 20,000 is 6 % at 1.6 billion pairs, and 6 % gives t for other pools.
Several languages: one list and one count of each; English has t, the others that t which gives their tail the share of the English one.
Training is CLIP's own and unchanged.

What differs: one draw per row, from its id and a seed, instead of one per match. The chance is the same, and shards, reruns and any order agree; a
higher threshold keeps what a lower one keeps and more. A list holds each entry once, sorted. `unit="text"` keeps a row once with the texts that
were kept, where the released script of the first paper repeats the pair for each of them.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Bool, Float64, Int64, Shaped, UInt8
from PIL import Image

from diptych.claims.claim import Arm, Claim, Control, Trial
from diptych.claims.measures import gains_less_than_half
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
from diptych.curate.metadata import NUMBERS, Metadata, build_metadata, count_ngrams, frequent_words, joined_words
from diptych.data.bundles import bundle_file
from diptych.data.columns import Columns, role_of, sniff
from diptych.data.loader import LoaderConfig, draw_order
from diptych.data.openmoji import glyphs, over_white
from diptych.data.sources import AbstractSource, Listed, Subset, WithChances, open_source
from diptych.data.transforms import Augment
from diptych.errors import ColumnError, ConfigError
from diptych.evaluation.retrieval import retrieval
from diptych.evaluation.zeroshot import Prompts, class_embeddings, zero_shot
from diptych.models.dual import DualEncoder
from diptych.models.embedding import embed_images, embed_source, embed_texts
from diptych.models.vision import VisionConfig
from diptych.training.prepare import hold_out
from diptych.training.recipe import ModelConfig
from diptych.types import Sample, Text
from diptych.verbs import AbstractCurator

KEPT, UNMATCHED, BALANCED = "kept", "no entry", "entries over the threshold"
NO_LIST, NO_TEXT = "no word list for its language", "no text"
"""Reasons; a row that lost some of its texts says how many it has kept."""

_BATCH = 1 << 16


@dataclass(frozen=True)
class Config:
    """What is kept. One of threshold, tail share and size is given; the others are None.

    Attributes:
        threshold: t, texts that each entry keeps in expectation; 20,000 for 400 million pairs, 170,000 for 2.5 billion.
        tail_share: Share of all matches that belong to entries below the threshold, which follows; 0.06 when a pool grows.
        size: Texts kept in expectation; the threshold follows.
        unit: `text` draws for every text of a row, and the row keeps those that are drawn; `image` draws one text of the row first, as in the
            second paper, and the row stays whole.
        unspaced: Match scripts written without spaces too, see `diptych.curate.match.pattern`; the second paper does, the first does not.
        column: Texts, strings or lists of strings; found by its name when absent.
        language: Column of each row's language; needed with word lists for several.
        anchor: Language whose threshold is given, and whose tail share the others take.
        seed: Of the draws.
    """

    threshold: float | None = 20_000
    tail_share: float | None = None
    size: float | None = None
    unit: Literal["text", "image"] = "text"
    unspaced: bool = False
    column: str | None = None
    language: str | None = None
    anchor: str = "en"
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.threshold, self.tail_share, self.size).count(None) != 2:
            raise ConfigError(
                "Give one of threshold, tail_share and size, and None for the others; they are "
                f"{self.threshold}, {self.tail_share} and {self.size}."
            )


@dataclass(frozen=True)
class _Texts:
    """The texts of a table, one behind the other.

    Attributes:
        texts: Without nulls.
        row: Of the table, for each.
        place: Number of the text within its row.
        rows: How many rows the table has.
    """

    texts: pa.Array
    row: Int64[np.ndarray, " texts"]
    place: Int64[np.ndarray, " texts"]
    rows: int

    def count(self, chosen: Bool[np.ndarray, " texts"]) -> Int64[np.ndarray, " rows"]:
        """Return how many of each row's texts are chosen."""
        return np.bincount(self.row[chosen], minlength=self.rows)


class Curator(AbstractCurator):
    """Adds the columns `chance` (how likely the row is kept) and `reason` (what became of it). `kept_rows` are those that stay.

    Rows are known by their key, or by their number where the table has no keys. For a draw that is repeated in every epoch, give the chances
    to `WithChances` instead.

    Attributes:
        matchers: By language.
        counts: By language, how many texts of the last table hold each entry.
        thresholds: By language, those of the last table.
    """

    def __init__(
        self, metadata: Metadata | Mapping[str, Metadata], config: Config = Config(), *, processes: int = 1
    ) -> None:
        """Make the curator.

        Args:
            metadata: One word list, or one per language.
            config: What is kept.
            processes: That match; more than one need the caller's `if __name__ == "__main__":`.

        Raises:
            ConfigError: If there are several languages and no column of them, or a size is wanted of several.
        """
        lists = {config.anchor: metadata} if isinstance(metadata, Metadata) else dict(metadata)
        if len(lists) > 1 and (config.language is None or config.size is not None):
            raise ConfigError(
                f"Word lists for {', '.join(lists)} need `language`, the column of each row's language, and a threshold or a tail share."
            )
        self.config, self.processes = config, processes
        self.matchers = {code: Matcher(one.entries, unspaced=config.unspaced) for code, one in lists.items()}
        self.counts: dict[str, Int64[np.ndarray, " _entries"]] = {}
        self.thresholds: dict[str, float] = {}

    def curate(self, table: pa.Table) -> pa.Table:
        """Return the table with chances and reasons.

        Raises:
            ColumnError: If there is no column of texts, or of languages.
            DataError: If a threshold has to follow from matches, and there are none.
        """
        table = table.drop_columns([name for name in ("chance", "reason") if name in table.column_names])
        column = _text_column(table, self.config.column)
        texts, ids = _texts_of(table[column]), _ids_of(table)
        chance = self._chances(texts, _languages_of(table, self.config, texts))
        known = np.nan_to_num(chance)
        if self.config.unit == "image":
            number = texts.count(np.ones(len(known), np.bool_))
            drawn = np.floor(row_uniforms(ids, self.config.seed, draw=1) * number)
            kept = (texts.place == drawn[texts.row]) & (row_uniforms(ids, self.config.seed)[texts.row] < known)
            of_row = np.bincount(texts.row, known, texts.rows) / np.maximum(number, 1)
        else:
            kept, lost = np.zeros(len(known), np.bool_), np.ones(texts.rows)
            for place in range(texts.place.max(initial=-1) + 1):
                here = texts.place == place
                kept[here] = row_uniforms(ids, self.config.seed, draw=place)[texts.row[here]] < known[here]
                lost[texts.row[here]] *= 1 - known[here]
            of_row = 1 - lost
            table = _with_survivors(table, column, texts, kept)
        reasons = _reasons(texts, chance, kept, whole=self.config.unit == "image")
        return table.append_column("chance", pa.array(of_row)).append_column("reason", pa.array(reasons, pa.string()))

    def _chances(self, texts: _Texts, spoken: Shaped[np.ndarray, " texts"]) -> Float64[np.ndarray, " texts"]:
        """Return how likely each text is kept; nan where there is no word list for its language."""
        matches = {code: self._match(code, texts.texts.filter(pa.array(spoken == code))) for code in self.matchers}
        self.counts = {code: count_entries(found, self.matchers[code].size) for code, found in matches.items()}
        self.thresholds = self._choose(matches)
        chance = np.full(len(spoken), np.nan)
        for code, found in matches.items():
            probabilities = entry_probabilities(self.counts[code], self.thresholds[code])
            chance[spoken == code] = keep_probabilities(found, probabilities)
        return chance

    def _match(self, code: str, texts: pa.Array) -> pa.ChunkedArray:
        batches = pa.table({"text": texts}).to_batches(max_chunksize=_BATCH)
        found = match_batches(self.matchers[code], batches, "text", processes=self.processes)
        return pa.chunked_array([batch["matches"] for batch in found], pa.list_(pa.int32()))

    def _choose(self, matches: Mapping[str, pa.ChunkedArray]) -> dict[str, float]:
        """Return the threshold of each language."""
        if self.config.size is not None:
            ((code, found),) = matches.items()
            return {code: threshold_for_size([found], self.counts[code], self.config.size)}
        if self.config.tail_share is not None:
            share, several = self.config.tail_share, len(self.counts) > 1
            return {
                code: 1.0 if several and not own.any() else threshold_for_share(own, share)
                for code, own in self.counts.items()
            }
        assert self.config.threshold is not None
        if len(self.counts) == 1:
            return dict.fromkeys(self.counts, self.config.threshold)
        return language_thresholds(self.counts, self.config.threshold, anchor=self.config.anchor)


def kept_rows(table: pa.Table) -> pa.Table:
    """Return the rows of a curated table that stay."""
    return table.filter(pc.starts_with(table["reason"], KEPT))


def _text_column(table: pa.Table, column: str | None) -> str:
    known = sniff(table, Columns(texts=() if column is None else (column,))).texts
    name = next((text for text in known if column is not None or role_of(text)[0] == "caption"), None)
    if name is None:
        raise ColumnError(f"No column holds texts. Name it with `column`. Known: {', '.join(table.column_names)}.")
    return name


def _texts_of(column: pa.ChunkedArray) -> _Texts:
    whole = column.combine_chunks()
    if _is_list(column.type):
        row, texts = pc.list_parent_indices(whole).to_numpy(), pc.list_flatten(whole)
    else:
        row, texts = np.arange(len(whole)), whole
    real = texts.is_valid().to_numpy(zero_copy_only=False)
    row = row[real].astype(np.int64)
    place = np.arange(len(row)) - np.searchsorted(row, row)
    return _Texts(texts.filter(pa.array(real)), row, place, len(column))


def _ids_of(table: pa.Table) -> pa.ChunkedArray | Int64[np.ndarray, " rows"]:
    key = sniff(table, Columns()).key
    return np.arange(table.num_rows) if key is None else table[key]


def _languages_of(table: pa.Table, config: Config, texts: _Texts) -> Shaped[np.ndarray, " texts"]:
    if config.language is None:
        return np.full(len(texts.row), config.anchor, object)
    if config.language not in table.column_names:
        raise ColumnError(f"There is no column {config.language!r}. Known: {', '.join(table.column_names)}.")
    return np.asarray(table[config.language].to_pylist(), object).take(texts.row)


def _with_survivors(table: pa.Table, column: str, texts: _Texts, kept: Bool[np.ndarray, " texts"]) -> pa.Table:
    """Return the table in which rows have the texts that were kept; rows that lost all still have them, to be looked at."""
    if not _is_list(table[column].type):
        return table
    left = kept | (texts.count(kept) == 0)[texts.row]
    ends = np.concatenate([[0], texts.count(left).cumsum()])
    lists = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), texts.texts.filter(pa.array(left)))
    return table.set_column(table.column_names.index(column), column, lists)


def _reasons(
    texts: _Texts, chance: Float64[np.ndarray, " texts"], kept: Bool[np.ndarray, " texts"], *, whole: bool
) -> list[str]:
    every = texts.count(np.ones(len(chance), np.bool_))
    listed, matched, stay = texts.count(~np.isnan(chance)), texts.count(chance > 0), texts.count(kept)
    all_of_row = (stay == every) | whole
    return [
        (KEPT if all_of_row[row] else f"{KEPT} {stay[row]} of {every[row]} texts")
        if stay[row]
        else BALANCED
        if matched[row]
        else UNMATCHED
        if listed[row]
        else NO_LIST
        if every[row]
        else NO_TEXT
        for row in range(texts.rows)
    ]


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def mini() -> Config:
    """Return the settings for a pool of thousands: the tail share that the paper keeps from pool to pool."""
    return Config(threshold=None, tail_share=0.06)


CONCEPTS, POOL, SHOWN = 300, 20_000, 64_000
"""Kinds of things, pairs of the pool, and pairs that every arm is shown: 500 batches of 128."""
_TEMPLATES = (
    "{}",
    "a photo of a {}",
    "the {} in the picture",
    "image of {} on white",
    "{} for sale",
    "this is what a {} is to me",
    "New {} , free",
)
_JUNK = ("IMG_{}.jpg", "untitled photo {}", "a photo of the day")
_PROMPTS = Prompts("templates of the pool", _TEMPLATES[:3], "")
_PAPER = (
    "ViT-B/32 on 400 million pairs: 65.5 % zero-shot on ImageNet, 58.2 % on average over 26 sets, against 61.9 and 56.6 % on all 1.6 billion "
    "matched pairs at equal compute."
)


def claim() -> tuple[Claim, ...]:
    """Return three claims: emoji that follow Zipf's law, all and the rarer half of them, and captions of photos."""
    control = Control("As many pairs drawn at random gain less than half as much.", gains_less_than_half)
    emoji_setting = (
        f"{POOL:,} captions of {CONCEPTS} emoji, number k drawn k^-1.2 times as often as the first, a tenth of them junk; every arm is shown "
        f"{SHOWN:,} pairs; tested on 10 new drawings of each."
    )
    metric = "zero-shot accuracy, mean over {}"
    arms = (
        ("all pairs", "baseline", "raw"),
        ("balanced", "method", "balanced"),
        ("as many at random", "control", "random"),
        ("matched, not balanced", "further", "matched"),
        ("balanced anew in every epoch", "further", "online"),
    )

    def made(run: Callable[..., float], **settings: Any) -> tuple[Arm, ...]:
        return tuple(Arm(name, part, partial(run, kind=kind, **settings)) for name, part, kind in arms)  # type: ignore[arg-type]

    emoji = Claim("metaclip", "emoji", _PAPER, emoji_setting, metric.format("concepts"), made(_on_emoji), control)
    tail = Claim(
        "metaclip",
        "tail",
        _PAPER,
        emoji_setting,
        metric.format("the rarer half"),
        made(_on_emoji, tail=True)[:3],
        control,
    )
    photos = Claim(
        "metaclip",
        "photos",
        _PAPER,
        "2,400 captions of 480 photos of flickr8k-1k, heads on frozen towers; words and pairs of words of Conceptual Captions' "
        "validation part are the metadata; every arm is shown 24,000 pairs; tested on 500 captions of 100 other photos.",
        "R@1 text to image, mean over entries",
        made(_on_photos),
        control,
        sources=("flickr8k-1k:train", "flickr8k-1k:dev"),
    )
    return emoji, tail, photos


class EmojiPairs(AbstractSource):
    """Drawings of emoji with captions. Each is scaled, moved and tinted in its own way, from its number."""

    def __init__(self, concepts: Sequence[int], captions: Sequence[str], name: str) -> None:
        """Make the source.

        Args:
            concepts: Which concept each sample shows; its name is the label.
            captions: One per sample.
            name: Seeds the drawings, too.
        """
        self.concepts, self.captions, self.name = concepts, captions, name
        self.names, self._pixels = concept_names(), glyphs(64).pixels
        self._seed = zlib.crc32(name.encode())

    def __len__(self) -> int:
        return len(self.concepts)

    def __getitem__(self, index: int) -> Sample:
        name, glyph = self.names[self.concepts[index]]
        rng = np.random.default_rng([self._seed, index])
        image = _moved(over_white(self._pixels[glyph]), rng)
        return Sample(f"{self.name}-{index}", image, self.texts(index), f"{self.name}-{index}", label=name)

    def texts(self, index: int) -> tuple[Text, ...]:
        """Return the caption."""
        return (Text(self.captions[index]),)


def _moved(image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    side = len(image)
    small = Image.fromarray(image).resize((size := int(rng.integers(side // 2, side + 1)),) * 2)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(small, tuple(rng.integers(0, side - size + 1, 2).tolist()))
    return (np.asarray(canvas) * rng.uniform(0.6, 1.0, 3)).astype(np.uint8)


@lru_cache(maxsize=1)
def concept_names() -> tuple[tuple[str, int], ...]:
    """Return the concepts, the most frequent first, each with the number of its drawing. Skin tones, flags, keys and clocks are left out."""
    left_out = ("skin", "flag", "keycap", "button", "clock")
    names = {of_one["en"]: number for number, of_one in enumerate(glyphs(64).names)}
    usable = [name for name in names if len(name.split()) <= 3 and not any(word in name for word in left_out)]
    chosen = np.random.default_rng(0).permutation(sorted(usable))[:CONCEPTS]
    return tuple((str(name), names[str(name)]) for name in chosen)


@lru_cache(maxsize=1)
def zipf_pool(count: int = POOL) -> EmojiPairs:
    """Return the pool: concepts by Zipf's law, templates around their names, junk for a tenth."""
    rng, names = np.random.default_rng(1), concept_names()
    weights = np.arange(1, len(names) + 1) ** -1.2
    concepts = rng.choice(len(names), count, p=weights / weights.sum())
    captions = [
        _JUNK[rng.integers(len(_JUNK))].format(rng.integers(2000))
        if rng.random() < 0.1
        else _TEMPLATES[rng.integers(len(_TEMPLATES))].format(names[concept][0])
        for concept in concepts
    ]
    return EmojiPairs(concepts.tolist(), captions, "zipf")


def shown(source: AbstractSource, count: int, *, seed: int) -> Subset:
    """Return `count` samples as consecutive epochs show them, so that sources of any size make runs of one length."""
    order, number = np.empty(0, np.int64), 0
    while len(order) < count:
        order = np.append(order, draw_order(len(source), source.chances, np.random.default_rng([seed, number])))
        number += 1
    plain = Subset(source, order[:count].tolist(), f"{source.name}, {count} shown")
    plain.chances = None  # they have been used
    return plain


def curated(pool: AbstractSource, metadata: Metadata, kind: str, *, seed: int) -> AbstractSource:
    """Return what an arm trains on: `raw` all, `matched` those with an entry, `balanced`, `random` as many at random, `online` with chances."""
    texts = [pool.texts(index)[0].text for index in range(len(pool))]
    table = Curator(metadata, replace(mini(), seed=seed)).curate(pa.table({"caption": texts}))
    chance = table["chance"].to_numpy()
    kept = np.flatnonzero(pc.equal(table["reason"], KEPT).to_numpy())
    chosen = {
        "raw": np.arange(len(pool)),
        "matched": np.flatnonzero(chance),
        "balanced": kept,
        "random": np.random.default_rng([seed, 2]).permutation(len(pool))[: len(kept)],
    }
    if kind == "online":
        return WithChances(pool, chance)
    return Subset(pool, chosen[kind].tolist(), f"{pool.name}, {kind}")


def _on_emoji(trial: Trial, *, kind: str, tail: bool = False) -> float:
    pool = zipf_pool()
    never = [f"never seen {number}" for number in range(200)]
    usual = (template.format(name) for template in _TEMPLATES for name, _ in concept_names())
    words = frequent_words(count_ngrams(usual), least=1)[:200]
    metadata = build_metadata({"concepts": [name for name, _ in concept_names()], "words": words, "never": never})
    settings = trial.mini("clip")
    architecture = replace(settings.model.architecture, vision=VisionConfig(patch_size=16))
    settings = replace(
        settings,
        model=replace(settings.model, architecture=architecture, vocabulary=1024),
        data=LoaderConfig(batch_size=128, views=(Augment(),)),
        epochs=1,
    )
    source = shown(curated(pool, metadata, kind, seed=trial.seed), SHOWN, seed=trial.seed)
    return concept_accuracy(trial.train(settings, source), trial.split, tail=tail)


def concept_accuracy(model: DualEncoder, split: str, *, tail: bool = False, each: int = 10) -> float:
    """Return zero-shot accuracy, the mean over concepts (of the rarer half) of their own; 1 / CONCEPTS at chance."""
    names = [name for name, _ in concept_names()]
    first = len(names) // 2 if tail else 0
    labels = [concept for concept in range(first, len(names)) for _ in range(each)]
    images = embed_images(model, EmojiPairs(labels, [""] * len(labels), f"emoji {split}"))
    classes = class_embeddings(lambda texts: embed_texts(model, texts), names, _PROMPTS)
    return zero_shot(images, classes, torch.tensor(labels), names, _PROMPTS).mean_per_class.value


def _on_photos(trial: Trial, *, kind: str) -> float:
    train, validation = hold_out(open_source("flickr8k-1k:train"), 0.2, seed=0)
    metadata = caption_words()
    pool = Listed(
        [replace(s, key=f"{s.key}-{i}", texts=(text,)) for s in train for i, text in enumerate(s.texts)], train.name
    )
    frozen = ModelConfig(start="auto", vision_mode="frozen", text_mode="frozen")
    settings = replace(trial.mini("clip"), model=frozen, data=LoaderConfig(batch_size=96), epochs=1)
    source = shown(curated(pool, metadata, kind, seed=trial.seed), 24_000, seed=trial.seed)
    test = open_source("flickr8k-1k:dev") if trial.split == "test" else validation
    return entry_recall(trial.train(settings, source), test, metadata)


@lru_cache(maxsize=1)
def caption_words() -> Metadata:
    """Return words and pairs of words of other people's captions, and the numbers."""
    counts = count_ngrams(bundle_file("raw-captions", "cc3m_validation.txt").read_text(encoding="utf-8").splitlines())
    pairs = joined_words(counts, least_pmi=5, least=3)
    return build_metadata({"words": frequent_words(counts, least=3), "pairs": pairs, "numbers": NUMBERS})


def entry_recall(model: DualEncoder, source: AbstractSource, metadata: Metadata) -> float:
    """Return recall at 1 from text to image, the mean over entries of that of the captions they match, so that rare entries count alike."""
    embedded = embed_source(model, source)
    found = retrieval(embedded.images, embedded.texts, torch.tensor(embedded.owner)).text_to_image
    hits = found.ranks == 0
    matches = Matcher(metadata.entries)(pa.array(embedded.captions, pa.string()))
    rows, entries = pc.list_parent_indices(matches).to_numpy(), matches.flatten().to_numpy()
    number = np.bincount(entries, minlength=len(metadata))
    right = np.bincount(entries, hits[rows], minlength=len(metadata))
    return float((right[number > 0] / number[number > 0]).mean())
