"""Where samples come from: anything with a length and random access. `open_source` finds out what a path holds."""

import bisect
import glob
import hashlib
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64, Int64

from diptych.data.columns import Columns as Columns
from diptych.data.columns import role_of, sniff
from diptych.data.images import decode
from diptych.data.parquet import RowGroups, holds_bytes, holds_places, large_groups, places
from diptych.data.rows import count_without_text, image_folder, join_captions, only_part, with_keys, without_categories
from diptych.data.tables import join_tables, read_folder, some
from diptych.data.tar import is_tar, read_tars
from diptych.errors import DataError, ImageError, nearest, require
from diptych.types import Sample, Text

Order = Callable[[np.random.Generator], Int64[np.ndarray, " shown"]]
"""Returns the rows of one epoch in order, always as many."""


class AbstractSource(ABC):
    """Samples with random access; the same index always gives the same sample.

    Attributes:
        name: For logs and reports.
        notes: What was assumed when the source was opened, as plain sentences; shown to the user.
        chances: How likely each sample is to be in an epoch, in [0, 1]; None when all are in every one.
        order: Which rows an epoch shows and in which order; None shuffles them.
        run_length: Rows of `order` that stand together, one run after another; batches hold whole runs.
    """

    name: str
    notes: tuple[str, ...] = ()
    chances: Float64[np.ndarray, " n"] | None = None
    order: Order | None = None
    run_length: int = 1

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Return one sample, its image not decoded.

        Raises:
            ImageError: If the image is missing.
        """

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    @abstractmethod
    def texts(self, index: int) -> tuple[Text, ...]:
        """Return the texts of one sample without touching its image."""

    def without_image(self, index: int) -> Sample:
        """Return one sample without its image; sources that have to read images override this and read none."""
        return replace(self[index], image=None)

    @property
    def fingerprint(self) -> str:
        """Return a hash of the name and of all samples but their images: keys, texts, groups, labels, domains; and of chances."""
        digest = hashlib.blake2b(f"{self.name}:{len(self)}".encode(), digest_size=8)
        for index in range(len(self)):
            sample = self.without_image(index)
            texts = [(text.text, text.role, text.language) for text in sample.texts]
            digest.update(json.dumps([sample.key, texts, sample.group, sample.label, sample.domain]).encode())
        if self.chances is not None:
            digest.update(self.chances.tobytes())
        return digest.hexdigest()


class Listed(AbstractSource):
    """Samples held in memory."""

    def __init__(self, samples: Sequence[Sample], name: str = "listed") -> None:
        self.samples, self.name = list(samples), name

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def texts(self, index: int) -> tuple[Text, ...]:
        """Return the texts of one sample."""
        return self.samples[index].texts


class Subset(AbstractSource):
    """Some samples of another source, in the order given.

    Where epochs of the source follow an order of their own, these follow what is left of it, cut or begun anew to one length. Rows that stand
    together there stay together if all of them are taken, such as whole groups; if not, a note says so.
    """

    def __init__(self, source: AbstractSource, indices: Sequence[int], name: str) -> None:
        self.source = source
        self.indices = list(indices)
        self.name = name
        self.notes = source.notes
        self.chances = None if source.chances is None else source.chances[self.indices]
        if source.order is not None:
            places: dict[int, list[int]] = {}
            for place, row in enumerate(self.indices):
                places.setdefault(row, []).append(place)
            left = partial(_left_of, source.order, places)
            self.order = partial(_of_length, left, len(left(np.random.default_rng(0))))
            if _keeps_runs(source, places, self.indices):
                self.run_length = source.run_length
            else:
                self.notes += (
                    f"{name} takes some of {source.run_length} samples of {source.name} that belong together, so batches no longer hold all of "
                    "them. Take the part first, and order what comes of it.",
                )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.indices[index]]

    def without_image(self, index: int) -> Sample:
        """Return one sample without its image."""
        return self.source.without_image(self.indices[index])

    def texts(self, index: int) -> tuple[Text, ...]:
        """Return the texts of one sample."""
        return self.source.texts(self.indices[index])


def _left_of(order: Order, places: Mapping[int, Sequence[int]], rng: np.random.Generator) -> Int64[np.ndarray, " left"]:
    """Return where the rows of an epoch stand in a subset, without those that are not in it."""
    return np.array([place for row in order(rng).tolist() for place in places.get(row, ())], np.int64)


def _keeps_runs(source: AbstractSource, places: Mapping[int, object], rows: Sequence[int]) -> bool:
    """Return whether a part has all rows or none of every run: it takes whole groups, each row once, and takes no run's groups apart."""
    if source.run_length == 1 or source.order is None:
        return True
    groups = [source.without_image(row).group for row in range(len(source))]
    taken = np.isin(np.arange(len(source)), rows)
    cut = {groups[row] for row in rows} & {group for group, here in zip(groups, taken, strict=True) if not here}
    runs = taken[source.order(np.random.default_rng(0))].reshape(-1, source.run_length)
    return len(places) == len(rows) and not cut and bool((runs.all(1) == runs.any(1)).all())


def _of_length(order: Order, count: int, rng: np.random.Generator) -> Int64[np.ndarray, " shown"]:
    return np.resize(order(rng), count)


class Joined(AbstractSource):
    """Several sources one after another. Keys and groups begin with the name of their source, so that equal ones of two sources stay apart."""

    def __init__(self, sources: Sequence[AbstractSource]) -> None:
        """Join sources; one that is there twice is the same samples twice.

        Raises:
            DataError: If a source has an order of its own.
        """
        for source in sources:
            if source.order is not None:
                raise DataError(
                    f"The epochs of {source.name} follow an order of their own, which no joined source could keep. Join the sources first and order "
                    "what comes of it, as in per_group(Joined([first, second]), 2)."
                )
        self.sources = list(sources)
        self.name = "+".join(source.name for source in sources)
        self.notes = tuple(note for source in sources for note in source.notes)
        self._ends = list(itertools.accumulate(map(len, sources)))
        self._names = _told_apart(self.sources)
        if any(source.chances is not None for source in sources):
            of_each = (np.ones(len(source)) if source.chances is None else source.chances for source in sources)
            self.chances = np.concatenate(list(of_each))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        place, own = self._find(index)
        return _prefixed(self.sources[place][own], self._names[place])

    def without_image(self, index: int) -> Sample:
        """Return one sample without its image."""
        place, own = self._find(index)
        return _prefixed(self.sources[place].without_image(own), self._names[place])

    def texts(self, index: int) -> tuple[Text, ...]:
        """Return the texts of one sample."""
        place, own = self._find(index)
        return self.sources[place].texts(own)

    def _find(self, index: int) -> tuple[int, int]:
        """Return which source a sample is in, and where."""
        place = bisect.bisect_right(self._ends, index)
        return place, index - (self._ends[place - 1] if place else 0)


def _told_apart(sources: Sequence[AbstractSource]) -> list[str]:
    """Return the names of sources; where different ones have the same name, all but the first get a number."""
    names: list[str] = []
    for place, source in enumerate(sources):
        before = [other for other in dict.fromkeys(sources[:place]) if other.name == source.name]
        rank = before.index(source) if source in before else len(before)
        names.append(f"{source.name} ({rank + 1})" if rank else source.name)
    return names


class AbstractSame(AbstractSource):
    """Another source, sample by sample; what differs is which samples an epoch shows, and in which order.

    Attributes:
        source: The other one.
    """

    def __init__(self, source: AbstractSource) -> None:
        self.source = source
        self.name, self.notes = source.name, source.notes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return self.source[index]

    def without_image(self, index: int) -> Sample:
        """Return one sample without its image."""
        return self.source.without_image(index)

    def texts(self, index: int) -> tuple[Text, ...]:
        """Return the texts of one sample."""
        return self.source.texts(index)


class WithChances(AbstractSame):
    """Another source, of which every epoch shows some samples, drawn anew with these chances."""

    def __init__(self, source: AbstractSource, chances: Float64[np.ndarray, " n"]) -> None:
        """Make the source.

        Args:
            source: Stays as it is.
            chances: How likely each sample is to be in an epoch, in [0, 1].

        Raises:
            DataError: If there are not as many as samples, one is out of range, or the source has an order of its own.
        """
        if source.order is not None:
            raise DataError(
                f"The epochs of {source.name} follow an order of their own, which leaves nothing to chance. Give chances to the source without it."
            )
        if len(chances) != len(source) or not ((chances >= 0) & (chances <= 1)).all():
            raise DataError(
                f"{source.name} has {len(source):,} samples, so it needs as many chances between 0 and 1; {len(chances):,} came"
                + (f", from {chances.min():g} to {chances.max():g}." if len(chances) else ".")
            )
        super().__init__(source)
        self.chances = chances


def _prefixed(sample: Sample, name: str) -> Sample:
    return replace(sample, key=f"{name}/{sample.key}", group=f"{name}/{sample.group}")


class TableSource(AbstractSource):
    """Rows of an Arrow table. Images are read when a sample is; nothing is kept open, so a copy works in any process.

    Attributes:
        table: One row per sample. An image cell that holds a `row` only says where the image is.
        cell: Returns what is there.
    """

    def __init__(
        self,
        table: pa.Table,
        columns: Columns,
        folder: Path,
        name: str,
        notes: tuple[str, ...] = (),
        *,
        cell: Callable[[Mapping[str, Any]], Any] | None = None,
    ) -> None:
        self.table, self.columns, self.folder, self.name, self.notes = table, columns, folder, name, notes
        self.cell = cell or RowGroups()
        roles = [role_of(column) for column in columns.texts]
        if roles and all(role == "translation" for role, _ in roles):
            roles[0] = ("caption", roles[0][1])
        self._roles = roles

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: int) -> Sample:
        image = None if self.columns.image is None else self.table[self.columns.image][index].as_py()
        return replace(self.without_image(index), image=None if image is None else self._image(image))

    def without_image(self, index: int) -> Sample:
        """Return one row without its image; nothing is read from the disk."""
        key = self._value(self.columns.key, index) or f"row-{index}"
        return Sample(
            key=key,
            image=None,
            texts=self.texts(index),
            group=self._value(self.columns.group, index) or key,
            label=self._value(self.columns.label, index),
            domain=self._value(self.columns.domain, index),
        )

    def texts(self, index: int) -> tuple[Text, ...]:
        """Return the texts of one row that are not empty; the label when there are none."""
        found, spoken = [], self._value(self.columns.language, index)
        for column, (role, language) in zip(self.columns.texts, self._roles, strict=True):
            value = self.table[column][index].as_py()
            for text in value if isinstance(value, list) else [value]:
                if text is not None and str(text).strip():
                    found.append(Text(str(text), role, language or spoken))
        label = self._value(self.columns.label, index)
        return tuple(found) or ((Text(label.replace("_", " "), "label"),) if label else ())

    def _value(self, column: str | None, index: int) -> str | None:
        value = None if column is None else self.table[column][index].as_py()
        return None if value is None else str(value)

    def _image(self, value: Any) -> bytes | None:
        """Return the encoded bytes behind an image cell."""
        if isinstance(value, dict) and "offset" in value:
            return _read(Path(value["file"]), value["offset"], value["size"])
        if isinstance(value, dict) and "row" in value:
            value = self.cell(value)
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if value is None or isinstance(value, bytes):
            return value
        return _fetch(str(value)) if "://" in str(value) else _read(self.folder / str(value))


def _read(path: Path, offset: int = 0, size: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise ImageError(f"The image {path} cannot be read: {error}. Correct the path or drop the row.") from error


def _fetch(address: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(address, "rb") as file:
            return bytes(file.read())
    except Exception as error:  # each protocol raises its own kind
        raise ImageError(
            f"The image {address} cannot be read: {error}. Correct the address or drop the row."
        ) from error


def open_source(spec: str | Path, *, columns: Columns | None = None, split: str | None = None) -> AbstractSource:
    """Return the samples behind a name or a path.

    Args:
        spec: A folder (a.jpg with a.txt, one folder per class, images with a table, parquet files, tar shards), a csv, tsv, jsonl,
            parquet or tar file, a pattern such as `shards/*.tar` or `shards/{000..127}.tar`, `hf:` and a data set of the `datasets`
            library, a bundle in `DIPTYCH_DATA` such as `flickr8k-1k`, `openmoji`, or `scenes`. `:train` behind any of them names a
            part; `a+b` puts one after the other.
        columns: What is said here is not guessed; None guesses all.
        split: Which rows, if the table has a split column; `name:split` says the same.

    Raises:
        DataError: If nothing can be read; says what was looked for.
        ColumnError: If a named column is missing.
    """
    text = str(spec)
    base, _, part = text.rpartition(":")
    for pattern, rows in ((text, split), (base, split or part)):
        if (paths := _matching(pattern)) == [Path(pattern)]:
            return _from_path(paths[0], columns, rows)
        if paths:
            return _from_files(paths, pattern, columns, rows)
    if "+" in text:
        names = text.split("+")
        opened = {one: open_source(one, columns=columns, split=split) for one in names}
        return Joined([opened[one] for one in names])
    if text.startswith("hf:"):
        return from_datasets(_load_dataset(text.removeprefix("hf:"), split), columns=columns, name=text)
    if "/" in text or Path(text).suffix:
        raise DataError(f"There is no file or folder {text}.")
    name, _, part = text.partition(":")
    return _named(name, split or part or None, columns)


def _matching(pattern: str) -> list[Path]:
    """Return the files and folders that a path or a pattern stands for.

    Raises:
        DataError: If ranges or lists in braces stand for some that are there and some that are not.
    """
    if Path(pattern).exists():
        return [Path(pattern)] if pattern else []
    names = expand_braces(pattern)
    found = {name: sorted(map(Path, glob.glob(name))) for name in names}
    if any(found.values()) and (absent := [name for name, paths in found.items() if not paths]):
        raise DataError(
            f"{pattern} stands for {len(names):,} names, of which {len(absent):,} are not there: {some(absent)}."
        )
    return [path for paths in found.values() for path in paths]


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern stands for: `{08..11}` counts, with as many digits, and `{a,b}` lists, as in a shell."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{},]*(?:,[^{},]*)+))\}", pattern)
    if found is None:
        return [pattern]
    first, last, words = found.groups()
    inside = (
        words.split(",")
        if words is not None
        else [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    )
    return [n for word in inside for n in expand_braces(pattern[: found.start()] + word + pattern[found.end() :])]


def _from_path(path: Path, columns: Columns | None, split: str | None) -> AbstractSource:
    if not path.is_dir():
        return _from_files([path], path.name, columns, split)
    name = path.resolve().name
    if tars := sorted(inside for inside in path.iterdir() if is_tar(inside)):
        return _from_files(tars, name, columns, split)
    table, note = read_folder(path)
    return from_table(table, path, name, columns=columns, split=split, notes=(note,))


def _from_files(paths: list[Path], name: str, columns: Columns | None, split: str | None) -> AbstractSource:
    table = read_tars(paths) if all(map(is_tar, paths)) else join_tables(paths)
    notes = (f"{len(paths):,} files, from {paths[0].name} to {paths[-1].name}.",) if len(paths) > 1 else ()
    return from_table(table, paths[0].parent, name, columns=columns, split=split, notes=notes)


def from_table(
    table: pa.Table,
    folder: Path,
    name: str,
    *,
    columns: Columns | None = None,
    split: str | None = None,
    notes: tuple[str, ...] = (),
    cell: Callable[[Mapping[str, Any]], Any] | None = None,
) -> AbstractSource:
    """Return a source over a table whose columns are named by `columns` or found out, with notes on what was assumed.

    Args:
        table: One row per image, or per caption of an image.
        folder: What image paths in the table are relative to; a folder right below it is taken when the images lie there.
        name: For logs and reports.
        columns: What is said here is not guessed; None guesses all.
        split: Which rows, by the split column.
        notes: Sentences to put before those on the columns.
        cell: Returns the image at a place in the image column; None where places are in parquet files.

    Raises:
        ColumnError: If a named column is missing, or a split is named and there is no split column.
        DataError: If no row belongs to the split.
    """
    table = without_categories(table)
    found = sniff(table, columns or Columns())
    said = [f"{f.name} = {getattr(found, f.name)!r}" for f in fields(found) if getattr(found, f.name)]
    notes += (f"Columns: {', '.join(said)}." if said else "No column's name or content tells its meaning.",)
    if split is not None:
        table, name = only_part(table, found.split, split), f"{name}:{split}"
    elif found.split is not None and len(parts := sorted(map(str, pc.unique(table[found.split]).to_pylist()))) > 1:
        notes += (f"All parts of column {found.split!r} are read ({', '.join(parts)}); name one with `name:split`.",)
    joined = join_captions(table, found)
    if (images := joined.num_rows) < table.num_rows:
        notes += (f"{table.num_rows:,} rows name {images:,} images: rows with one image are its several captions.",)
    if without := count_without_text(joined, found.texts) if found.texts else 0:
        notes += (f"{without:,} of {images:,} samples have no text in {', '.join(found.texts)}.",)
    base = image_folder(joined, found.image, folder)
    if base != folder:
        notes += (f"Image paths are relative to {base}.",)
    if cell is None and found.image is not None and holds_places(table[found.image].type):
        notes += large_groups(table[found.image])
    keyed, found, repeats = with_keys(joined, found)
    return TableSource(keyed, found, base, name, (*notes, *repeats), cell=cell)


def from_datasets(dataset: Any, *, columns: Columns | None = None, name: str = "dataset") -> AbstractSource:
    """Return a source over a `datasets.Dataset`; images stay where they are, encoded, and class numbers become names."""
    datasets = require("datasets", "hf")
    classes = {}
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.ClassLabel):
            classes[column] = feature.names
    dataset, schema = dataset.with_format("arrow"), list(dataset.features.arrow_schema)
    light = dataset.select_columns([field.name for field in schema if not holds_bytes(field.type)])[:]
    row = np.arange(len(dataset))
    table = pa.table({f.name: places(row, column=f.name) if holds_bytes(f.type) else light[f.name] for f in schema})
    for column, names in classes.items():
        number = table[column]  # -1 is the library's sign for unlabelled
        labels = pa.array(names, pa.string()).take(pc.if_else(pc.less(number, 0), None, number))
        table = table.set_column(table.column_names.index(column), column, labels)
    return from_table(table, Path(), name, columns=columns, cell=partial(_dataset_cell, dataset))


def _dataset_cell(dataset: Any, place: Mapping[str, Any]) -> Any:
    return dataset[place["row"]][place["column"]][0].as_py()


def describe(source: AbstractSource, *, count: int = 3) -> Iterator[str]:
    """Yield sentences about a source: size, assumptions, and its first `count` samples, decoded."""
    yield f"{source.name}: {len(source):,} samples."
    yield from source.notes
    for index in range(min(count, len(source))):
        texts = source.texts(index)
        more = f" (and {len(texts) - 1} more)" if len(texts) > 1 else ""
        said = f"{_short(texts[0].text)!r} as {texts[0].role}{more}" if texts else "no text"
        yield f"  sample {index}: {_seen(source, index)}, {said}"


def _seen(source: AbstractSource, index: int) -> str:
    """Return the size of a sample's image in words, or why there is none."""
    try:
        image = source[index].image
        return "no image" if image is None else "an image of {} x {} pixels".format(*decode(image).size)
    except ImageError as error:
        return f"an image that cannot be read ({error})"


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:99]}…"


def _load_dataset(name: str, split: str | None) -> Any:
    """Return a data set: a folder that `save_to_disk` wrote, else whatever `datasets.load_dataset` finds."""
    datasets = require("datasets", "hf")
    base, _, part = name.rpartition(":")
    name, split = (base, split or part) if base else (name, split)
    try:
        found = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
    except Exception as error:  # the library lets many kinds through
        raise DataError(
            f"{name!r} is no folder that `save_to_disk` wrote, and `datasets.load_dataset` cannot give it: {error}"
        ) from error
    if not isinstance(found, datasets.DatasetDict):
        return found
    if split is None and len(found) == 1:
        split = next(iter(found))
    if split not in found:
        raise DataError(f"{name} needs a split, as in hf:{name}:train. {nearest(split or '', found)}")
    return found[split]


def _named(name: str, split: str | None, columns: Columns | None) -> AbstractSource:
    """Return a source that has a name instead of a path."""
    from diptych.data.bundles import BUNDLES, bundle
    from diptych.data.class_masks import CLASS_MASKS, class_masks
    from diptych.data.defects import DEFECTS, defects
    from diptych.data.multilingual import bilingual_photos, overhead_photos
    from diptych.data.openmoji import openmoji
    from diptych.data.planted import planted_defects
    from diptych.data.scenes import scenes
    from diptych.data.shapes import shapes

    if name == "openmoji":
        return openmoji(split or "all")
    if name == "shapes":
        return shapes()
    joined = {"bilingual-photos": bilingual_photos, "overhead-photos": overhead_photos}
    if name in joined:
        return joined[name](split)
    if name == "scenes":
        return scenes(split or "train")
    if name == "planted-defects":
        return planted_defects(split or "test")
    if name in DEFECTS and columns in (None, Columns()):
        return defects(name, split)
    if name in CLASS_MASKS:
        return class_masks(name, split)
    if name in BUNDLES:
        return bundle(name, split, columns=columns)
    names = (*BUNDLES, *DEFECTS, *CLASS_MASKS, *joined, "openmoji", "scenes", "shapes", "planted-defects")
    raise DataError(f"There is no file or folder {name!r}, and no data set of that name. {nearest(name, names)}")
