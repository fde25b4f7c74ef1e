"""Frozen dataclasses to JSON and back, strictly: an unknown key or a wrong value is an error that names the nearest right one."""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from diptych.errors import ConfigError, nearest

T = TypeVar("T")


def to_json(record: Any) -> Any:
    """Return plain JSON values; dataclasses carry their class name under `kind`, so that unions can be read back."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        values = {f.name: to_json(getattr(record, f.name)) for f in dataclasses.fields(record)}
        return {"kind": type(record).__name__, **values}
    if isinstance(record, (tuple, list)):
        return [to_json(item) for item in record]
    if isinstance(record, Mapping):
        return {key: to_json(value) for key, value in record.items()}
    return str(record) if isinstance(record, Path) else record


def from_json(cls: type[T], value: Any, *, of: tuple[type, ...] = (), where: str = "") -> T:
    """Return the dataclass that `to_json` wrote, or that a user wrote by hand; absent keys keep their defaults.

    Args:
        cls: Dataclass, or any annotation that a dataclass field may have.
        value: Plain JSON values.
        of: What stands in brackets behind a generic `cls`: for Recipe[Config], `from_json(Recipe, value, of=(Config,))`.
        where: Dotted path of `value`, for messages.

    Raises:
        ConfigError: With the nearest known key or the allowed values.
    """
    generic: Any = cls
    return typing.cast(T, _read(generic[of] if of else cls, value, where or getattr(cls, "__name__", "value")))


def override(record: T, changes: Mapping[str, Any], *, where: str = "") -> T:
    """Return a copy of a dataclass with some keys changed; nested mappings reach nested dataclasses.

    Raises:
        ConfigError: If a key is unknown or a value wrong.
    """
    where = where or type(record).__name__
    hints, new = typing.get_type_hints(type(record)), {}
    _check_keys(record, changes, where)
    for key, value in changes.items():
        if key == "kind":
            continue
        current, path = getattr(record, key), f"{where}.{key}"
        same = isinstance(value, Mapping) and value.get("kind", type(current).__name__) == type(current).__name__
        nested = same and dataclasses.is_dataclass(current)
        hint = type(current) if isinstance(hints[key], TypeVar) else hints[key]
        new[key] = override(current, value, where=path) if nested else _read(hint, value, path)
    return dataclasses.replace(record, **new)  # type: ignore[type-var]


def read_json(path: Path, advice: str) -> Any:
    """Return what a JSON file holds.

    Args:
        path: UTF-8 text.
        advice: What the user can do where it cannot be read, a sentence.

    Raises:
        ConfigError: If it is not there, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: no JSON, or no UTF-8
        raise ConfigError(f"{path} cannot be read as JSON: {error}. {advice}") from error


def fingerprint(record: Any) -> str:
    """Return 16 hex digits that change when any value of the record does."""
    return hashlib.blake2b(json.dumps(to_json(record), sort_keys=True).encode(), digest_size=8).hexdigest()


def _read(annotation: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if dataclasses.is_dataclass(origin or annotation):
        return _read_dataclass(origin or annotation, arguments, value, where)
    if isinstance(annotation, TypeVar):
        raise ConfigError(
            f"{where} may be of any class. Say of which: from_json({where.partition('.')[0]}, ..., of=(Config,))."
        )
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} is {value!r}. {nearest(str(value), map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} takes a list, not {value!r}.")
        inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(inner) != len(value):
            raise ConfigError(f"{where} takes {len(inner)} values, not {len(value)}.")
        return tuple(
            _read(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(inner, value, strict=True))
        )
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if annotation is Path and isinstance(value, str):
        return Path(value)
    plain = origin or annotation
    if plain is not Any and (not isinstance(value, plain) or (plain in (int, float) and isinstance(value, bool))):
        raise ConfigError(f"{where} takes {getattr(plain, '__name__', plain)}, not {value!r}.")
    return value


def _read_dataclass(cls: Any, arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} takes a mapping of keys, not {value!r}.")
    known = dict(zip(getattr(cls, "__parameters__", ()), arguments, strict=False))
    hints = {name: known.get(hint, hint) for name, hint in typing.get_type_hints(cls).items()}
    names = [f.name for f in dataclasses.fields(cls)]
    _check_keys(cls, value, where)
    if value.get("kind", cls.__name__) != cls.__name__:
        raise ConfigError(f"{where} is a {cls.__name__}, not a {value['kind']}.")
    absent = [f.name for f in dataclasses.fields(cls) if f.name not in value and _is_required(f)]
    if absent:
        raise ConfigError(f"{where} needs {', '.join(absent)}; it has {', '.join(value) or 'nothing'}.")
    return cls(**{name: _read(hints[name], value[name], f"{where}.{name}") for name in names if name in value})


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _check_keys(cls: Any, given: Mapping[str, Any], where: str) -> None:
    names = [f.name for f in dataclasses.fields(cls)]
    for key in given:
        if key not in names and key != "kind":
            raise ConfigError(f"{where} has no key {key!r}. {nearest(key, names)}")


def _read_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    choices = [choice for choice in arguments if choice is not type(None)]
    if isinstance(value, Mapping) and len(choices) > 1:
        named = {choice.__name__: choice for choice in choices}
        if value.get("kind") not in named:
            raise ConfigError(
                f"{where} needs a `kind`; it has {value.get('kind')!r}. {nearest(str(value.get('kind')), named)}"
            )
        return _read(named[value["kind"]], value, where)
    for choice in choices[:-1]:
        try:
            return _read(choice, value, where)
        except ConfigError:
            continue
    return _read(choices[-1], value, where)
