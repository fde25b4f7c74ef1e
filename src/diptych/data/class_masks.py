"""Which class every pixel shows: photos with such masks, read where `DIPTYCH_DATA` points, and the masks of any source as maps of labels."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from PIL import Image

from diptych.data.bundles import bundle_file, half
from diptych.data.defects import region
from diptych.data.sources import AbstractSource
from diptych.errors import DataError, nearest
from diptych.types import Region, Sample, Text

UNMARKED = 255
"""Value of a sample's mask where nobody knows what is shown."""
UNKNOWN = -1
"""The same in a map of labels; no class can have this number."""


@dataclass(frozen=True)
class MaskedPhoto:
    """One photo and the mask of its classes.

    Attributes:
        key: Unique.
        image: Its file.
        mask: File whose values are ids of classes.
    """

    key: str
    image: Path
    mask: Path


class ClassMasks(AbstractSource):
    """Photos whose masks say the class of each pixel. A region is all that is shown of one class; its phrase is the class's name.

    Attributes:
        classes: Names by their ids in the mask files. Other ids are nothing known, but for 0 where no class has it: that is background.
    """

    def __init__(self, photos: Sequence[MaskedPhoto], name: str, classes: Mapping[int, str]) -> None:
        self.photos, self.name, self.classes = list(photos), name, dict(classes)

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> Sample:
        photo = self.photos[index]
        with Image.open(io.BytesIO(photo.mask.read_bytes())) as opened:
            ids = np.asarray(opened)
        shown = [number for number in np.unique(ids).tolist() if number in self.classes]
        mask = np.full(ids.shape, UNMARKED, dtype=np.uint8)
        if 0 not in self.classes:
            mask[ids == 0] = 0
        for place, number in enumerate(shown, 1):
            mask[ids == number] = place
        regions = tuple(region(ids == number, self.classes[number]) for number in shown)
        return Sample(photo.key, photo.image.read_bytes(), (), photo.key, regions=regions, mask=mask)

    def texts(self, index: int) -> tuple[Text, ...]:
        """Return none."""
        del index
        return ()


def class_masks(name: str, split: str | None = None) -> ClassMasks:
    """Return the photos of a bundle with the class of every pixel, or of one half of them; nothing is trained on them.

    Args:
        name: A key of `CLASS_MASKS`.
        split: `validation` or `test`; None for all.

    Raises:
        DataError: If there is no such bundle or split, or the bundle is not there.
    """
    if name not in CLASS_MASKS:
        raise DataError(f"There is no bundle with masks of classes {name!r}. {nearest(name, CLASS_MASKS)}")
    every, classes = CLASS_MASKS[name]()
    photos, name = half(every, name, split, lambda photo: photo.key)
    return ClassMasks(photos, name, classes)


def _streets() -> tuple[list[MaskedPhoto], dict[int, str]]:
    table = bundle_file("camvid", "labels.csv")
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    photos = [MaskedPhoto(row["image"], table.parent / row["image"], table.parent / row["mask"]) for row in rows]
    names = json.loads((table.parent / "classes.json").read_text())
    return photos, {int(number): name for number, name in names.items() if name != "unlabelled"}


def _objects() -> tuple[list[MaskedPhoto], dict[int, str]]:
    file = bundle_file("coco-mini", "boxes.json")
    rows = json.loads(file.read_text())
    photos = [MaskedPhoto(row["image"], file.parent / row["image"], file.parent / row["mask"]) for row in rows]
    names = json.loads((file.parent / "classes.json").read_text())
    return photos, {int(number): name for number, name in names.items()}


CLASS_MASKS: dict[str, Callable[[], tuple[list[MaskedPhoto], dict[int, str]]]] = {
    "camvid-classes": _streets,
    "coco-classes": _objects,
}
"""How each bundle is read: street scenes in which every pixel has a class, and photos with objects in front of a background."""


def class_of(shown: Region) -> str:
    """Return the class of a region: its noun where it has one, as in scenes, else its phrase."""
    return str(shown.attributes.get("noun", shown.phrase))


def shown_classes(source: AbstractSource) -> tuple[str, ...]:
    """Return the classes that the regions of a source show, sorted. Every sample is looked at.

    Raises:
        DataError: If no sample has a region.
    """
    found = {class_of(shown) for sample in source for shown in sample.regions}
    if not found:
        raise DataError(f"No sample of {source.name} has regions, so nobody knows what its pixels show. Name labels.")
    return tuple(sorted(found))


def class_map(sample: Sample, classes: Sequence[str], *, background: bool) -> Int64[np.ndarray, "h w"]:
    """Return the class of every pixel of a sample's mask.

    Args:
        sample: With a mask.
        classes: Names.
        background: Whether number 0 is the background, behind which the classes count from 1. Pixels of no region and of regions of other
            classes are background then, and `UNKNOWN` otherwise.
    """
    assert sample.mask is not None
    number = {name: place for place, name in enumerate(classes, int(background))}
    rest = 0 if background else UNKNOWN
    table = np.full(256, UNKNOWN, dtype=np.int64)
    table[0] = rest
    for place, shown in enumerate(sample.regions, 1):
        table[place] = number.get(class_of(shown), rest)
    return np.asarray(table[sample.mask])
