"""Where samples come from: anything with a length and random access. `open_source` finds out what a path holds."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from diptych.data.tables import IMAGE_SUFFIXES, TABLE_SUFFIXES, read_folder, read_table, read_tars
from diptych.errors import ColumnError, DataError, ImageError, nearest, require
from diptych.types import Role, Sample, Text


class AbstractSource(ABC):
    """Samples with random access; the same index always gives the same sample.

    Attributes:
        name: For logs and reports.
        notes: What was assumed when the source was opened, as plain sentences; shown to the user.
    """

    name: str
    notes: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Return one sample, its image not decoded.

        Raises:
            ImageError: If the image is missing.
        """

    @abstractmethod
    def texts(self, index: int) -> tuple[Text, ...]:
        """Return the texts of one sample without touching its image."""

    @property
    def fingerprint(self) -> str:
        """Return a hash of length and texts, for the run's record of its data."""
        digest = hashlib.blake2b(f"{self.name}:{len(self)}".encode(), digest_size=8)
        for index in range(len(self)):
            digest.update("\x1f".join(text.text for text in self.texts(index)).encode())
        return digest.hexdigest()


class Subset(AbstractSource):
    """Some samples of another source, in the order given."""

    def __init__(self, source: AbstractSource, indices: Sequence[int], name: str) -> None:
        self.source = source
        self.indices = list(indices)
        self.name = name
        self.notes = source.notes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.indices[index]]

    def texts(self, index: int) -> tuple[Text, ...]:
        """Return the texts of one sample."""
        return self.source.texts(self.indices[index])


@dataclass(frozen=True)
class Columns:
    """What the columns of a table mean. Whatever is None or empty is found by name, then by content.

    Attributes:
        image: Paths, encoded bytes, or {bytes, path} structs.
        texts: Strings or lists of strings. `caption_de` is a translation, `rewrite...`, `synthetic...` and `negative...` have those roles.
        label: Class names.
        key: Unique names of samples.
        group: Equal values are positives of each other.
        domain: Style or origin.
        split: Which part a row belongs to.
    """

    image: str | None = None
    texts: tuple[str, ...] = ()
    label: str | None = None
    key: str | None = None
    group: str | None = None
    domain: str | None = None
    split: str | None = None


_NAMES = {
    "image": "image img imagepath imagefile imagefilename imagename filepath file filename path photo picture jpg png",
    "label": "label class category cls target classname",
    "key": "key id uid uuid imageid sampleid",
    "group": "group groupid",
    "domain": "domain style",
    "split": "split subset partition",
}
_TEXT_NAMES = "caption captions text texts title description alt alttext sentence sentences name prompt rewrite synthetic negative"
_LANGUAGES = "ar cs da de el en es fa fi fr he hi hu id it ja ko nl no pl pt ro ru sv th tr uk vi zh".split()
_ROLES: dict[str, Role] = {
    "rewrit": "rewrite",
    "synthetic": "synthetic",
    "generated": "synthetic",
    "negative": "hard_negative",
}


class TableSource(AbstractSource):
    """Rows of an Arrow table. Images are read when a sample is."""

    def __init__(self, table: pa.Table, columns: Columns, folder: Path, name: str, notes: tuple[str, ...] = ()) -> None:
        self.table, self.columns, self.folder, self.name, self.notes = table, columns, folder, name, notes
        roles = [role_of(column) for column in columns.texts]
        if roles and not any(role == "caption" for role, _ in roles):
            roles[0] = ("caption", roles[0][1])
        self._roles = roles
        self._key = next((c for c in (columns.key, columns.image) if c is not None and _is_unique(table[c])), None)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: int) -> Sample:
        key = self._value(self._key, index) or f"row-{index}"
        return Sample(
            key=key,
            image=None if self.columns.image is None else self._image(self.table[self.columns.image][index].as_py()),
            texts=self.texts(index),
            group=self._value(self.columns.group, index) or key,
            label=self._value(self.columns.label, index),
            domain=self._value(self.columns.domain, index),
        )

    def texts(self, index: int) -> tuple[Text, ...]:
        """Return the texts of one row that are not empty; the label when there are none."""
        found = []
        for column, (role, language) in zip(self.columns.texts, self._roles, strict=True):
            value = self.table[column][index].as_py()
            for text in value if isinstance(value, list) else [value]:
                if text is not None and str(text).strip():
                    found.append(Text(str(text), role, language))
        label = self._value(self.columns.label, index)
        return tuple(found) or ((Text(label.replace("_", " "), "label"),) if label else ())

    def _value(self, column: str | None, index: int) -> str | None:
        value = None if column is None else self.table[column][index].as_py()
        return None if value is None else str(value)

    def _image(self, value: Any) -> bytes | None:
        """Return the encoded bytes behind an image cell."""
        if isinstance(value, dict) and "offset" in value:
            with open(value["file"], "rb") as file:
                file.seek(value["offset"])
                return bytes(file.read(value["size"]))
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if value is None:
            return None
        if isinstance(value, bytes):
            return bytes(value)
        value = str(value)
        if "://" in value:
            return self._remote(value)
        path = self.folder / value
        try:
            return path.read_bytes()
        except OSError as error:
            raise ImageError(
                f"The image {path} cannot be read: {error.strerror}. Correct the path or drop the row."
            ) from error

    def _remote(self, address: str) -> bytes:
        import fsspec

        try:
            with fsspec.open(address, "rb") as file:
                return bytes(file.read())
        except Exception as error:  # each protocol raises its own kind
            raise ImageError(f"The image {address} cannot be read: {error}") from error


def open_source(spec: str | Path, *, columns: Columns = Columns(), split: str | None = None) -> AbstractSource:
    """Return the samples behind a name or a path.

    Args:
        spec: A folder (a.jpg with a.txt, one folder per class, images with a table, parquet files, tar shards), a csv, tsv, jsonl,
            parquet or tar file, a pattern such as `shards/*.tar`, `hf:` and a data set of the `datasets` library, a bundle in
            `DIPTYCH_DATA` such as `flickr8k-1k:train`, `openmoji:train`, or `scenes:train`.
        columns: Overrides what would be found by itself.
        split: Which rows, if the table has a split column; `name:split` says the same.

    Raises:
        DataError: If nothing can be read; says what was looked for.
        ColumnError: If a named column is missing.
    """
    text = str(spec)
    if text.startswith("hf:"):
        return from_datasets(_load_dataset(text.removeprefix("hf:"), split), columns=columns, name=text)
    path = Path(text)
    if any(letter in text for letter in "*?[") and (tars := sorted(path.parent.glob(path.name))):
        return from_table(read_tars(tars), path.parent, text, columns=columns, split=split)
    if not path.exists() and not path.suffix:
        name, _, part = text.partition(":")
        return _named(name, split or part or None, columns)
    if path.is_dir():
        table, folder, note = read_folder(path)
        return from_table(table, folder, path.name or text, columns=columns, split=split, notes=(note,))
    if not path.exists():
        raise DataError(f"There is no file or folder {text}.")
    if path.name.endswith((".tar", ".tgz")) or ".tar." in path.name:
        return from_table(read_tars([path]), path.parent, path.name, columns=columns, split=split)
    if path.suffix not in TABLE_SUFFIXES:
        raise DataError(f"{path} ends in {path.suffix!r}. Known: a folder, .tar, {', '.join(TABLE_SUFFIXES)}.")
    return from_table(read_table(path), path.parent, path.name, columns=columns, split=split)


def from_table(
    table: pa.Table,
    folder: Path,
    name: str,
    *,
    columns: Columns = Columns(),
    split: str | None = None,
    notes: tuple[str, ...] = (),
) -> AbstractSource:
    """Return a source over a table whose columns are named by `columns` or found out, with notes on what was assumed."""
    found = sniff(table, columns)
    if split is not None:
        table, name = _only(table, found.split, split), f"{name}:{split}"
    elif found.split is not None:
        parts = ", ".join(sorted(map(str, pc.unique(table[found.split]).to_pylist())))
        notes += (f"All parts of column {found.split!r} are read together ({parts}); name one with `name:split`.",)
    before = table.num_rows
    table = _join_repeats(table, found)
    if table.num_rows < before:
        notes += (f"{before:,} rows name {table.num_rows:,} images: rows with one image are its several captions.",)
    named = [f"{f.name} = {getattr(found, f.name)!r}" for f in fields(found) if getattr(found, f.name)]
    return TableSource(table, found, folder, name, (*notes, f"Columns: {', '.join(named)}."))


def from_datasets(dataset: Any, *, columns: Columns = Columns(), name: str = "dataset") -> AbstractSource:
    """Return a source over a `datasets.Dataset`; images stay encoded, class numbers become names."""
    datasets = require("datasets", "hf")
    classes = {}
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.ClassLabel):
            classes[column] = feature.names
    table = dataset.with_format("arrow")[:]
    for column, names in classes.items():
        values = [None if value is None else names[value] for value in table[column].to_pylist()]
        table = table.set_column(table.column_names.index(column), column, pa.array(values, pa.string()))
    return from_table(table, Path(), name, columns=columns)


def describe(source: AbstractSource, *, count: int = 3) -> Iterator[str]:
    """Yield sentences about a source: size, assumptions, and the texts of its first samples."""
    yield f"{source.name}: {len(source):,} samples."
    yield from source.notes
    for index in range(min(count, len(source))):
        texts = source.texts(index)
        more = f" (and {len(texts) - 1} more)" if len(texts) > 1 else ""
        yield f"  sample {index}: {texts[0].text!r} as {texts[0].role}{more}" if texts else f"  sample {index}: no text"


def sniff(table: pa.Table, given: Columns) -> Columns:
    """Return `given` with every gap filled by a column whose name, or else whose content, fits.

    Raises:
        ColumnError: If a given column is not there.
    """
    for name in (*(getattr(given, f.name) for f in fields(given) if f.name != "texts"), *given.texts):
        if name is not None and name not in table.column_names:
            raise ColumnError(f"There is no column {name!r}. {nearest(name, table.column_names)}")
    found = given
    for field, names in _NAMES.items():
        if getattr(found, field) is None:
            match = next((c for c in table.column_names if _plain(c) in names.split() and c not in _used(found)), None)
            found = replace(found, **{field: match})  # type: ignore[arg-type]
    if found.image is None:
        candidates = (c for c in table.column_names if c not in _used(found) and _holds_images(table[c]))
        found = replace(found, image=next(candidates, None))
    if not found.texts:
        rest = [c for c in table.column_names if c not in _used(found) and _holds_text(table[c])]
        texts = tuple(c for c in rest if _is_text_name(c))
        longest = max(rest, key=lambda c: _mean_length(table[c]), default=None)
        if not texts and longest is not None and (found.label is None or _mean_length(table[longest]) > 15):
            texts = (longest,)
        found = replace(found, texts=texts)
    return found


def role_of(column: str) -> tuple[Role, str | None]:
    """Return the role and the language that a column's name tells."""
    words = re.split(r"[^a-z]+", column.lower())
    language = words[-1] if words[-1] in _LANGUAGES else None
    role = next((role for start, role in _ROLES.items() if any(start in word for word in words)), None)
    return role or ("translation" if language not in (None, "en") else "caption"), language


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _used(columns: Columns) -> set[str]:
    return {getattr(columns, f.name) for f in fields(columns) if f.name != "texts"} | set(columns.texts)


def _is_text_name(column: str) -> bool:
    words = [word for word in re.split(r"[^a-z]+", column.lower()) if word]
    known = _TEXT_NAMES.split()
    return bool(words) and (
        _plain(column) in known or words[0] in known or (len(words) == 1 and words[0] in _LANGUAGES)
    )


def _head(column: pa.ChunkedArray) -> list[Any]:
    return [value for value in column.slice(0, 50).to_pylist() if value is not None]


def _holds_images(column: pa.ChunkedArray) -> bool:
    """Return whether the first cells look like images: bytes, {bytes, path}, or names with an image's ending."""
    values = _head(column)
    if pa.types.is_struct(column.type):
        return bool(values) and "bytes" in values[0]
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return bool(values)
    return bool(values) and all(isinstance(v, str) and v.lower().endswith(IMAGE_SUFFIXES) for v in values)


def _holds_text(column: pa.ChunkedArray) -> bool:
    inner = (
        column.type.value_type if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) else column.type
    )
    return bool(pa.types.is_string(inner) or pa.types.is_large_string(inner)) and bool(_head(column))


def _mean_length(column: pa.ChunkedArray) -> float:
    values = _head(column)
    return sum(len(str(value)) for value in values) / max(1, len(values))


def _is_unique(column: pa.ChunkedArray) -> bool:
    plain = pa.types.is_string(column.type) or pa.types.is_integer(column.type)
    return bool(plain and column.null_count == 0 and pc.count_distinct(column).as_py() == len(column))


def _only(table: pa.Table, column: str | None, split: str) -> pa.Table:
    if column is None:
        raise ColumnError(
            f"The part {split!r} was asked for, but no column tells parts apart. Name it with columns.split."
        )
    kept = table.filter(pc.equal(table[column], split))
    if kept.num_rows == 0:
        known = map(str, pc.unique(table[column]).to_pylist())
        raise DataError(f"No row has {split!r} in column {column!r}. {nearest(split, known)}")
    return kept


def _join_repeats(table: pa.Table, columns: Columns) -> pa.Table:
    """Return one row per image where several rows name the same file, as in Flickr's one caption per line."""
    image = columns.image
    if image is None or not pa.types.is_string(table[image].type) or _is_unique(table[image]):
        return table
    texts = [c for c in columns.texts if pa.types.is_string(table[c].type)]
    if not texts:
        return table
    rest = [c for c in table.column_names if c not in (image, *texts)]
    sums = [(c, "list") for c in texts] + [(c, "first") for c in rest]
    joined = table.group_by(image, use_threads=False).aggregate(sums)
    return joined.rename_columns([re.sub(r"_(list|first)$", "", c) if c != image else c for c in joined.column_names])


def _load_dataset(name: str, split: str | None) -> Any:
    """Return a data set: a folder that `save_to_disk` wrote, else whatever `datasets.load_dataset` finds."""
    datasets = require("datasets", "hf")
    name, _, part = name.partition(":")
    split = split or part or None
    found = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
    if not isinstance(found, datasets.DatasetDict):
        return found
    if split is None and len(found) == 1:
        split = next(iter(found))
    if split not in found:
        raise DataError(f"{name} needs a split, as in hf:{name}:train. {nearest(split or '', found)}")
    return found[split]


def _named(name: str, split: str | None, columns: Columns) -> AbstractSource:
    """Return a source that has a name instead of a path."""
    from diptych.data.bundles import BUNDLES, bundle
    from diptych.data.openmoji import openmoji
    from diptych.data.scenes import scenes

    if name == "openmoji":
        return openmoji(split or "all")  # type: ignore[arg-type]
    if name == "scenes":
        return scenes(split or "train")
    if name in BUNDLES:
        return bundle(name, split, columns=columns)
    raise DataError(
        f"There is no file or folder {name!r}, and no data set of that name. {nearest(name, [*BUNDLES, 'openmoji', 'scenes'])}"
    )
