"""Evaluate one model on one source: what can be measured follows from what the samples have."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from diptych.config import to_json
from diptych.data.sources import AbstractSource
from diptych.errors import EvaluationError
from diptych.evaluation.probe import Probe, linear_probe, nearest_neighbours
from diptych.evaluation.retrieval import Direction, Retrieval, retrieval
from diptych.evaluation.stats import paired_difference
from diptych.evaluation.zeroshot import ZeroShot, class_embeddings, read_prompts, zero_shot
from diptych.models.dual import DualEncoder
from diptych.models.embedding import Embedded, ProgressBar, embed_source, embed_texts
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
    """

    retrieval: Retrieval | None
    zeroshot: ZeroShot | None
    linear_probe: Probe | None
    nearest_neighbours: Probe | None
    settings: Mapping[str, Any]
    seconds: Mapping[str, float]
    embedded: Embedded = field(repr=False)

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
                "top1": _interval_json(found.top1),
                **({"top5": _interval_json(found.top5)} if found.top5 else {}),
                "mean_per_class": _interval_json(found.mean_per_class),
                "by_domain": {name: _interval_json(value) for name, value in found.by_domain.items()},
                "chance": 1 / len(found.classes),
            }
        for name, probe in (("linear_probe", self.linear_probe), ("nearest_neighbours", self.nearest_neighbours)):
            if probe is not None:
                result[name] = {"accuracy": _interval_json(probe.accuracy), "setting": probe.setting}
        return result | {"seconds": dict(self.seconds), "settings": dict(self.settings)}

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

    def chance(self, name: str) -> float | None:
        """Return what a number of `headline` would be by guessing, None where that is not simple."""
        if self.zeroshot is not None and name == "zeroshot/top1":
            return 1 / len(self.zeroshot.classes)
        if self.retrieval is not None and "/recall@" in name:
            direction, _, k = name.partition("/recall@")
            found = dict(_directions(self.retrieval))[direction]
            right = len(self.embedded.captions) / len(self.embedded.keys) if direction == "image_to_text" else 1.0
            return min(1.0, int(k) * right / found.candidates)
        return None


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

    Raises:
        EvaluationError: If a task is asked for that the samples do not allow, or if they allow none.
    """
    began = time.perf_counter()
    embedded = embed_source(model, source, language=language, batch_size=batch_size, progress=progress)
    possible: dict[Task, bool] = {"retrieval": bool(embedded.captions), "zeroshot": all(embedded.labels)}
    wanted = tasks or tuple(task for task, allowed in possible.items() if allowed)
    if not wanted:
        raise EvaluationError(f"{source.name} has neither captions nor labels, so there is nothing to measure.")
    settings: dict[str, Any] = {
        "model": name,
        "source": source.name,
        "fingerprint": source.fingerprint,
        "images": len(embedded.keys),
        "captions": len(embedded.captions),
        "skipped": len(embedded.skipped),
        "seed": seed,
        "image_policy": to_json(model.image_policy),
    }
    found_retrieval = found_zeroshot = found_linear = found_neighbours = None
    if "retrieval" in wanted:
        found_retrieval = measure_retrieval(embedded, seed=seed)
    if "zeroshot" in wanted:
        found_zeroshot = _measure_zeroshot(model, embedded, prompts, seed)
        settings |= {"prompts": prompts, "prompts_hash": found_zeroshot.prompts.digest}
    if probe_source is not None:
        train = embed_source(model, probe_source, language=language, batch_size=batch_size, progress=progress)
        classes = sorted({label for label in train.labels if label is not None})
        features = (train.images, _indices(train, classes), embedded.images, _indices(embedded, classes))
        found_linear = linear_probe(*features, seed=seed)
        found_neighbours = nearest_neighbours(*features, seed=seed)
        settings |= {"probe_source": probe_source.name, "probe_images": len(train.keys)}
    seconds = time.perf_counter() - began
    return Evaluation(
        found_retrieval,
        found_zeroshot,
        found_linear,
        found_neighbours,
        settings,
        {"data": 0.0, "train": 0.0, "evaluate": seconds, "total": seconds},
        embedded,
    )


def measure_retrieval(embedded: Embedded, *, seed: int = 0) -> Retrieval:
    """Return recall both ways between the images that have captions and those captions."""
    rows = sorted(set(embedded.owner))
    if not rows:
        raise EvaluationError("Retrieval needs captions; no sample has one.")
    place = {row: position for position, row in enumerate(rows)}
    owner = torch.tensor([place[row] for row in embedded.owner])
    return retrieval(embedded.images[rows], embedded.texts, owner, seed=seed)


def compare(first: Evaluation, second: Evaluation, *, seed: int = 0) -> dict[str, Interval]:
    """Return second minus first for every number both have, paired over the same items.

    Raises:
        EvaluationError: If the two were not measured on the same items with the same prompts.
    """
    for key in ("fingerprint", "prompts_hash", "images", "captions"):
        if first.settings.get(key) != second.settings.get(key):
            raise EvaluationError(
                f"The evaluations differ in {key} ({first.settings.get(key)} and {second.settings.get(key)}); "
                "a paired comparison needs the same items and prompts."
            )
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


def _measure_zeroshot(model: DualEncoder, embedded: Embedded, prompts: str, seed: int) -> ZeroShot:
    classes = sorted({label for label in embedded.labels if label is not None})
    templates = read_prompts(prompts)
    vectors = class_embeddings(lambda texts: embed_texts(model, texts), classes, templates)
    labels = _indices(embedded, classes)
    return zero_shot(embedded.images, vectors, labels, classes, templates, domains=embedded.domains, seed=seed)


def _indices(embedded: Embedded, classes: list[str]) -> Tensor:
    place = {name: row for row, name in enumerate(classes)}
    strange = sorted({str(label) for label in embedded.labels if label not in place})
    if strange:
        raise EvaluationError(f"Every image needs a label among {classes[:10]}; found {strange[:5]}.")
    return torch.tensor([place[str(label)] for label in embedded.labels])


def _directions(found: Retrieval) -> tuple[tuple[str, Direction], tuple[str, Direction]]:
    return ("image_to_text", found.image_to_text), ("text_to_image", found.text_to_image)


def _direction_json(direction: Direction) -> dict[str, Any]:
    return {f"recall@{k}": _interval_json(value) for k, value in direction.recall.items()}


def _interval_json(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}
