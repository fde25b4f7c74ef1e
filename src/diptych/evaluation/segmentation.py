"""How well every pixel gets its class: mean intersection over union, with intervals bootstrapped over images.

Intersections and unions are summed over all images before they are divided, as the benchmarks of the field do; a small object counts
little in a class that is often large.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from diptych.data.class_masks import UNKNOWN, class_map
from diptych.data.images import decode
from diptych.data.sources import AbstractSource
from diptych.data.transforms import to_tensor
from diptych.errors import ConfigError, EvaluationError, ImageError
from diptych.evaluation.stats import RESAMPLES
from diptych.types import Batch, Interval, Sample

BACKGROUND = "background"
"""Name of class 0 where a segmenter has one."""


@dataclass(frozen=True)
class Vocabulary:
    """The words that pixels are given.

    Attributes:
        labels: Names of the classes.
        background: Words for what is none of them, such as `sky` and `wall`; together they are one class, the first. Empty for none.
    """

    labels: tuple[str, ...]
    background: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.labels or len(self.words) < 2:
            raise ConfigError(
                f"Segmentation needs labels, and at least two words to choose between; there are {self.words}. Name more labels, or words for "
                "background."
            )
        if len(set(self.words)) < len(self.words) or not all(word.strip() for word in self.words):
            raise ConfigError(f"Words must differ and none may be empty; they are {self.words}.")

    @property
    def words(self) -> tuple[str, ...]:
        """Return all words, those for background first."""
        return (*self.background, *self.labels)

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes by their numbers, background first where there is one."""
        return (BACKGROUND, *self.labels) if self.background else self.labels


@dataclass(frozen=True)
class Labelled:
    """What a segmenter says of one image.

    Attributes:
        labels: Number of the class of each pixel.
        probabilities: What speaks for each class, in [0, 1].
    """

    labels: Int64[Tensor, "h w"]
    probabilities: Float[Tensor, "k h w"]


def probabilities_of(
    logits: Float[Tensor, "q h w"], words_of_background: int, *, scale: float = 40.0
) -> Float[Tensor, "k h w"]:
    """Return softmax over words, of those for background (the first) the largest; sums to less than 1 where there are several.

    Args:
        logits: Of each word of a `Vocabulary`, in its order.
        words_of_background: How many of them mean background.
        scale: Of the logits.
    """
    probability = (scale * logits).softmax(0)
    if words_of_background < 2:
        return probability
    background, rest = probability.split([words_of_background, len(probability) - words_of_background])
    return torch.cat([background.amax(0, keepdim=True), rest])


def labels_of(probabilities: Float[Tensor, "k h w"], *, background: bool, least: float) -> Int64[Tensor, "h w"]:
    """Return the most probable class; the background, class 0, where even that has less than `least`."""
    best, labels = probabilities.max(0)
    return labels.masked_fill(best < least, 0) if background else labels


def only_image(batch: Batch) -> UInt8[Tensor, "3 h w"]:
    """Return the one image of a batch, for segmenters that see one at a time.

    Raises:
        ConfigError: If there are several, or no pixels.
    """
    images = batch.images[0]
    if not isinstance(images, Tensor) or len(images) != 1:
        raise ConfigError("Pictures are segmented one at a time, from their pixels; the batch holds something else.")
    return images[0]


@dataclass(frozen=True)
class Segmentation:
    """What was measured over some images.

    Attributes:
        miou: Mean over classes of intersection / union; classes that are neither shown nor said anywhere are left out.
        foreground_miou: The same without background; None where there is none.
        pixel_accuracy: Share of known pixels whose class is right.
        iou: Of each class; None for one that is left out.
        chance: `miou` of labels drawn evenly for each pixel.
        images: How many there were.
    """

    miou: Interval
    foreground_miou: Interval | None
    pixel_accuracy: Interval
    iou: Mapping[str, Interval | None]
    chance: float
    images: int

    def headline(self) -> dict[str, Interval]:
        """Return the numbers there are, by name."""
        names = ("miou", "foreground_miou", "pixel_accuracy")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Said:
    """What a segmenter said of one image of a source.

    Attributes:
        sample: The image and what is known of it.
        labels: Of each pixel.
        confusion: Of known pixels; None where the sample has no mask.
    """

    sample: Sample
    labels: Int64[np.ndarray, "h w"]
    confusion: Int64[np.ndarray, "k k"] | None


def segment_source(
    segmenter: Callable[[Batch], Labelled],
    source: AbstractSource,
    classes: Sequence[str],
    *,
    skip: Callable[[str], None] = lambda reason: None,
) -> Iterator[Said]:
    """Yield the labels of images, one at a time and in their own size, and what was right where masks are known.

    Args:
        segmenter: Takes a batch of one uncut image; its class i is `classes[i]`.
        source: Any; masks count where samples have them.
        classes: Names; the first may be `background`.
        skip: Told why an image is left out.

    Raises:
        EvaluationError: If a mask has not the size of its image.
    """
    background = classes[0] == BACKGROUND
    for row in range(len(source)):
        try:
            sample = source[row]
            if sample.image is None:
                raise ImageError("there is none.")
            pixels = to_tensor(decode(sample.image))
        except ImageError as error:
            skip(f"The image of sample {row} of {source.name} cannot be used: {error}")
            continue
        labels = segmenter(Batch((sample.key,), (pixels[None],), (), torch.zeros(1, dtype=torch.int64))).labels.numpy()
        if sample.mask is None:
            yield Said(sample, labels, None)
            continue
        if sample.mask.shape != labels.shape:
            raise EvaluationError(
                f"The mask of sample {row} of {source.name} has {sample.mask.shape} pixels, its image {labels.shape}. They must be alike."
            )
        truth = class_map(sample, classes[background:], background=background)
        yield Said(sample, labels, confusion(truth, labels, len(classes)))


def confusion(
    truth: Int64[np.ndarray, "*s"], predicted: Int64[np.ndarray, "*s"], classes: int
) -> Int64[np.ndarray, "k k"]:
    """Return how many pixels of each class (rows) were given each class (columns); where the truth is `UNKNOWN` nothing counts.

    Raises:
        EvaluationError: If a number is no class.
    """
    known = truth != UNKNOWN
    pairs = np.stack([truth[known], predicted[known]])
    if pairs.size and not 0 <= pairs.min() <= pairs.max() < classes:
        raise EvaluationError(f"Classes count from 0 to {classes - 1}; there are {pairs.min()} to {pairs.max()}.")
    return np.bincount(pairs[0] * classes + pairs[1], minlength=classes**2).reshape(classes, classes)


def measure_said(
    confusions: Iterable[Int64[np.ndarray, "k k"] | None], classes: Sequence[str], *, seed: int = 0
) -> Segmentation | None:
    """Return the numbers over the images whose classes are known; None where no pixel is."""
    known = [one for one in confusions if one is not None and one.any()]
    return measure_segmentation(np.stack(known), classes, seed=seed) if known else None


def measure_segmentation(
    confusions: Int64[np.ndarray, "n k k"], classes: Sequence[str], *, seed: int = 0
) -> Segmentation:
    """Return the numbers with their intervals.

    Args:
        confusions: Of each image, from `confusion`.
        classes: Names; `background` in the first place is no foreground.
        seed: Of the 2,000 resamples of images. A class that a resample does not show is left out of its mean.

    Raises:
        EvaluationError: If no pixel is known.

    Source: Everingham et al. 2015 (Pascal VOC), section 4.2, "segmentation".
    """
    count, pixels = len(confusions), int(confusions.sum())
    if not pixels:
        raise EvaluationError("Nothing can be measured: no pixel of the masks has a known class.")
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    weights = np.vstack([np.ones(count, dtype=np.int64), draws])
    right, shown, called = (
        weights @ part
        for part in (confusions.diagonal(axis1=1, axis2=2), confusions.sum(2), confusions.sum(1))  # n k
    )
    union = shown + called - right
    iou = _share(right, union)
    foreground = iou[:, 1:] if classes[0] == BACKGROUND and len(classes) > 1 else None
    share = confusions.sum((0, 2)) / pixels
    by_chance = share / (1 + (len(classes) - 1) * share)  # p / k over p + 1 / k - p / k
    return Segmentation(
        _interval(_means(iou)),
        None if foreground is None or np.isnan(foreground[0]).all() else _interval(_means(foreground)),
        _interval(_share(right.sum(1), shown.sum(1))),
        {name: None if np.isnan(values[0]) else _interval(values) for name, values in zip(classes, iou.T, strict=True)},
        float(by_chance[share > 0].sum() / len(classes)),
        count,
    )


def _means(values: Float[np.ndarray, "resamples k"]) -> Float[np.ndarray, " resamples"]:
    """Return the mean over the classes that are there; NaN where none is."""
    there = ~np.isnan(values)
    return _share(np.where(there, values, 0).sum(1), there.sum(1))


def _share(part: np.ndarray, whole: np.ndarray) -> Float[np.ndarray, "*s"]:
    """Return part / whole, NaN where there is nothing."""
    return np.asarray(np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0))


def _interval(values: Float[np.ndarray, " resamples"]) -> Interval:
    """Return the first value with the interval of the others."""
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return Interval(float(values[0]), float(low), float(high))
