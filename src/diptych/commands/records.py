"""What runs and results keep of how they came about."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diptych.files import write_text
from diptych.training import distributed

_PACKAGES = ("diptych", "torch", "torchvision", "timm", "tokenizers", "numpy", "pillow")


def write_json(path: Path, record: Any) -> None:
    """Write plain JSON values to a file, whole or not at all; of several processes the first one does."""
    if not distributed.is_first():
        return
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def give_json(record: Any, where: str | None) -> None:
    """Write plain JSON values to a file, or print them where it is `-`; do nothing where it is None."""
    if where == "-":
        print(json.dumps(record, indent=2))
    elif where is not None:
        write_json(Path(where), record)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter to a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
