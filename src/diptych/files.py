"""Files that are there whole or not at all, and the folder for data made once."""

import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; it replaces `path` when the context ends well and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        _to_disk(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 text, whole or not at all."""
    with atomic_file(path) as file:
        file.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; it replaces `folder` when the context ends well and vanishes when it does not.

    A folder cannot be exchanged in one system call, so for a moment the old one is called `<name>.old`. A process killed in that
    moment leaves it there: read through `surviving` to find it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _beside(folder), _old(folder)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.iterdir():
            path.chmod(temporary.stat().st_mode & 0o666)  # some writers make files that only their owner can read
            _to_disk(path)
        _to_disk(temporary)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.replace(old)
        temporary.replace(folder)
        _to_disk(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def passing_folder(parent: Path, name: str) -> Iterator[Path]:
    """Give a new folder `<name>-........` that vanishes with the context; where none can be made, the path of one that is not there.

    A process that is killed leaves its folder. The next context of this name removes those that nobody holds a lock on, after an hour in which
    nothing was added to them; where folders cannot be locked they stay.
    """
    for left in parent.glob(f"{name}-????????"):
        if time.time() - left.stat().st_mtime > 3600 and (lock := _lock(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    folder = parent / f"{name}-{uuid.uuid4().hex[:8]}"
    with suppress(OSError):
        folder.mkdir(parents=True)
    lock = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Return a descriptor that holds the lock on a folder, until it is closed or its process ends; None if there is none to be had."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # no such locks on Windows
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def replace_between(path: Path, start: str, end: str, text: str) -> bool:
    """Put text between two marks in a file, whatever stood there; return whether the file has the marks."""
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    inside = f"{start}\n\n{text}\n\n{end}"
    new, count = re.subn(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: inside, old, count=1, flags=re.DOTALL)
    if new != old:
        write_text(path, new)
    return bool(count)


def surviving(folder: Path) -> Path:
    """Return `folder`, or the previous one that a kill during its replacement left behind."""
    return _old(folder) if not folder.exists() and _old(folder).exists() else folder


def sweep(path: Path) -> None:
    """Remove what killed writers of `path` have left beside it; only for a path that nobody else writes to now."""
    for left in path.parent.glob(f".????????.{path.name}"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def cache_folder() -> Path:
    """Return where data made once are kept: `DIPTYCH_CACHE`, or ~/.cache/diptych."""
    return Path(os.environ.get("DIPTYCH_CACHE") or Path.home() / ".cache" / "diptych")


def feature_folder() -> Path:
    """Return where what was computed for training is kept; it can be deleted at any time."""
    return cache_folder() / "features"


def _beside(path: Path) -> Path:
    """Return a new name in the same folder, hence on the same disk; files made there get the user's usual permissions."""
    return path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")


def _old(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.old")


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
