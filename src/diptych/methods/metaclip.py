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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Bool, Float64, Int64

from diptych.claims.claim import Arm, Claim, Control, Trial
from diptych.claims.measures import gains_less_than_half
from diptych.curate.balance import row_uniforms
from diptych.curate.entries import (
    BALANCED,
    NO_LIST,
    UNMATCHED,
    Balance,
    BalanceConfig,
    MatchConfig,
    Matching,
    counts_of,
    thresholds_of,
)
from diptych.curate.match import Matcher
from diptych.curate.metadata import NUMBERS, Metadata, build_metadata, count_ngrams, frequent_words, joined_words
from diptych.curate.normalise import NO_TEXT
from diptych.curate.pairs import captions_of
from diptych.curate.reasons import REASON, kept, with_column, with_reason
from diptych.data.bundles import bundle_file
from diptych.data.columns import Columns, role_of, sniff
from diptych.data.loader import LoaderConfig, draw_order
from diptych.data.sources import AbstractSource, Listed, Subset, WithChances, open_source
from diptych.data.transforms import Augment
from diptych.data.zipf import CONCEPTS, TEMPLATES, EmojiPairs, concept_names, zipf_pool
from diptych.errors import ColumnError, ConfigError
from diptych.evaluation.retrieval import retrieval
from diptych.evaluation.zeroshot import Prompts, class_embeddings, zero_shot
from diptych.models.dual import DualEncoder
from diptych.models.embedding import embed_images, embed_source, embed_texts
from diptych.models.vision import VisionConfig
from diptych.training.prepare import hold_out
from diptych.training.recipe import ModelConfig
from diptych.verbs import AbstractCurator


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
                "Give one of threshold, tail_share and size, and None for the others; metaclip has "
                f"{self.threshold}, {self.tail_share} and {self.size}."
            )

    def balance(self) -> BalanceConfig:
        """Return the settings of the step; it finds the chances, and `Curator` draws, since a row may have several texts."""
        return BalanceConfig(threshold=self.threshold, tail_share=self.tail_share, size=self.size, online=True)


class Curator(AbstractCurator):
    """Matches and balances a whole table: gives rows that do not stay a `reason`, and every row the column `chance`, how likely it is kept.

    Rows are known by their key, or by their number where the table has no keys. For a draw that is repeated in every epoch, give the chances
    to `WithChances` instead. The steps are those of `diptych curate`, which takes a pool of any size through them in parts.

    Attributes:
        counts: By language, how many texts of the last table hold each entry.
        thresholds: By language that has matches, those of the last table.
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
        if len(lists) > 1 and config.language is None:
            raise ConfigError(f"Word lists for {', '.join(lists)} need `language`, the column of each row's language.")
        matching = MatchConfig(fold_case=False, unspaced=config.unspaced)
        self.config, self._sizes = config, {code: len(one) for code, one in lists.items()}
        self._match = Matching({code: one.entries for code, one in lists.items()}, matching, processes=processes)
        self._balance = Balance(self._sizes, config.balance(), anchor=config.anchor)
        self.counts: dict[str, Int64[np.ndarray, " _entries"]] = {}
        self.thresholds: dict[str, float] = {}

    def curate(self, table: pa.Table) -> pa.Table:
        """Return the table with chances and reasons.

        Raises:
            ColumnError: If there is no column of texts, or of languages.
            DataError: If a threshold has to follow from matches, and there are none.
        """
        column, ids = _text_column(table, self.config.column), _ids_of(table)
        texts = self._with_chances(_texts_of(table, column, self.config.language))
        drawn = _drawn(texts, ids, self.config)
        row, rows = texts["row"].to_numpy(), table.num_rows

        def some(of_texts: Bool[np.ndarray, " texts"]) -> Bool[np.ndarray, " rows"]:
            return np.bincount(row[of_texts], minlength=rows) > 0

        chance = row_chances(texts["chance"].to_numpy(), row, rows, unit=self.config.unit)
        earlier = table["chance"] if "chance" in table.column_names else pa.scalar(0.0)
        table = with_column(table, "chance", pc.if_else(pa.array(kept(table)), pa.array(chance), earlier))
        if self.config.unit == "text" and pa.types.is_nested(table[column].type):
            table = with_column(table, column, _survivors(texts, drawn | ~some(drawn)[row], rows))
        table = with_reason(table, ~some(np.ones(len(row), np.bool_)), NO_TEXT)
        table = with_reason(table, some(pc.equal(texts["reason"], NO_LIST).fill_null(False).to_numpy()), NO_LIST)
        table = with_reason(table, ~some(kept(texts)), UNMATCHED)
        return with_reason(table, ~some(drawn), BALANCED)

    def _with_chances(self, texts: pa.Table) -> pa.Table:
        """Return texts with their matches and chances; 0 for those that have a reason."""
        if self.config.language is not None:
            listed = pc.is_in(texts["language"], value_set=pa.array(list(self._sizes)))
            texts = with_reason(texts, ~listed.to_numpy(), NO_LIST)
        texts = self._match.curate(texts)
        merged = self._balance.merge([self._balance.survey(texts)])
        self.counts = {code: counts_of(merged, code, size) for code, size in self._sizes.items()}
        self.thresholds = thresholds_of(merged)
        texts = self._balance.informed(merged).curate(texts)
        return with_column(texts, "chance", texts["chance"].fill_null(0.0))


def row_chances(
    chance: Float64[np.ndarray, " texts"],
    row: Int64[np.ndarray, " texts"],
    rows: int,
    *,
    unit: Literal["text", "image"],
) -> Float64[np.ndarray, " rows"]:
    """Return how likely each row is kept, in [0, 1]: that one of its texts is, or the mean over its texts, of which one is drawn first.

    Args:
        chance: Of each text.
        row: That each text belongs to.
        rows: How many there are; one without texts is never kept.
        unit: As in `Config`.
    """
    if unit == "image":
        return np.bincount(row, chance, rows) / np.maximum(np.bincount(row, minlength=rows), 1)
    lost = np.ones(rows)
    np.multiply.at(lost, row, 1 - chance)
    return 1 - lost


def _drawn(
    texts: pa.Table, ids: pa.ChunkedArray | Int64[np.ndarray, " rows"], config: Config
) -> Bool[np.ndarray, " texts"]:
    """Return which texts are drawn: each by itself, or the one of a row that was chosen before."""
    row, place, chance = (texts[name].to_numpy() for name in ("row", "place", "chance"))
    if config.unit == "image":
        number = np.bincount(row, minlength=len(ids))
        chosen = np.floor(row_uniforms(ids, config.seed, draw=1) * number)[row]
        only: Bool[np.ndarray, " texts"] = (place == chosen) & (row_uniforms(ids, config.seed)[row] < chance)
        return only
    drawn = np.zeros(len(row), np.bool_)
    for draw in range(place.max(initial=-1) + 1):
        here = place == draw
        drawn[here] = row_uniforms(ids, config.seed, draw=draw)[row[here]] < chance[here]
    return drawn


def _text_column(table: pa.Table, column: str | None) -> str:
    known = sniff(table, Columns(texts=() if column is None else (column,))).texts
    name = next((text for text in known if column is not None or role_of(text)[0] == "caption"), None)
    if name is None:
        raise ColumnError(f"No column holds texts. Name it with `column`. Known: {', '.join(table.column_names)}.")
    return name


def _texts_of(table: pa.Table, column: str, language: str | None) -> pa.Table:
    """Return a row per text that is not null: which row of the table it is in, its number there, and that row's language and reason."""
    if language is not None and language not in table.column_names:
        raise ColumnError(f"There is no column {language!r}. Known: {', '.join(table.column_names)}.")
    row, _, texts = captions_of(table[column])
    real = texts.is_valid()
    row = row[real.to_numpy(zero_copy_only=False)]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    absent = pa.nulls(len(row), pa.string())
    return pa.table(
        {
            "row": row,
            "place": place,
            "caption": texts.filter(real),
            "language": absent if language is None else table[language].take(row),
            "reason": table[REASON].take(row) if REASON in table.column_names else absent,
        }
    )


def _ids_of(table: pa.Table) -> pa.ChunkedArray | Int64[np.ndarray, " rows"]:
    key = sniff(table, Columns()).key
    return np.arange(table.num_rows) if key is None else table[key]


def _survivors(texts: pa.Table, left: Bool[np.ndarray, " texts"], rows: int) -> pa.ListArray:
    """Return the texts that are left, a list per row."""
    ends = np.concatenate([[0], np.bincount(texts["row"].to_numpy()[left], minlength=rows).cumsum()])
    return pa.ListArray.from_arrays(
        pa.array(ends, pa.int32()), texts["caption"].combine_chunks().filter(pa.array(left))
    )


def mini() -> Config:
    """Return the settings for a pool of thousands: the tail share that the paper keeps from pool to pool."""
    return Config(threshold=None, tail_share=0.06)


POOL, SHOWN = 20_000, 64_000
"""Pairs of the pool, and pairs that every arm is shown: 500 batches of 128."""
_PROMPTS = Prompts("templates of the pool", TEMPLATES[:3], "")
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
    balanced = np.flatnonzero(kept(table))
    chosen = {
        "raw": np.arange(len(pool)),
        "matched": np.flatnonzero(chance),
        "balanced": balanced,
        "random": np.random.default_rng([seed, 2]).permutation(len(pool))[: len(balanced)],
    }
    if kind == "online":
        return WithChances(pool, chance)
    return Subset(pool, chosen[kind].tolist(), f"{pool.name}, {kind}")


def _on_emoji(trial: Trial, *, kind: str, tail: bool = False) -> float:
    pool = zipf_pool(POOL)
    never = [f"never seen {number}" for number in range(200)]
    usual = (template.format(name) for template in TEMPLATES for name, _ in concept_names())
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
