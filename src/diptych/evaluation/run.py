"""Evaluate one model on one source: what can be measured follows from what the samples have."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diptych.config import to_json
from diptych.data.sources import AbstractSource
from diptych.errors import EvaluationError
from diptych.evaluation.probe import Probe, linear_probe, nearest_neighbours
from diptych.evaluation.retrieval import Direction, Retrieval, retrieval
from diptych.evaluation.stats import bootstrap_means, paired_difference
from diptych.evaluation.zeroshot import ZeroShot, class_embeddings, read_prompts, zero_shot
from diptych.models.dual import DualEncoder
from diptych.models.embedding import Embedded, ProgressBar, embed_source, embed_texts, folded, left_out
from diptych.models.memory import TowerMemory
from diptych.models.precision import Precision, choose_precision
from diptych.types import Interval

Task = Literal["retrieval", "zeroshot"]


@dataclass(frozen=True)
class Evaluation:
    """All that was measured, with what is needed to repeat it.

    Attributes:
        retrieval: If samples have captions.
        zeroshot: If samples have labels.
        linear_probe: If asked for.
        nearest_neighbours: If asked for.
        settings: Model, source, counts, prompts.
        seconds: Wall time by phase: data, train, evaluate, total.
        embedded: What it was measured on, for galleries.
        notes: What the reader of the numbers must know, in sentences.
    """

    retrieval: Retrieval | None
    zeroshot: ZeroShot | None
    linear_probe: Probe | None
    nearest_neighbours: Probe | None
    settings: Mapping[str, Any]
    seconds: Mapping[str, float]
    embedded: Embedded = field(repr=False)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what `metrics.json` holds."""
        result: dict[str, Any] = {}
        if self.retrieval is not None:
            result["retrieval"] = {
                "image_to_text": _direction_json(self.retrieval.image_to_text),
                "text_to_image": _direction_json(self.retrieval.text_to_image),
            }
        if self.zeroshot is not None:
            found = self.zeroshot
            result["zeroshot"] = {
                "top1": found.top1.to_json(),
                **({"top5": found.top5.to_json()} if found.top5 else {}),
                "mean_per_class": found.mean_per_class.to_json(),
                "by_domain": {name: value.to_json() for name, value in found.by_domain.items()},
            }
        for name, probe in (("linear_probe", self.linear_probe), ("nearest_neighbours", self.nearest_neighbours)):
            if probe is not None:
                result[name] = {"accuracy": probe.accuracy.to_json(), "setting": probe.setting}
        chance = {name: self.chance(name) for name in self.headline()}
        record = {"seconds": self.seconds, "settings": self.settings, "chance": chance, "notes": self.notes}
        return result | to_json(record)  # type: ignore[no-any-return]

    def headline(self) -> dict[str, Interval]:
        """Return the numbers to print, by name."""
        found: dict[str, Interval] = {}
        if self.retrieval is not None:
            for name, direction in _directions(self.retrieval):
                found |= {f"{name}/recall@{k}": value for k, value in direction.recall.items()}
        if self.zeroshot is not None:
            found["zeroshot/top1"] = self.zeroshot.top1
        if self.linear_probe is not None:
            found["linear_probe/accuracy"] = self.linear_probe.accuracy
        if self.nearest_neighbours is not None:
            found["nearest_neighbours/accuracy"] = self.nearest_neighbours.accuracy
        return found

    def details(self) -> dict[str, Interval]:
        """Return further numbers of zero-shot classification, by name: top-5, the mean over classes, and top-1 in each domain."""
        if self.zeroshot is None:
            return {}
        found = {} if self.zeroshot.top5 is None else {"zeroshot/top5": self.zeroshot.top5}
        found["zeroshot/mean_per_class"] = self.zeroshot.mean_per_class
        return found | {f"zeroshot/top1/{name}": value for name, value in self.zeroshot.by_domain.items()}

    def chance(self, name: str) -> float:
        """Return what a number of `headline` or `details` would be by guessing."""
        values: dict[str, float] = {}
        if self.retrieval is not None:
            for side, direction in _directions(self.retrieval):
                values |= {f"{side}/recall@{k}": value for k, value in direction.chance.items()}
        if self.zeroshot is not None:
            guess = 1 / len(self.zeroshot.classes)
            values |= dict.fromkeys(("zeroshot/top1", *self.details()), guess) | {"zeroshot/top5": 5 * guess}
        if self.linear_probe is not None:
            values["linear_probe/accuracy"] = self.linear_probe.chance
        if self.nearest_neighbours is not None:
            values["nearest_neighbours/accuracy"] = self.nearest_neighbours.chance
        return values[name]


def evaluate_model(
    model: DualEncoder,
    source: AbstractSource,
    *,
    tasks: tuple[Task, ...] | None = None,
    probe_source: AbstractSource | None = None,
    prompts: str = "photo",
    language: str | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: ProgressBar | None = None,
    name: str = "",
    memory: TowerMemory | None = None,
    precision: Precision = "auto",
) -> Evaluation:
    """Return what a model does on a source.

    Args:
        model: Any dual encoder.
        source: Samples with captions (retrieval), labels (zero-shot), or both.
        tasks: What to measure; None measures retrieval and zero-shot as far as the samples allow.
        probe_source: Training samples of the linear probe and the neighbours; they are measured when it is given.
        prompts: Name of the prompt file for zero-shot.
        language: Measure retrieval with the texts of this language (ISO 639-1) instead of the captions.
        batch_size: Images per forward pass.
        seed: Of the bootstrap.
        progress: Shows progress.
        name: Of the model, for the record.
        memory: Of the model and the source, where they are evaluated several times; changes no number.
        precision: Of the towers: `auto` takes bf16 where the processor has it. The record says which it was.

    Raises:
        EvaluationError: If a task is asked for that the samples do not allow, or if they allow none.
    """
    began = time.perf_counter()
    precision, _ = choose_precision(precision, model.device)
    embed = partial(
        embed_source, model, language=language, batch_size=batch_size, progress=progress, precision=precision
    )
    embedded = embed(source, memory=memory)
    wanted = tasks or _possible(embedded, source)
    settings: dict[str, Any] = {
        "model": name,
        "source": source.name,
        "fingerprint": source.fingerprint,
        "images": len(embedded.keys),
        "captions": len(embedded.captions),
        "skipped": len(embedded.skipped),
        "language": language,
        "seed": seed,
        "precision": precision,
        "image_policy": to_json(model.image_policy),
    }
    found, zeroshot, linear, neighbours = None, None, None, None
    if "retrieval" in wanted:
        found = measure_retrieval(embedded, seed=seed)
    if "zeroshot" in wanted:
        zeroshot = measure_zeroshot(model, embedded, prompts=prompts, seed=seed, memory=memory, precision=precision)
        digest = zeroshot.prompts.digest
        settings |= {"classes": len(zeroshot.classes), "prompts": prompts, "prompts_hash": digest}
    if probe_source is not None:
        train = embed(probe_source)
        linear, neighbours = _probes(train, embedded, seed)
        settings |= {
            "probe_source": probe_source.name,
            "probe_images": len(train.keys),
            "probe_fingerprint": probe_source.fingerprint,
        }
    taken = time.perf_counter() - began
    seconds = {"data": 0.0, "train": 0.0, "evaluate": taken, "total": taken}
    return Evaluation(found, zeroshot, linear, neighbours, settings, seconds, embedded, _notes(embedded, found))


def measure_retrieval(embedded: Embedded, *, seed: int = 0) -> Retrieval:
    """Return recall both ways between the images that have captions and those captions.

    Images of one group, and captions that are equal but for case and white space, are right answers for each other.

    Raises:
        EvaluationError: If there is no caption.
    """
    rows = sorted(set(embedded.owner))
    if not rows:
        raise EvaluationError("Retrieval needs captions; no sample has one.")
    place = {row: position for position, row in enumerate(rows)}
    owner = torch.tensor([place[row] for row in embedded.owner])
    return retrieval(
        embedded.images[rows],
        embedded.texts,
        owner,
        image_group=_numbers([embedded.groups[row] for row in rows]),
        text_group=_numbers([folded(caption) for caption in embedded.captions]),
        seed=seed,
    )


def compare(first: Evaluation, second: Evaluation, *, seed: int = 0) -> dict[str, Interval]:
    """Return second minus first for every number both have, paired over the same items.

    Raises:
        EvaluationError: If images, captions, labels, prompts or the training samples of the probes differ.
    """
    _check_same(first, second)
    found: dict[str, Interval] = {}
    if first.retrieval is not None and second.retrieval is not None:
        pairs = zip(_directions(first.retrieval), _directions(second.retrieval), strict=True)
        for (name, a), (_, b) in pairs:
            found |= {
                f"{name}/recall@{k}": paired_difference(a.hits(k), b.hits(k), cluster=a.cluster, seed=seed)
                for k in a.recall
            }
    for name, one, two in (
        ("zeroshot/top1", first.zeroshot, second.zeroshot),
        ("linear_probe/accuracy", first.linear_probe, second.linear_probe),
        ("nearest_neighbours/accuracy", first.nearest_neighbours, second.nearest_neighbours),
    ):
        if one is not None and two is not None:
            found[name] = paired_difference(one.correct, two.correct, seed=seed)
    return found


def compare_details(first: Evaluation, second: Evaluation, *, seed: int = 0) -> dict[str, Interval]:
    """Return second minus first for every number of `details` both have, paired over the same items.

    Raises:
        EvaluationError: As `compare` does.
    """
    _check_same(first, second)
    one, two = first.zeroshot, second.zeroshot
    if one is None or two is None:
        return {}
    found = {}
    if one.top5 is not None:
        found["zeroshot/top5"] = paired_difference(one.hits(5), two.hits(5), seed=seed)
    change = two.correct - one.correct
    labels, domains = np.array(first.embedded.labels), np.array(first.embedded.domains)
    classes = [change[labels == name, None] for name in one.classes]
    found["zeroshot/mean_per_class"] = bootstrap_means(lambda *means: np.mean(means, axis=0), *classes, seed=seed)
    for name in one.by_domain:
        here = domains == name
        found[f"zeroshot/top1/{name}"] = paired_difference(one.correct[here], two.correct[here], seed=seed)
    return found


def measure_zeroshot(
    model: DualEncoder,
    embedded: Embedded,
    *,
    prompts: str = "photo",
    seed: int = 0,
    memory: TowerMemory | None = None,
    precision: Precision = "auto",
) -> ZeroShot:
    """Return accuracies over the classes that the images have, see `evaluate_model`.

    Raises:
        EvaluationError: If an image has no label, or all have the same.
    """
    classes = sorted({label for label in embedded.labels if label is not None})
    templates = read_prompts(prompts)
    vectors = class_embeddings(
        lambda texts: embed_texts(model, texts, memory=memory, precision=precision), classes, templates
    )
    labels = _indices(embedded, classes)
    return zero_shot(embedded.images, vectors, labels, classes, templates, domains=embedded.domains, seed=seed)


def _possible(embedded: Embedded, source: AbstractSource) -> tuple[Task, ...]:
    """Return the tasks that the samples allow.

    Raises:
        EvaluationError: If they allow none.
    """
    classifiable = None not in embedded.labels and len(set(embedded.labels)) > 1
    allowed: dict[Task, bool] = {"retrieval": bool(embedded.captions), "zeroshot": classifiable}
    if not any(allowed.values()):
        raise EvaluationError(
            f"{source.name} has neither captions nor labels of two classes on every image, so there is nothing to measure. "
            "Name the columns that hold them with columns.texts or columns.label."
        )
    return tuple(task for task, possible in allowed.items() if possible)


def _probes(train: Embedded, test: Embedded, seed: int) -> tuple[Probe, Probe]:
    """Return the linear probe and the neighbours, over the classes of the training samples."""
    classes = sorted({label for label in train.labels if label is not None})
    features = (train.images, _indices(train, classes), test.images, _indices(test, classes))
    return linear_probe(*features, seed=seed), nearest_neighbours(*features, seed=seed)


def _check_same(first: Evaluation, second: Evaluation) -> None:
    one, two = first.embedded, second.embedded
    pairs: dict[str, tuple[object, object]] = {
        "images": (one.keys, two.keys),
        "captions": (one.captions, two.captions),
        "labels": (one.labels, two.labels),
    }
    if first.zeroshot is not None and second.zeroshot is not None:
        pairs["prompts"] = (first.zeroshot.prompts, second.zeroshot.prompts)
    if first.linear_probe is not None and second.linear_probe is not None:
        pairs["probe training samples"] = (first.settings["probe_fingerprint"], second.settings["probe_fingerprint"])
    if different := [name for name, (a, b) in pairs.items() if a != b]:
        raise EvaluationError(
            f"A paired comparison needs two evaluations of the same items; these differ in {', '.join(different)} "
            f"(sources {first.settings['source']} and {second.settings['source']}). Evaluate both models again in the same way."
        )


def _notes(embedded: Embedded, found: Retrieval | None) -> tuple[str, ...]:
    """Return sentences on what was left out and on numbers that say nothing."""
    notes = [*left_out(embedded.skipped)]
    if found is not None:
        captioned = len(set(embedded.owner))
        if captioned < len(embedded.keys):
            notes.append(f"{len(embedded.keys) - captioned} images without a caption take no part in retrieval.")
        for name, direction in _directions(found):
            if trivial := [k for k in direction.recall if k >= direction.candidates]:
                words = ", ".join(f"recall@{k}" for k in trivial)
                notes.append(
                    f"{name}: there are only {direction.candidates} candidates, so {words} is 1 for every model."
                )
    return tuple(notes)


def _numbers(names: list[str]) -> Tensor:
    """Return one number per name, equal for equal names."""
    place = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([place[name] for name in names])


def _indices(embedded: Embedded, classes: list[str]) -> Tensor:
    place = {name: row for row, name in enumerate(classes)}
    strange = sorted({str(label) for label in embedded.labels if label not in place})
    if strange:
        raise EvaluationError(
            f"Every image needs one of the {len(classes)} known labels ({', '.join(classes[:10])}, ...); found {strange[:5]}. "
            "Drop those images, or use the same labels in both sources."
        )
    return torch.tensor([place[str(label)] for label in embedded.labels])


def _directions(found: Retrieval) -> tuple[tuple[str, Direction], tuple[str, Direction]]:
    return ("image_to_text", found.image_to_text), ("text_to_image", found.text_to_image)


def _direction_json(direction: Direction) -> dict[str, Any]:
    return {f"recall@{k}": value.to_json() for k, value in direction.recall.items()}
