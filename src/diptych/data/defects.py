"""Photos of good and of faulty things with masks of the faults: three bundles, read where `DIPTYCH_DATA` points."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from diptych.data.bundles import bundle_file, half
from diptych.data.images import decode
from diptych.data.sources import AbstractSource
from diptych.errors import DataError, nearest
from diptych.types import Region, Sample, Text

Box = tuple[int, int, int, int]
GOOD = "free"
"""Label of what has no fault."""
CRACK_CROP = 74
"""Side of the squares that photos of roads are cut into, three by two of them."""


@dataclass(frozen=True)
class Photo:
    """One image and where its faults are.

    Attributes:
        key: Unique.
        image: Its file.
        label: Name of its fault, or `GOOD`.
        group: Photos of one thing.
        mask: File of a mask that is not 0 at faults.
        faults: Name and box (x0, y0, x1, y1) of each fault, where there are boxes in place of a mask.
        crop: Part of the image that is the sample, (x0, y0, x1, y1).
    """

    key: str
    image: Path
    label: str
    group: str
    mask: Path | None = None
    faults: tuple[tuple[str, Box], ...] = ()
    crop: Box | None = None


class Defects(AbstractSource):
    """Photos with masks, read when asked for. Good photos have a mask of zeros; `domain` says what is shown.

    Three magnetic tiles are faulty and have an empty mask: their samples have none.
    """

    def __init__(self, photos: Sequence[Photo], name: str, thing: str) -> None:
        self.photos, self.name, self.thing = list(photos), name, thing

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> Sample:
        photo = self.photos[index]
        content: bytes | np.ndarray = photo.image.read_bytes()
        if photo.crop is not None:
            content = np.asarray(decode(content).crop(photo.crop))
        mask, regions = _marked(photo, content)
        return Sample(
            photo.key, content, (), photo.group, label=photo.label, domain=self.thing, regions=regions, mask=mask
        )

    def texts(self, index: int) -> tuple[Text, ...]:
        """Return none."""
        del index
        return ()


def defects(name: str, split: str | None = None) -> Defects:
    """Return the photos of a bundle, or of one half of its things.

    Args:
        name: A key of `DEFECTS`.
        split: `validation` or `test`; nothing is trained on them. Photos of one thing are all in one of the two. None for all.

    Raises:
        DataError: If there is no such bundle or split, or the bundle is not there.
    """
    if name not in DEFECTS:
        raise DataError(f"There is no bundle with masks of faults {name!r}. {nearest(name, DEFECTS)}")
    read, thing = DEFECTS[name]
    photos, name = half(read(), name, split, lambda photo: photo.group)
    return Defects(photos, name, thing)


def _tiles() -> list[Photo]:
    table = bundle_file("magnetic-tile", "labels.csv")
    return [
        # Several photos show one tile under other light; what follows the exposure in the name says which.
        Photo(
            row["image"],
            table.parent / row["image"],
            row["defect_type"],
            Path(row["image"]).stem.rpartition("_num_")[2],
            table.parent / row["mask"] if row["mask"] else None,
        )
        for row in _rows(table)
    ]


def _cracks() -> list[Photo]:
    """Return squares cut out of photos of roads, since every whole photo has a crack."""
    table, photos = bundle_file("road-cracks", "labels.csv"), []
    for row in _rows(table):
        mask = table.parent / row["mask"]
        marked = np.asarray(Image.open(io.BytesIO(mask.read_bytes())).convert("L")) > 0
        for top in range(0, marked.shape[0] - CRACK_CROP + 1, CRACK_CROP):
            for left in range(0, marked.shape[1] - CRACK_CROP + 1, CRACK_CROP):
                box = (left, top, left + CRACK_CROP, top + CRACK_CROP)
                cracked = bool(marked[top : box[3], left : box[2]].any())
                label, key = "crack" if cracked else GOOD, f"{row['image']}:{left},{top}"
                photos.append(Photo(key, table.parent / row["image"], label, row["image"], mask, crop=box))
    return photos


def _boards() -> list[Photo]:
    """Return faulty circuit boards and the clean template of each."""
    file, photos = bundle_file("pcb-pairs", "boxes.json"), []
    for row in json.loads(file.read_text()):
        faults = tuple((str(found["label"]), _box(found["box"])) for found in row["objects"])
        photos.append(Photo(row["image"], file.parent / row["image"], "defect", row["template"], faults=faults))
        photos.append(Photo(row["template"], file.parent / row["template"], GOOD, row["template"]))
    return photos


DEFECTS: dict[str, tuple[Callable[[], list[Photo]], str]] = {
    "magnetic-tile": (lru_cache(_tiles), "magnetic tile"),
    "road-cracks": (lru_cache(_cracks), "asphalt road"),
    "pcb-pairs": (lru_cache(_boards), "printed circuit board"),
}
"""How each bundle is read, and what its photos show."""


def _box(corners: Sequence[float]) -> Box:
    x0, y0, x1, y1 = map(int, corners)
    return x0, y0, x1, y1


def _rows(table: Path) -> list[dict[str, str]]:
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _marked(photo: Photo, content: bytes | np.ndarray) -> tuple[np.ndarray | None, tuple[Region, ...]]:
    """Return the mask of a photo and its regions: one for a mask as a whole, one for each box. No mask for a fault that none marks."""
    size = Image.open(io.BytesIO(content)).size if isinstance(content, bytes) else content.shape[1::-1]
    mask = np.zeros(size[::-1], dtype=np.uint8)
    if photo.mask is not None:
        found = Image.open(io.BytesIO(photo.mask.read_bytes())).convert("L")
        mask[np.asarray(found if photo.crop is None else found.crop(photo.crop)) > 0] = 1
        if mask.any():
            return mask, (region(mask > 0, photo.label),)
        return mask if photo.label == GOOD else None, ()
    for number, (_, (x0, y0, x1, y1)) in enumerate(photo.faults, 1):
        mask[y0:y1, x0:x1] = number
    return mask, tuple(Region(tuple(map(float, box)), name) for name, box in photo.faults)  # type: ignore[arg-type]


def region(marked: np.ndarray, phrase: str) -> Region:
    """Return the tight region around True pixels."""
    ys, xs = np.nonzero(marked)
    return Region((float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)), phrase)
