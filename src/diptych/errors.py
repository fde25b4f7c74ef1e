"""Every error diptych raises on purpose.

    DiptychError
    ├── InputError (ValueError)          something the user gave cannot be used
    │   ├── DataError                    a source as a whole
    │   │   ├── ColumnError              a column is missing or ambiguous
    │   │   ├── ImageError               one image
    │   │   └── TextError                one text
    │   ├── ConfigError                  a recipe, a key, a value
    │   ├── CheckpointError              a run directory or weight file
    │   └── EvaluationError              a metric that is undefined on this input
    ├── TrainingError (RuntimeError)     a run that cannot go on
    ├── OfflineError (RuntimeError)      a download was needed and not allowed
    ├── MissingExtraError (ImportError)  an optional dependency is not installed
    └── PlannedMethodError (NotImplementedError)

A message says what was needed, what came, and what to do next.
"""

import importlib
from collections.abc import Iterable
from difflib import get_close_matches
from types import ModuleType


class DiptychError(Exception):
    """Root of all errors raised on purpose."""


class InputError(DiptychError, ValueError):
    """Something the user gave cannot be used."""


class DataError(InputError):
    """A data source as a whole cannot be used."""


class ColumnError(DataError):
    """A column is missing or cannot be told apart from others."""


class ImageError(DataError):
    """One image cannot be used."""


class TextError(DataError):
    """One text cannot be used."""


class ConfigError(InputError):
    """A recipe, a key or a value is wrong."""


class CheckpointError(InputError):
    """A run directory or weight file cannot be used."""


class EvaluationError(InputError):
    """A metric is undefined on this input."""


class TrainingError(DiptychError, RuntimeError):
    """A run cannot go on."""


class OfflineError(DiptychError, RuntimeError):
    """A download was needed and not allowed."""


class MissingExtraError(DiptychError, ImportError):
    """An optional dependency is not installed."""


class PlannedMethodError(DiptychError, NotImplementedError):
    """A method that is listed but not built yet."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a sentence that names the known words closest to `name`, then all of them."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(known) or 'none'}."


def require(module: str, extra: str) -> ModuleType:
    """Return an optional module, imported now.

    Args:
        module: Dotted name to import.
        extra: The extra of pyproject.toml that installs it.

    Raises:
        MissingExtraError: With the pip command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"This needs the package {module!r}, which could not be imported ({error}). Install it with: pip install 'diptych[{extra}]'"
        ) from error
