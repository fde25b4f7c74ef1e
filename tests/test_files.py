import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diptych.files import (
    atomic_file,
    atomic_folder,
    cache_folder,
    passing_folder,
    replace_between,
    surviving,
    write_text,
)


def write(folder: Path, word: str) -> None:
    with atomic_folder(folder) as target:
        (target / "a").write_text(word)
        (target / "b").write_text(word)


def words(folder: Path) -> set[str]:
    return {(surviving(folder) / name).read_text() for name in ("a", "b")}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "x.npy"
    with atomic_file(path) as file:
        file.write_text("half")
        assert not path.exists() and file.parent == path.parent and file.suffix == ".npy"
        file.write_text("whole")
    assert path.read_text() == "whole" and names(path.parent) == ["x.npy"]
    with atomic_file(path) as file:
        file.write_text("newer")
        assert path.read_text() == "whole"
    assert path.read_text() == "newer" and names(path.parent) == ["x.npy"]


def test_text_is_written_whole_and_in_utf8(tmp_path, monkeypatch):
    write_text(path := tmp_path / "new" / "x.txt", "Ä\n")
    assert path.read_bytes() == "Ä\n".encode() and names(path.parent) == ["x.txt"]
    monkeypatch.setattr("diptych.files._to_disk", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        write_text(path, "newer")
    assert path.read_text(encoding="utf-8") == "Ä\n" and names(path.parent) == ["x.txt"]


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    folder = tmp_path / "new" / "run"
    write(folder, "old")
    (folder / "c").write_text("only in the old one")
    with atomic_folder(folder) as target:
        assert names(target) == []
        (target / "a").write_text("new")
        (target / "b").write_text("new")
        assert words(folder) == {"old"}
    assert names(folder) == ["a", "b"] and words(folder) == {"new"} and names(folder.parent) == ["run"]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_content(tmp_path, error):
    path, folder = tmp_path / "x", tmp_path / "run"
    path.write_text("old")
    write(folder, "old")
    with pytest.raises(error), atomic_file(path) as file:
        file.write_text("new")
        raise error
    with pytest.raises(error), atomic_folder(folder) as target:
        (target / "a").write_text("new")
        raise error
    assert path.read_text() == "old" and words(folder) == {"old"} and names(tmp_path) == ["run", "x"]


def test_an_exception_leaves_nothing_where_nothing_was(tmp_path):
    with pytest.raises(KeyError), atomic_file(tmp_path / "x") as file:
        file.write_text("new")
        raise KeyError
    with pytest.raises(KeyError), atomic_folder(tmp_path / "run") as target:
        (target / "a").write_text("new")
        raise KeyError
    assert names(tmp_path) == []


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def half_then_full(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text[: len(text) // 2])
        file.flush()
        full()


@pytest.mark.parametrize("moment", ["writing", "syncing", "renaming"])
def test_a_full_disk_leaves_the_old_content_and_no_rest(tmp_path, monkeypatch, moment):
    path, folder = tmp_path / "x", tmp_path / "run"
    path.write_text("old")
    write(folder, "old")
    with monkeypatch.context() as patch:
        if moment == "writing":
            patch.setattr(Path, "write_text", half_then_full)
        elif moment == "syncing":  # some disks say only now that they are full
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space left"), atomic_file(path) as file:
            file.write_text("new")
        with pytest.raises(OSError, match="No space left"):
            write(folder, "new")
    assert path.read_text() == "old" and words(folder) == {"old"} and names(tmp_path) == ["run", "x"]


# Writes a folder over and over and says so each time; kills itself right before the call that its arguments name.
WRITER = """
import os, shutil, signal, sys
from itertools import count
from pathlib import Path
from diptych.files import atomic_folder

def dying(function, at):
    calls = count(1)
    def call(*arguments, **options):
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

folder, moment, at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if moment == "replace":
    Path.replace = dying(Path.replace, at)
elif moment == "rmtree":
    shutil.rmtree = dying(shutil.rmtree, at)
for n in range(1, 100_000):
    with atomic_folder(folder) as target:
        (target / "a").write_text(f"new {n}")
        if moment == "write":
            os.kill(os.getpid(), signal.SIGKILL)
        (target / "b").write_text(f"new {n}")
    print(n, flush=True)
"""


def start(folder: Path, moment: str, at: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), moment, str(at)], stdout=subprocess.PIPE, text=True
    )


# The first `with` moves the old folder away (replace 1) and the new one in (replace 2); rmtree clears `.old` before and after.
@pytest.mark.parametrize(
    ("moment", "at", "expected", "where"),
    [
        ("write", 0, "old", "run"),
        ("rmtree", 1, "old", "run"),
        ("replace", 1, "old", "run"),
        ("replace", 2, "old", "run.old"),
        ("rmtree", 2, "new 1", "run"),
    ],
)
def test_killed_at_any_moment_the_old_or_the_new_folder_is_whole(tmp_path, moment, at, expected, where):
    folder = tmp_path / "run"
    write(folder, "old")
    with start(folder, moment, at) as process:
        assert process.wait(30) == -signal.SIGKILL and process.stdout.read() == ""
    assert words(folder) == {expected} and surviving(folder).name == where
    write(folder, "after")
    assert words(folder) == {"after"} and surviving(folder) == folder and not (tmp_path / "run.old").exists()


def test_killed_at_chance_moments_what_was_promised_is_there(tmp_path):
    folder = tmp_path / "run"
    for lines in (3, 20, 50):
        with start(folder, "never") as process:
            for _ in range(lines):
                process.stdout.readline()
            process.kill()
            process.wait(30)
            promised = lines + len(process.stdout.read().split())
        (found,) = words(folder)
        assert int(found.removeprefix("new ")) in (promised, promised + 1)


def test_what_survives():
    missing = Path("nowhere") / "run"
    assert surviving(missing) == missing


def test_both_old_and_new_there_the_new_one_counts(tmp_path):
    write(tmp_path / "run", "new")
    write(tmp_path / "run.old", "old")
    assert words(tmp_path / "run") == {"new"}


def test_files_get_the_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    usual = (tmp_path / "plain").stat().st_mode
    with atomic_file(tmp_path / "x") as file:
        file.touch()
    with atomic_folder(tmp_path / "run") as target:
        (target / "a").touch(mode=0o600)  # as safetensors and tempfile do
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "run" / "a").stat().st_mode == usual


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv("DIPTYCH_CACHE", "somewhere/else")
    assert cache_folder() == Path("somewhere/else")
    monkeypatch.setenv("DIPTYCH_CACHE", "")
    assert cache_folder() == Path.home() / ".cache" / "diptych"


def test_text_is_put_between_marks(tmp_path):
    page = tmp_path / "page.md"
    assert not replace_between(page, "<!-- a -->", "<!-- b -->", "new") and not page.exists()
    page.write_text("before <!-- a -->old\\1\n<!-- b --> after <!-- a -->second<!-- b -->")
    assert replace_between(page, "<!-- a -->", "<!-- b -->", r"new\1")
    assert page.read_text() == "before <!-- a -->\n\nnew\\1\n\n<!-- b --> after <!-- a -->second<!-- b -->"


def test_a_passing_folder_goes_with_its_context_and_takes_those_of_the_killed_along(tmp_path):
    for name in ("kept-00000000", "kept-11111111", "else-22222222"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        if name != "kept-11111111":  # that one was used a moment ago
            os.utime(tmp_path / name, (0, 0))
    with passing_folder(tmp_path, "kept") as folder:
        assert {path.name for path in tmp_path.iterdir()} == {folder.name, "kept-11111111", "else-22222222"}
        os.utime(folder, (0, 0))
        with passing_folder(tmp_path, "kept") as other:  # old, but somebody holds it
            assert folder.exists() and other != folder
        assert not other.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"kept-11111111", "else-22222222"}


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        "import os, signal, sys, pathlib\nfrom diptych.files import passing_folder\n"
        "with passing_folder(pathlib.Path(sys.argv[1]), 'kept'):\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    os.utime(left, (0, 0))
    with passing_folder(tmp_path, "kept") as folder:
        assert list(tmp_path.iterdir()) == [folder]


def test_a_passing_folder_that_cannot_be_made_is_only_a_path(tmp_path):
    (tmp_path / "file").touch()
    with passing_folder(tmp_path / "file", "kept") as folder:
        assert not folder.exists()
