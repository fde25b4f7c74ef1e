"""Readers for small data sets kept outside the package, in the folder that the environment variable `DIPTYCH_DATA` names."""

import os
from dataclasses import dataclass
from pathlib import Path

from diptych.data.sources import AbstractSource, Columns, from_table
from diptych.data.tables import read_table
from diptych.errors import DataError, nearest


@dataclass(frozen=True)
class Bundle:
    """One data set.

    Attributes:
        file: Its table, relative to the bundle's folder.
        columns: What the columns mean.
        prompts: Which prompt file suits its classes.
        licence: In a sentence; all are for research unless it says otherwise.
    """

    file: str
    columns: Columns
    prompts: str = "photo"
    licence: str = "Research use only."


_CLASSES = Columns(image="image", label="label")
_SPLIT_CLASSES = Columns(image="image", label="label", split="split")
_CAPTIONS = Columns(image="image", texts=("captions",))

BUNDLES = {
    "cifar10": Bundle("labels.csv", Columns(image="image", label="label", split="official_split")),
    "pacs": Bundle("labels.csv", Columns(image="image", label="label", domain="domain"), "style"),
    "nwpu-resisc12": Bundle("labels.csv", _SPLIT_CLASSES, "overhead"),
    "flickr8k-1k": Bundle("captions.jsonl", Columns(image="image", texts=("captions",), split="split")),
    "omniglot": Bundle("labels.csv", Columns(image="image", label="alphabet"), licence="MIT."),
    "clothing": Bundle("labels.csv", _SPLIT_CLASSES, licence="CC0 1.0 (public domain)."),
    "imagenet-1k-samples": Bundle("labels.csv", _CLASSES),
    "coco-mini": Bundle("captions.jsonl", Columns(image="image", texts=("captions",), key="image_id")),
    "oasis-affect": Bundle("labels.csv", Columns(image="image", label="theme", domain="category")),
    "magnetic-tile": Bundle("labels.csv", Columns(image="image", label="defect_type")),
    "chest-radiographs": Bundle("captions.jsonl", Columns(image="image", texts=("label_sentence",))),
}


def bundle(name: str, split: str | None = None, *, columns: Columns = Columns()) -> AbstractSource:
    """Return one data set, or one part of it.

    Args:
        name: A key of `BUNDLES`.
        split: A value of the bundle's split column, if it has one.
        columns: Overrides the bundle's own.

    Raises:
        DataError: If `DIPTYCH_DATA` is unset or the bundle is not in it.
    """
    if name not in BUNDLES:
        raise DataError(f"There is no bundle {name!r}. {nearest(name, BUNDLES)}")
    root = os.environ.get("DIPTYCH_DATA")
    if not root:
        raise DataError(
            f"The bundle {name!r} is read from the folder that DIPTYCH_DATA names, and DIPTYCH_DATA is unset."
        )
    record, folder = BUNDLES[name], Path(root) / name
    if not (folder / record.file).exists():
        raise DataError(
            f"{folder} has no {record.file}; DIPTYCH_DATA must name the folder that holds the bundle {name!r}."
        )
    table = read_table(folder / record.file)
    notes = (f"Bundle {name}: {record.licence}",)
    return from_table(
        table, folder, name, columns=record.columns if columns == Columns() else columns, split=split, notes=notes
    )
