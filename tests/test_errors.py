import inspect
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

from diptych import errors
from diptych.errors import DiptychError, MissingExtraError, nearest, require

ROOT = Path(__file__).parents[1]


def test_the_drawn_tree_is_the_tree_of_classes():
    drawn: dict[str, tuple[str | None, str | None]] = {}
    above: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        found = re.match(r"([ │├└─]*)(\w+)(?: \((\w+)\))?", line)
        if found is None or not found[2].endswith("Error"):
            continue
        depth = len(found[1])
        while above and above[-1][0] >= depth:
            above.pop()
        drawn[found[2]] = (above[-1][1] if above else None, found[3])
        above.append((depth, found[2]))
    real = {}
    for name, cls in inspect.getmembers(errors, inspect.isclass):
        if issubclass(cls, DiptychError):
            ours = [base.__name__ for base in cls.__bases__ if issubclass(base, DiptychError)]
            python = [base.__name__ for base in cls.__bases__ if base.__module__ == "builtins"]
            real[name] = (ours[0] if ours else None, python[0] if python and ours else None)
    assert drawn == real and len(real) == 13


def test_a_missing_extra_prints_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "usearch", None)
    monkeypatch.delitem(sys.modules, "usearch.index", raising=False)
    with pytest.raises(MissingExtraError, match=r"'usearch\.index'.* pip install 'diptych\[search\]'$") as error:
        require("usearch.index", "search")
    assert isinstance(error.value, ImportError) and isinstance(error.value.__cause__, ImportError)


def test_a_package_that_breaks_on_import_is_said_to(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import nothing_of_this_name")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match="No module named 'nothing_of_this_name'"):
        require("broken_package", "demo")


def test_an_installed_module_is_returned():
    assert require("json", "demo") is json
    assert require("json.decoder", "demo") is json.decoder


def test_every_extra_that_code_asks_for_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    code = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    asked = set(re.findall(r'require\([^()]*, "(\w+)"\)', code)) | set(re.findall(r"diptych\[(\w+)\]", code))
    assert {"demo", "hf", "search"} <= asked and asked <= set(extras)


def test_nearest():
    assert nearest("sigclip", ["siglip", "clip", "fdt"]) == "Did you mean 'siglip'? Known: clip, fdt, siglip."
    assert nearest("zzz", ["b", "a"]) == "Known: a, b."
    assert nearest("x", []) == "Known: none."
