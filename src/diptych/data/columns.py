"""What the columns of a table mean: as the user says, else as their names tell, else as their content does."""

import re
from dataclasses import dataclass, fields, replace
from typing import Any

import pyarrow as pa

from diptych.data.parquet import holds_places
from diptych.data.tables import is_image_name
from diptych.errors import ColumnError, nearest
from diptych.types import Role


@dataclass(frozen=True)
class Columns:
    """What the columns of a table mean. Whatever is None or empty is found by name, then by content.

    Attributes:
        image: Paths, encoded bytes, {bytes, path} structs, or where such are in a file.
        texts: Strings or lists of strings. `caption_de` is a translation, `rewrite...`, `synthetic...` and `negative...` have those roles.
        label: Class names.
        key: Unique names of samples.
        group: Equal values are positives of each other.
        domain: Style or origin.
        split: Which part a row belongs to.
        language: ISO 639-1 code of a row's texts, for columns whose name tells none.
    """

    image: str | None = None
    texts: tuple[str, ...] = ()
    label: str | None = None
    key: str | None = None
    group: str | None = None
    domain: str | None = None
    split: str | None = None
    language: str | None = None


# Best name first: a table with `image` and `url` has its pictures in `image`. Names are compared as `_plain` leaves them.
_NAMES = {
    "image": "image img images jpg jpeg png webp photo picture imagepath imagefile imagefilename imagename imgpath imgname "
    "filepath filename file path imageurl imgurl url",
    "label": "labelname classname label class category cls target",
    "key": "key uid uuid id imageid imgid sampleid",
    "group": "group groupid",
    "domain": "domain style",
    "split": "split subset partition",
    "language": "language lang",
}
_TEXT_WORDS = frozenset(
    "caption captions text texts txt title description alt alttext sentence sentences comment comments prompt".split()
)
_LANGUAGES = frozenset("ar cs da de el en es fa fi fr he hi hu id it ja ko nl no pl pt ro ru sv th tr uk vi zh".split())
_ROLES: dict[str, Role] = {
    "rewrit": "rewrite",
    "synthetic": "synthetic",
    "generated": "synthetic",
    "negative": "hard_negative",
}
_LABEL_LIKE = 15
"""Beside a label, an unnamed column is taken for captions only when its texts are longer than this on average, in characters."""


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
            free = {
                _plain(c): c for c in reversed(table.column_names) if c not in _used(found) and _may_be(field, table[c])
            }
            found = replace(found, **{field: next((free[name] for name in names.split() if name in free), None)})  # type: ignore[arg-type]
    if found.image is None:
        candidates = (c for c in table.column_names if c not in _used(found) and _holds_images(table[c]))
        found = replace(found, image=next(candidates, None))
    return found if found.texts else replace(found, texts=_find_texts(table, found))


def role_of(column: str) -> tuple[Role, str | None]:
    """Return the role and the language that a column's name tells."""
    words = _words(column)
    language = words[-1] if words and words[-1] in _LANGUAGES else None
    role = next((role for start, role in _ROLES.items() if any(start in word for word in words)), None)
    return role or ("translation" if language not in (None, "en") else "caption"), language


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_list(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds lists of strings."""
    return bool((pa.types.is_list(kind) or pa.types.is_large_list(kind)) and is_text(kind.value_type))


def head(column: pa.ChunkedArray) -> list[Any]:
    """Return the values among the first 50 that are not null."""
    return [value for value in column.slice(0, 50).to_pylist() if value is not None]


def _may_be(field: str, column: pa.ChunkedArray) -> bool:
    kind = column.type
    return not pa.types.is_nested(kind) or (field == "image" and pa.types.is_struct(kind))


def _find_texts(table: pa.Table, found: Columns) -> tuple[str, ...]:
    """Return the columns named like texts, captions first; without any, the one with the longest texts."""
    rest = [column for column in table.column_names if column not in _used(found) and _holds_text(column, table)]
    if named := tuple(column for column in rest if _is_text_name(column)):
        return tuple(sorted(named, key=lambda column: role_of(column)[0] != "caption"))
    longest = max(rest, key=lambda column: _mean_length(table[column]), default=None)
    if longest is None or (found.label is not None and _mean_length(table[longest]) <= _LABEL_LIKE):
        return ()
    return (longest,)


def _is_text_name(column: str) -> bool:
    words = _words(column)
    role, language = role_of(column)
    if role not in ("caption", "translation") or _plain(column) == "name" or words == [language]:
        return True
    stem = words[:-1] if language is not None else words
    return _plain(column) in _TEXT_WORDS or bool(stem and {stem[0], stem[-1]} & _TEXT_WORDS)


def _holds_text(column: str, table: pa.Table) -> bool:
    """Return whether the first cells read like words: not numbers, not addresses, not file names, not identifiers."""
    kind = table[column].type
    if not is_text(kind) and not is_list(kind):
        return False
    texts = [t for v in head(table[column]) for t in (v if isinstance(v, list) else [v]) if t and t.strip()]
    worded = [t for t in texts if any(map(str.isalpha, t)) and "://" not in t and not is_image_name(t)]
    if _words(column)[-1:] == ["id"]:  # an identifier more often than Indonesian
        worded = [text for text in worded if " " in text]
    return 2 * len(worded) > len(texts)


def _holds_images(column: pa.ChunkedArray) -> bool:
    """Return whether the first cells look like images: bytes, {bytes, path}, the place of either, or names with an image's ending."""
    values = head(column)
    if pa.types.is_struct(column.type):
        return bool(values) and ("bytes" in values[0] or holds_places(column.type))
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return bool(values)
    return bool(values) and all(isinstance(value, str) and is_image_name(value) for value in values)


def _mean_length(column: pa.ChunkedArray) -> float:
    values = head(column)
    return sum(len(str(value)) for value in values) / max(1, len(values))


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z]+", name.lower()) if word]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _used(columns: Columns) -> set[str | None]:
    return {getattr(columns, f.name) for f in fields(columns) if f.name != "texts"} | set(columns.texts)
