"""How much it takes to mislead a model: changed images, and what is left of retrieval and of zero-shot accuracy on them.

- `pgd`: each image is moved by at most eps so that its right answers, its captions or its class, are less similar to it than the most similar wrong
  one. The baseline `noise` moves every value by eps, up or down by chance. What PGD leaves is an upper bound: a stronger attack may leave less.
- `perturbation`: what an attack has learnt, from a file or as it is, beside one noise of the same eps by chance, for all images alike.
- `words`: a wrong caption, or the name of a wrong class, is written over the image; `box` is the same box without the words.
- `corruption`: common corruptions at five severities, see `data/corruptions.py`.

Texts are never changed. Every number has its interval and its difference to the clean images, paired over the same items. Equal seeds give equal
images, whatever the batch size and the other samples are. Towers compute in fp32: rounding of gradients would make attacks weaker, and the model look
better.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional as F

from diptych.config import to_json
from diptych.data.corruptions import CORRUPTIONS, SEVERITIES, check_corruption
from diptych.data.sources import AbstractSource, Subset
from diptych.data.typography import drawable
from diptych.errors import ConfigError, EvaluationError
from diptych.evaluation.attack import Hits, hits_of
from diptych.evaluation.changes import (
    Images,
    Pixels,
    Question,
    attacked,
    corrupted,
    perturbed,
    with_noise,
    written_over,
)
from diptych.evaluation.run import Evaluation, Task, evaluate_model, measure_retrieval
from diptych.evaluation.stats import bootstrap, paired_difference
from diptych.evaluation.zeroshot import class_embeddings, zero_shot
from diptych.models.dual import DualEncoder
from diptych.models.embedding import (
    ProgressBar,
    embed_pixels,
    embed_texts,
    evaluation_view,
    folded,
    no_progress,
)
from diptych.models.perturbation import LEVELS, AbstractPerturbation, as_floats, load_perturbation, sign_noise
from diptych.models.pgd import PGDConfig
from diptych.types import Interval

Family = Literal["clean", "noise", "pgd", "perturbation", "box", "words", "corruption"]
SHOWN = 4
"""Images that are kept with all their changes, to be looked at."""

SHOWN_SEVERITY = 3
ALL_CORRUPTIONS = "all corruptions"


@dataclass(frozen=True)
class RobustnessConfig:
    """What is done to the images.

    Attributes:
        eps: Bounds of PGD and of its noise, in levels of 255; none leaves both out. 1, 2 and 4 are usual for these models.
        steps: Gradients of PGD.
        step_size: Of one step, in units of eps.
        universal: File with one noise for all images: .safetensors, .npy, or a picture.
        words: Whether a wrong text is written over the images.
        corruptions: Kinds, all of `CORRUPTIONS` when absent; none leaves them out.
        images: At most so many are drawn, with `seed`; they are kept in memory.
        seed: Of all that is random, and of the intervals.
    """

    eps: tuple[float, ...] = (1.0, 4.0)
    steps: int = 10
    step_size: float = 0.25
    universal: Path | None = None
    words: bool = True
    corruptions: tuple[str, ...] = tuple(CORRUPTIONS)
    images: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for eps in self.eps:
            PGDConfig(eps, self.steps, self.step_size)
        for kind in self.corruptions:
            check_corruption(kind, SEVERITIES[0])
        if self.images < 2:
            raise ConfigError(f"robustness.images must be at least 2, not {self.images}.")


@dataclass(frozen=True)
class Score:
    """One number on changed images.

    Attributes:
        value: Share of right answers.
        change: Minus the share on the clean images, paired over the same items; negative where the model lost.
    """

    value: Interval
    change: Interval


@dataclass(frozen=True)
class Row:
    """One change of the images and what it did.

    Attributes:
        family: Kind of change.
        name: For people, unique within an audit.
        scores: By the name of the metric: image_to_text/recall@1, text_to_image/recall@1, zeroshot/top1.
        severity: Of a corruption; None for its mean over all five, and for other changes.
    """

    family: Family
    name: str
    scores: Mapping[str, Score]
    severity: int | None = None


@dataclass(frozen=True)
class Answers:
    """Which answers were right, by the name of the metric; the rest as in `Row`."""

    family: Family
    name: str
    hits: Mapping[str, Hits]
    severity: int | None = None


@dataclass(frozen=True)
class Picture:
    """One image under every change.

    Attributes:
        key: Of the sample.
        shown: By the name of the row; corruptions at severity 3.
    """

    key: str
    shown: Mapping[str, UInt8[np.ndarray, "h w 3"]]


@dataclass(frozen=True)
class Audit:
    """What a model withstands.

    Attributes:
        rows: The first is clean; attacks stand below their baselines, means of corruptions at the end.
        chance: Of each metric.
        settings: Model, source, counts, everything needed to repeat it.
        notes: What the reader must know, in sentences.
        pictures: A few images with all their changes.
        answers: Row by row, what the scores were made of, to compare it with another audit.
    """

    rows: tuple[Row, ...]
    chance: Mapping[str, float]
    settings: Mapping[str, Any]
    notes: tuple[str, ...]
    pictures: tuple[Picture, ...] = field(repr=False)
    answers: tuple[Answers, ...] = field(default=(), repr=False, compare=False)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the names of what was measured."""
        return tuple(self.chance)

    def corruption_error(self, metric: str) -> Interval | None:
        """Return the mean share of wrong answers over all kinds and severities of corruption; None where there were none.

        Not divided by that of another model, as the mCE of Hendrycks and Dietterich 2019, equation in section 4.3, is by AlexNet's.
        """
        found = self._corrupted(metric)
        return None if found is None else Interval(1 - found.value.value, 1 - found.value.high, 1 - found.value.low)

    def relative_corruption_error(self, metric: str) -> Interval | None:
        """Return `corruption_error` minus the share of wrong answers on clean images; None where there was no corruption."""
        found = self._corrupted(metric)
        return None if found is None else Interval(-found.change.value, -found.change.high, -found.change.low)

    def _corrupted(self, metric: str) -> Score | None:
        return next((row.scores[metric] for row in self.rows if row.name == ALL_CORRUPTIONS), None)

    def summary(self) -> tuple[Row, ...]:
        """Return the rows without those of single severities."""
        return tuple(row for row in self.rows if row.severity is None)

    def lines(self) -> Iterator[str]:
        """Yield what was found, for the terminal."""
        for metric in self.metrics:
            yield f"{metric}, {self.chance[metric]:.3f} at chance:"
            for row in self.summary():
                score = row.scores[metric]
                yield f"  {row.name:32} {score.value}" + (f"  {score.change.signed()}" if row.family != "clean" else "")
            error, relative = self.corruption_error(metric), self.relative_corruption_error(metric)
            if error is not None and relative is not None:
                yield f"  mean corruption error {error}, {relative.signed()} beside clean images"

    def to_json(self) -> dict[str, Any]:
        """Return everything but the pictures as plain JSON values."""
        errors = {
            metric: {"mean": asdict(mean), "relative": asdict(relative)}
            for metric in self.metrics
            if (mean := self.corruption_error(metric)) and (relative := self.relative_corruption_error(metric))
        }
        rows = [asdict(row) for row in self.rows]
        record = {"chance": self.chance, "settings": self.settings, "notes": self.notes}
        return {"rows": rows, "corruption_error": errors, **to_json(record)}


@dataclass(frozen=True)
class Change:
    """One way to change all images.

    Attributes:
        family: See `Row`.
        name: See `Row`.
        make: Returns the changed images.
        depends: Whether they depend on the question.
        severity: See `Row`.
    """

    family: Family
    name: str
    make: Callable[[Question], Pixels]
    depends: bool = False
    severity: int | None = None


def audit(
    model: DualEncoder,
    source: AbstractSource,
    config: RobustnessConfig = RobustnessConfig(),
    *,
    perturbations: Mapping[str, AbstractPerturbation] = {},
    tasks: tuple[Task, ...] | None = None,
    prompts: str = "photo",
    language: str | None = None,
    batch_size: int = 64,
    progress: ProgressBar | None = None,
    name: str = "",
) -> Audit:
    """Return what a model withstands: recall at 1 where samples have captions, zero-shot accuracy where they have labels.

    Args:
        model: White box; it is left as it is.
        source: Samples that were not trained on.
        config: What is done to the images.
        perturbations: What attacks have learnt, by name, beside the one that `config` names.
        tasks: What to measure; None measures retrieval and zero-shot as far as the samples allow.
        prompts: Name of the prompt file for zero-shot.
        language: Take the captions of this language (ISO 639-1).
        batch_size: Images per pass.
        progress: Shows progress.
        name: Of the model, for the record.

    Raises:
        EvaluationError: If samples have neither captions nor labels of two classes, or all are of one group.
    """
    drawn = draw(source, config)
    clean = evaluate_model(
        model,
        drawn,
        tasks=tasks,
        prompts=prompts,
        language=language,
        batch_size=batch_size,
        seed=config.seed,
        name=name,
        precision="fp32",
    )
    embedded = clean.embedded
    pixels = torch.stack([evaluation_view(model, drawn[row]) for row in embedded.rows])
    images = Images(pixels, embedded.keys, config.seed)
    questions = tuple(_questions(model, clean))
    changes = tuple(_changes(model, images, config, perturbations, batch_size))
    before = {metric: hits for question in questions for metric, hits in question.ask(embedded.images).items()}
    found = [Answers("clean", "clean", before)]
    shown = [{"clean": picture} for picture in _pictures(pixels)]
    bar = progress or no_progress
    with bar("auditing", len(changes)) as advance:
        for change in changes:
            hits: dict[str, Hits] = {}
            for asked in [[question] for question in questions] if change.depends else [questions]:
                changed = change.make(asked[0])
                seen = embed_pixels(model, iter(changed), batch_size)
                hits |= {metric: h for question in asked for metric, h in question.ask(seen).items()}
            found.append(Answers(change.family, change.name, hits, change.severity))
            if change.severity in (None, SHOWN_SEVERITY):
                for pictures, picture in zip(shown, _pictures(changed), strict=True):
                    pictures[change.name] = picture
            advance(1)
    found += list(_means(found))
    return Audit(
        tuple(Row(a.family, a.name, _scores(before, a.hits, config.seed), a.severity) for a in found),
        {metric: clean.chance(metric) for metric in before},
        {**clean.settings, "robustness": to_json(config)},
        (*clean.notes, *_notes(questions, config)),
        tuple(Picture(key, pictures) for key, pictures in zip(embedded.keys, shown, strict=False)),
        tuple(found),
    )


def compare_audits(first: Audit, second: Audit) -> dict[str, dict[str, Interval]]:
    """Return second minus first, paired over the same items: for every metric, every row of `Audit.summary` by its name.

    Each model is shown its own changes: PGD climbs the gradients of the model that is audited, and images have its size. Where clean scores
    differ, so do those on changed images; look at both.

    Raises:
        EvaluationError: If samples, prompts or what was done to the images differ.
    """
    settings = (first.settings.keys() | second.settings.keys()) - {"model", "image_policy"}
    different = sorted(name for name in settings if first.settings.get(name) != second.settings.get(name))
    if [answers.name for answers in first.answers] != [answers.name for answers in second.answers]:
        different.append("changes of the images")
    if different:
        raise EvaluationError(
            f"Two audits can be compared on equal samples that were changed in equal ways; these differ in {', '.join(different)}. Audit both "
            "models with the same settings."
        )
    seed, pairs = int(first.settings["seed"]), list(zip(first.answers, second.answers, strict=True))
    return {
        metric: {
            one.name: paired_difference(
                one.hits[metric].right, two.hits[metric].right, cluster=one.hits[metric].cluster, seed=seed
            )
            for one, two in pairs
            if one.severity is None
        }
        for metric in first.metrics
    }


def draw(source: AbstractSource, config: RobustnessConfig) -> AbstractSource:
    """Return the samples that are audited, in the order of the source."""
    if len(source) <= config.images:
        return source
    order = np.random.default_rng([config.seed, len(source)]).permutation(len(source))
    return Subset(source, sorted(order[: config.images].tolist()), f"{source.name} ({config.images} of {len(source)})")


def _changes(
    model: DualEncoder,
    images: Images,
    config: RobustnessConfig,
    perturbations: Mapping[str, AbstractPerturbation],
    batch_size: int,
) -> Iterator[Change]:
    """Yield what is done to the images, each attack behind its baseline."""
    for eps in config.eps:
        settings = PGDConfig(eps, config.steps, config.step_size)
        attack = partial(attacked, images, model=model, config=settings, batch_size=batch_size)
        yield Change("noise", f"noise, eps {eps:g}", partial(with_noise, images, eps=eps))
        yield Change("pgd", f"PGD, eps {eps:g}", attack, depends=True)
    given = {} if config.universal is None else {config.universal.name: load_perturbation(config.universal)}
    for name, perturbation in {**given, **perturbations}.items():
        eps = perturbation.eps
        noise = sign_noise(model.image_policy.size, eps, seed=config.seed)
        baseline = partial(perturbed, images, perturbation=noise)
        yield Change("noise", f"one noise for all, eps {eps:.3g}", baseline)
        yield Change("perturbation", f"{name}, eps {eps:.3g}", partial(perturbed, images, perturbation=perturbation))
    if config.words:
        yield Change("box", "empty box", partial(written_over, images, written=False), depends=True)
        yield Change("words", "wrong words", partial(written_over, images, written=True), depends=True)
    for kind in config.corruptions:
        for severity in SEVERITIES:
            change = partial(corrupted, images, kind=kind, severity=severity)
            yield Change("corruption", kind, change, severity=severity)


def _questions(model: DualEncoder, clean: Evaluation) -> Iterator[Question]:
    """Yield what the samples allow to ask.

    Raises:
        EvaluationError: If every answer is right for an image.
    """
    embedded, seed = clean.embedded, int(clean.settings["seed"])
    if clean.retrieval is not None:
        spoken = [folded(caption) for caption in embedded.captions]
        told = {(embedded.groups[row], text) for row, text in zip(embedded.owner, spoken, strict=True)}
        right = torch.tensor([[(group, text) in told for text in spoken] for group in embedded.groups])
        if right.all(1).any():
            raise EvaluationError(
                f"Every caption of {clean.settings['source']} is right for one of its images. Audit with samples of several groups."
            )

        def retrieve(seen: Tensor) -> Mapping[str, Hits]:
            found = measure_retrieval(replace(embedded, images=seen), seed=seed)
            return _at_1(replace(clean, retrieval=found, zeroshot=None))

        yield Question(embedded.captions, embedded.texts, right, retrieve)
    if clean.zeroshot is not None:
        classes, templates = clean.zeroshot.classes, clean.zeroshot.prompts
        labels = torch.tensor([classes.index(str(label)) for label in embedded.labels])
        vectors = class_embeddings(lambda texts: embed_texts(model, texts), classes, templates)

        def classify(seen: Tensor) -> Mapping[str, Hits]:
            found = zero_shot(seen, vectors, labels, classes, templates, seed=seed)
            return _at_1(replace(clean, retrieval=None, zeroshot=found))

        yield Question(classes, vectors, F.one_hot(labels, len(classes)).bool(), classify)


def _at_1(evaluation: Evaluation) -> dict[str, Hits]:
    return {name: hits for name, hits in hits_of(evaluation).items() if name.endswith(("recall@1", "top1"))}


def _scores(before: Mapping[str, Hits], after: Mapping[str, Hits], seed: int) -> dict[str, Score]:
    return {
        metric: Score(
            bootstrap(hits.right, cluster=hits.cluster, seed=seed),
            paired_difference(before[metric].right, hits.right, cluster=hits.cluster, seed=seed),
        )
        for metric, hits in after.items()
    }


def _means(found: Sequence[Answers]) -> Iterator[Answers]:
    """Yield the mean of all corruptions, and of each kind over its severities; nothing where there is none."""
    corruptions = [answers for answers in found if answers.family == "corruption"]
    if corruptions:
        yield Answers("corruption", ALL_CORRUPTIONS, _mean([answers.hits for answers in corruptions]))
    for kind in dict.fromkeys(answers.name for answers in corruptions):
        yield Answers("corruption", kind, _mean([answers.hits for answers in corruptions if answers.name == kind]))


def _mean(several: Sequence[Mapping[str, Hits]]) -> dict[str, Hits]:
    return {
        metric: replace(first, right=np.mean([hits[metric].right for hits in several], 0))
        for metric, first in several[0].items()
    }


def _pictures(pixels: Pixels) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Return the first images, in levels."""
    some = (as_floats(pixels[:SHOWN]) * LEVELS).round().byte()
    return list(some.permute(0, 2, 3, 1).numpy())


def _notes(questions: Sequence[Question], config: RobustnessConfig) -> Iterator[str]:
    if config.eps:
        yield "What PGD leaves is an upper bound: a stronger attack may leave less."
    strange = sum(not drawable(words) for question in questions for words in question.answers)
    if config.words and strange:
        yield f"The font that words are written with lacks letters of {strange} texts; it has Latin ones."
