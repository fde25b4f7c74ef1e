"""Readers for small data sets kept outside the package, in the folder that the environment variable `DIPTYCH_DATA` names."""

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from diptych.data.sources import AbstractSource, Columns, from_table
from diptych.data.tables import read_table
from diptych.errors import DataError, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Bundle:
    """One data set.

    Attributes:
        columns: What the columns mean.
        file: Its table, relative to the bundle's folder.
        prompts: Which prompt file suits its classes.
        licence: In a sentence.
    """

    columns: Columns
    file: str = "labels.csv"
    prompts: str = "photo"
    licence: str = "Research use only."


_CLASSES = Columns(image="image", label="label")
_SPLIT_CLASSES = Columns(image="image", label="label", split="split")

BUNDLES = {
    "brain-92-objects": Bundle(Columns(image="image", label="category"), "stimuli.csv"),
    "camvid": Bundle(Columns(image="image", split="split")),
    "chest-radiographs": Bundle(
        Columns(image="image", texts=("label_sentence",), group="group"),
        "captions.jsonl",
        licence="Non-commercial research use only, not for clinical use; each image has its own licence.",
    ),
    "cifar10": Bundle(Columns(image="image", label="label", split="official_split")),
    "clothing": Bundle(_SPLIT_CLASSES, licence="CC0 1.0 (public domain)."),
    "coco-mini": Bundle(
        Columns(image="image", texts=("captions",), key="image_id"),
        "captions.jsonl",
        licence="Captions CC BY 4.0; each photo keeps its Flickr licence, many are non-commercial. Research use only.",
    ),
    "flickr8k-1k": Bundle(Columns(image="image", texts=("captions",), split="split"), "captions.jsonl"),
    "imagenet-1k-samples": Bundle(_CLASSES),
    "magnetic-tile": Bundle(Columns(image="image", label="defect_type")),
    "nwpu-resisc12": Bundle(_SPLIT_CLASSES, prompts="overhead"),
    "oasis-affect": Bundle(Columns(image="image", label="theme", domain="category")),
    "omniglot": Bundle(Columns(image="image", label="alphabet"), licence="MIT."),
    "pacs": Bundle(Columns(image="image", label="label", domain="domain"), prompts="style"),
}


def bundle(name: str, split: str | None = None, *, columns: Columns | None = None) -> AbstractSource:
    """Return the images, texts and labels of one data set, or of one part of it. Boxes and masks are not read here.

    Args:
        name: A key of `BUNDLES`.
        split: A value of the bundle's split column, if it has one.
        columns: In place of the bundle's own.

    Raises:
        DataError: If `DIPTYCH_DATA` is unset, the bundle is not in it, or the split is unknown.
    """
    if name not in BUNDLES:
        raise DataError(f"There is no bundle {name!r}. {nearest(name, BUNDLES)}")
    record = BUNDLES[name]
    folder = bundle_file(name, record.file).parent
    meaning = record.columns if columns in (None, Columns()) else columns
    notes = (f"Bundle {name}: {record.licence}",)
    return from_table(read_table(folder / record.file), folder, name, columns=meaning, split=split, notes=notes)


def half(items: Sequence[T], name: str, split: str | None, key: Callable[[T], str]) -> tuple[list[T], str]:
    """Return one half of what nothing is trained on, and its name: items of one key are all in one of the two, whatever the others are.

    Args:
        items: All of a bundle.
        name: Of the bundle.
        split: `validation` or `test`; None for all.
        key: Says what an item belongs to.

    Raises:
        DataError: If there is no such split.
    """
    if split is None:
        return list(items), name
    if split not in ("validation", "test"):
        raise DataError(f"{name} has no split {split!r}. {nearest(split, ('validation', 'test'))}")
    return [item for item in items if bool(zlib.crc32(key(item).encode()) % 2) == (split == "test")], f"{name}:{split}"


def bundle_file(name: str, file: str) -> Path:
    """Return the path of a file in the folder of a bundle, which need not be one of `BUNDLES`.

    Raises:
        DataError: If `DIPTYCH_DATA` is unset, or the file is not in it.
    """
    root = os.environ.get("DIPTYCH_DATA")
    if not root:
        raise DataError(
            f"The bundle {name!r} is read from the folder that DIPTYCH_DATA names, and DIPTYCH_DATA is unset."
        )
    folder = Path(root) / name
    if not (folder / file).exists():
        raise DataError(f"{folder} has no {file}; DIPTYCH_DATA must name the folder that holds the bundle {name!r}.")
    return folder / file


def class_names(source: AbstractSource) -> tuple[str, ...]:
    """Return the labels of a source, sorted.

    Raises:
        DataError: If no sample has a label.
    """
    names = {source[index].label for index in range(len(source))} - {None}
    if not names:
        raise DataError(f"{source.name} has no labels. Name the column that holds them with columns.label.")
    return tuple(sorted(map(str, names)))


def prompts_of(source: str) -> str:
    """Return the name of the prompt file that suits the classes of a source of this name."""
    name = source.partition(":")[0]
    return BUNDLES[name].prompts if name in BUNDLES else "photo"
