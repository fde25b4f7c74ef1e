"""How well anomalies are found and outlined: image AUROC and AP, pixel AUROC, AUPRO, each with its interval.

Intervals are bootstrapped over images, normal and abnormal ones separately, so that both are in every resample; all pixels of an image go
together. Nothing is binned: pairs of pixels are counted once for each pair of images, and a resample weights the counts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from diptych.data.components import connected_components
from diptych.data.images import decode
from diptych.data.sources import AbstractSource
from diptych.data.transforms import ImagePolicy, uncut
from diptych.errors import EvaluationError, ImageError
from diptych.evaluation.stats import RESAMPLES
from diptych.types import Batch, Interval, Sample

MAX_FPR, STEPS = 0.3, 200


@dataclass(frozen=True)
class AnomalyMaps:
    """What a detector says of a batch.

    Attributes:
        maps: One per image, higher is more abnormal.
        scores: One per image, alike.
    """

    maps: Float[Tensor, "b h w"]
    scores: Float[Tensor, " b"]


@dataclass(frozen=True)
class Found:
    """What a detector said of a source.

    Attributes:
        rows: Of the images, in their source.
        classes: What each image shows: domain of its sample.
        scores: One per image.
        maps: One per image, of the mask's size where there is one.
        masks: True at abnormal pixels; None where nobody knows.
        skipped: Images left out because they could not be read, with reasons.
    """

    rows: tuple[int, ...]
    classes: tuple[str | None, ...]
    scores: Float[Tensor, " n"]
    maps: tuple[Float[Tensor, "_h _w"], ...]
    masks: tuple[Bool[Tensor, "_h _w"] | None, ...]
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Anomaly:
    """What was found.

    Attributes:
        image_auroc: How often an abnormal image scores above a normal one, ties counted half; 0.5 at chance. None without both kinds.
        image_ap: Average precision over images; the share of abnormal ones at chance. None without both kinds.
        pixel_auroc: How often an abnormal pixel scores above a normal one, over all images; 0.5 at chance. None without masks.
        aupro: Mean overlap with each defect, over false positive rates up to 0.3; see `aupro`. None without masks.
        normal: Number of normal images.
        abnormal: Number of abnormal images.
        abnormal_pixels: Their share of all pixels.
    """

    image_auroc: Interval | None
    image_ap: Interval | None
    pixel_auroc: Interval | None
    aupro: Interval | None
    normal: int
    abnormal: int
    abnormal_pixels: float

    def headline(self) -> dict[str, Interval]:
        """Return the numbers there are, by name."""
        names = ("image_auroc", "image_ap", "pixel_auroc", "aupro")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def chance(self, name: str) -> float:
        """Return what a number of `headline` would be for random scores and maps."""
        if name == "image_ap":
            return self.abnormal / (self.normal + self.abnormal)
        return MAX_FPR / 2 if name == "aupro" else 0.5


def detect(
    detector: Callable[[Sample], Callable[[Batch], AnomalyMaps]],
    source: AbstractSource,
    policy: ImagePolicy,
    *,
    advance: Callable[[int], None] = lambda done: None,
) -> Found:
    """Return scores and maps of images, one at a time since they differ in size.

    Args:
        detector: Returns what looks at a sample, such as the one for its product. It is given one image with its short side as the policy says
            and nothing cut off.
        source: Where samples have masks, maps are resized to them: bilinear, so that no thin defect is lost in resizing its mask.
        policy: Of the model.
        advance: Progress.
    """
    rows, classes, scores, maps, masks, skipped = [], [], [], list[Tensor](), list[Tensor | None](), []
    for row in range(len(source)):
        advance(1)
        try:
            sample = source[row]
            if sample.image is None:
                raise ImageError("there is none.")
            pixels = uncut(decode(sample.image, background=policy.background), policy)
        except ImageError as error:
            skipped.append(f"The image of sample {row} of {source.name} cannot be used: {error}")
            continue
        said = detector(sample)(Batch((sample.key,), (pixels[None],), (), torch.zeros(1, dtype=torch.int64)))
        mask = None if sample.mask is None else torch.from_numpy(sample.mask > 0)
        resized = said.maps if mask is None else F.interpolate(said.maps[None], tuple(mask.shape), mode="bilinear")[0]
        rows.append(row)
        classes.append(sample.domain)
        scores.append(said.scores)
        maps.append(resized[0])
        masks.append(mask)
    every = torch.cat([torch.zeros(0), *scores])
    return Found(tuple(rows), tuple(classes), every, tuple(maps), tuple(masks), tuple(skipped))


def measure_found(found: Found, *, seed: int = 0) -> dict[str, Anomaly]:
    """Return what `measure_anomaly` gives for each class, by its name; images without a known mask are left out.

    The protocol of the field is the mean over classes: a map need not be comparable between a bottle and a carpet.
    """
    places = [place for place, mask in enumerate(found.masks) if mask is not None]
    names = dict.fromkeys(found.classes[place] or "" for place in places)
    measured = {}
    for name in names:
        own = [place for place in places if (found.classes[place] or "") == name]
        masks = [mask for place in own if (mask := found.masks[place]) is not None]
        measured[name] = measure_anomaly(found.scores[own], [found.maps[place] for place in own], masks, seed=seed)
    return measured


def class_means(measured: Mapping[str, Anomaly]) -> dict[str, float]:
    """Return the mean over classes of each number, over those classes that have it."""
    values: dict[str, list[float]] = {}
    for one in measured.values():
        for name, interval in one.headline().items():
            values.setdefault(name, []).append(interval.value)
    return {name: fmean(numbers) for name, numbers in values.items()}


def measure_anomaly(
    scores: Float[Tensor, " n"],
    maps: Sequence[Float[Tensor, "_h _w"]],
    masks: Sequence[Bool[Tensor, "_h _w"]],
    *,
    seed: int = 0,
) -> Anomaly:
    """Return the four numbers over all images; several classes are best measured one by one and averaged.

    Args:
        scores: One per image, higher is more abnormal.
        maps: One per image, alike per pixel. Images may differ in size.
        masks: True at abnormal pixels; an image without any is normal.
        seed: Of the 2,000 resamples.

    Raises:
        EvaluationError: If lengths or sizes differ, or a value is not finite.
    """
    if not len(scores) == len(maps) == len(masks):
        raise EvaluationError(
            f"Each image needs a score, a map and a mask; there are {len(scores)}, {len(maps)} and {len(masks)}."
        )
    abnormal = np.array([bool(mask.any()) for mask in masks])
    pixels, wrong = sum(mask.numel() for mask in masks), sum(int(mask.sum()) for mask in masks)
    both, marked = 0 < abnormal.sum() < len(masks), 0 < wrong < pixels
    draws = resample(abnormal, seed=seed)
    return Anomaly(
        image_auroc(scores, abnormal, draws) if both else None,
        image_ap(scores, abnormal, draws) if both else None,
        pixel_auroc(maps, masks, draws) if marked else None,
        aupro(maps, masks, draws) if marked else None,
        int((~abnormal).sum()),
        int(abnormal.sum()),
        wrong / max(1, pixels),
    )


def resample(abnormal: Bool[np.ndarray, " n"], *, seed: int = 0) -> Float[np.ndarray, "resamples n"]:
    """Return how often each image is drawn in each resample; as many normal and as many abnormal ones as there are."""
    rng, counts = np.random.default_rng(seed), np.zeros((RESAMPLES, len(abnormal)))
    for rows in (np.flatnonzero(abnormal), np.flatnonzero(~abnormal)):
        if len(rows):
            counts[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=RESAMPLES)
    return counts


def image_auroc(
    scores: Float[Tensor, " n"], abnormal: Bool[np.ndarray, " n"], draws: Float[np.ndarray, "resamples n"]
) -> Interval:
    """Return how often an abnormal image scores above a normal one, ties counted half; 0.5 at chance.

    Raises:
        EvaluationError: If one of the two kinds is missing, or a score is not finite.
    """
    values = _finite(scores)
    _check_both(abnormal)
    above = values[abnormal][:, None] - values[~abnormal]
    wins = (above > 0) + (above == 0) / 2
    resampled = ((draws[:, abnormal] @ wins) * draws[:, ~abnormal]).sum(1) / wins.size
    return _interval(float(wins.mean()), resampled)


def image_ap(
    scores: Float[Tensor, " n"], abnormal: Bool[np.ndarray, " n"], draws: Float[np.ndarray, "resamples n"]
) -> Interval:
    """Return average precision: sum over thresholds of (recall gained) x precision; equal scores pass a threshold together.

    At chance it is the share of abnormal images.

    Raises:
        EvaluationError: If one of the two kinds is missing, or a score is not finite.
    """
    values = _finite(scores)
    _check_both(abnormal)
    order = np.argsort(-values, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)
    weights = np.vstack([np.ones(len(values)), draws])[:, order]
    found, taken = (np.cumsum(w, 1)[:, ends] for w in (weights * abnormal[order], weights))
    gained = np.diff(found, prepend=0, axis=1) / found[:, -1:]
    precision = found / np.maximum(taken, 1)
    every = (gained * precision).sum(1)
    return _interval(float(every[0]), every[1:])


def within_faulty(found: Found, name: str) -> float:
    """Return the pixel AUROC over the faulty images of a class: where the fault is, and nothing of which image has one.

    A map that only knows which images are faulty has 0.5.
    """
    pairs = [
        (scores, mask)
        for scores, mask, own in zip(found.maps, found.masks, found.classes, strict=True)
        if own == name and mask is not None and mask.any()
    ]
    maps, masks = zip(*pairs, strict=True)
    return pixel_auroc(maps, masks, np.ones((1, len(pairs)))).value


def pixel_auroc(
    maps: Sequence[Float[Tensor, "_h _w"]],
    masks: Sequence[Bool[Tensor, "_h _w"]],
    draws: Float[np.ndarray, "resamples n"],
) -> Interval:
    """Return how often an abnormal pixel scores above a normal one, pixels of all images compared with each other; 0.5 at chance.

    Work: abnormal pixels x images x log(pixels of an image).

    Raises:
        EvaluationError: If no pixel is abnormal or none normal, sizes differ, or a value is not finite.
    """
    wrong, normal = _split(maps, masks)
    sizes = np.array([[len(part) for part in wrong], [len(part) for part in normal]], dtype=np.float64)
    if not sizes.sum(1).all():
        raise EvaluationError("A pixel AUROC needs abnormal and normal pixels; one of the two is missing in the masks.")
    owner, values = np.repeat(np.arange(len(wrong)), sizes[0].astype(int)), np.concatenate(wrong)
    order = np.argsort(values)
    owner, values = owner[order], values[order]  # sorted queries find their places several times as fast
    wins = np.empty((len(wrong), len(normal)))
    for column, pixels in enumerate(normal):
        ordered = np.sort(pixels)
        below, up_to = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
        wins[:, column] = np.bincount(owner, (below + up_to) / 2, len(wrong))
    resampled = ((draws @ wins) * draws).sum(1) / (draws @ sizes[0]) / (draws @ sizes[1])
    return _interval(float(wins.sum() / sizes[0].sum() / sizes[1].sum()), resampled)


def aupro(
    maps: Sequence[Float[Tensor, "_h _w"]],
    masks: Sequence[Bool[Tensor, "_h _w"]],
    draws: Float[np.ndarray, "resamples n"],
    *,
    max_fpr: float = MAX_FPR,
    steps: int = STEPS,
) -> Interval:
    """Return the area under the per-region overlap curve, in [0, 1]; 1 for a perfect map.

    Thresholds are min + k (max - min) / steps over all maps, k = 0 to steps - 1; a pixel above one is called abnormal. At each, the overlap
    is the mean over defects (8-connected regions of the masks) of the share of their pixels that are called so, and the rate is the share of
    all normal pixels that are. The area is that of overlap over rate, by trapezoids, where the rate is below `max_fpr`; those rates are
    stretched to [0, 1] by their least and largest first; a map whose calls are all of one rate has its largest overlap. A random map has
    max_fpr / 2 where thresholds are dense. The paper of the metric reads the curve at `max_fpr` itself and divides by it, which is the same
    in the limit of dense thresholds.

    Raises:
        EvaluationError: If no pixel is abnormal, sizes differ, a value is not finite, the maps are constant, or the rate is below `max_fpr`
            at no threshold.

    Source: Bergmann et al. 2021 (IJCV), section 5.1, in the form that the code of AnoVL and of many others has.
    """
    _, normal = _split(maps, masks)
    low, high = (float(edge([edge(x.numpy()) for x in maps])) for edge in (np.min, np.max))
    if high == low:
        raise EvaluationError(f"All maps are constant, {low}, so there is nothing to put a threshold between.")
    thresholds = low + np.arange(steps) * (high - low) / steps
    called = np.stack([_share_above(pixels, thresholds) * len(pixels) for pixels in normal])
    owner, overlaps = [], []
    for row, (scores, mask) in enumerate(zip(maps, masks, strict=True)):
        component = connected_components(mask.numpy())
        for number in range(1, component.max(initial=0) + 1):
            owner.append(row)
            overlaps.append(_share_above(scores.numpy()[component == number].astype(np.float64), thresholds))
    if not overlaps:
        raise EvaluationError("AUPRO needs at least one abnormal region, and no pixel of the masks is abnormal.")
    weights = np.vstack([np.ones(draws.shape[1]), draws])
    of_regions = weights[:, owner]
    overlap = of_regions @ np.stack(overlaps) / of_regions.sum(1, keepdims=True)
    rate = weights @ called / (weights @ np.array([len(pixels) for pixels in normal], dtype=np.float64))[:, None]
    every = np.array([_area(*pair, max_fpr) for pair in zip(rate, overlap, strict=True)])
    if np.isnan(every[0]):
        raise EvaluationError(
            f"The false positive rate is below {max_fpr} at none of {steps} thresholds: too many normal pixels have the highest scores. Raise steps."
        )
    return _interval(float(every[0]), every[1:])


def _area(rate: np.ndarray, overlap: np.ndarray, max_fpr: float) -> float:
    """Return the area of one curve, or NaN where no rate is below the largest."""
    kept = rate < max_fpr
    if not kept.any():
        return float("nan")
    if (span := np.ptp(rate[kept])) == 0:
        return float(overlap[kept].max())
    x = (rate[kept] - rate[kept].min()) / span
    return float(np.sum((x[:-1] - x[1:]) * (overlap[kept][:-1] + overlap[kept][1:])) / 2)  # rates fall


def _share_above(values: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    return 1 - np.searchsorted(np.sort(values), thresholds, side="right") / max(1, len(values))


def _split(
    maps: Sequence[Float[Tensor, "_h _w"]], masks: Sequence[Bool[Tensor, "_h _w"]]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the scores of abnormal and of normal pixels of each image."""
    for number, (scores, mask) in enumerate(zip(maps, masks, strict=True)):
        if scores.shape != mask.shape:
            raise EvaluationError(
                f"Map {number} has {tuple(scores.shape)} pixels, its mask {tuple(mask.shape)}. Resize one to the other."
            )
        _finite(scores)
    pairs = list(zip(maps, masks, strict=True))
    return [_finite(x[m]) for x, m in pairs], [_finite(x[~m]) for x, m in pairs]


def _finite(values: Tensor) -> np.ndarray:
    if not bool(torch.isfinite(values).all()):
        raise EvaluationError(f"{int((~torch.isfinite(values)).sum())} of {values.numel()} scores are not finite.")
    return values.double().numpy()


def _check_both(abnormal: np.ndarray) -> None:
    if not 0 < abnormal.sum() < len(abnormal):
        raise EvaluationError(
            f"Ranking images needs normal and abnormal ones; {int(abnormal.sum())} of {len(abnormal)} are abnormal."
        )


def _interval(value: float, resampled: np.ndarray) -> Interval:
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high))
