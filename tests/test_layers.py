"""Imports point one way. This parses every file and fails on an upward arrow."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import diptych
from diptych.methods import METHODS

PACKAGE = Path(diptych.__file__).parent

# Lowest first. A module may import from everything before it, and from its own folder.
ORDER = (
    "types",
    "errors",
    "files",
    "threads",
    "config",
    "data",
    "losses",
    "models",
    "verbs",
    "training",
    "evaluation",
    "curate",
    "use",
    "claims",
    "methods",
    "bench",
    "commands",
    "shipped",
    "cli",
    "__main__",
)
FORBIDDEN_NAMES = {"utils", "helpers", "misc", "common"}
METHOD_TABLE = "methods/__init__.py"

# There "clip" and "siglip" are what other libraries call their architectures.
FAMILIES = {"models/huggingface.py", "models/openclip.py"}


def violations(package: Path) -> list[str]:
    """Return one sentence per broken rule."""
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if path.stem in FORBIDDEN_NAMES:
            found.append(f"{name}: a file is named for what it holds")
        if name != "__init__.py":  # the lazy table of public names
            tree = ast.parse(path.read_text())
            found += [f"{name}:{line}: {complaint}" for line, complaint in complaints(tree, name)]
    return found


def complaints(tree: ast.Module, name: str) -> Iterator[tuple[int, str]]:
    own = name.split("/")[0].removesuffix(".py")
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    core = ORDER.index(own) < ORDER.index("methods")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "relative import"
        for target in imported(node):
            layer = target[1] if len(target) > 1 else ""
            if layer not in ORDER:
                yield node.lineno, f"imports {'.'.join(target)}, not the module that defines it"
            elif ORDER.index(layer) > ORDER.index(own) and not (own == "verbs" and id(node) in typing_only):
                yield node.lineno, f"{own} imports {layer}, which lies above it"
            elif own == layer == "methods" and name != METHOD_TABLE:
                yield node.lineno, "a method imports a method"
        if core and isinstance(node, ast.Constant) and node.value in METHODS and name not in FAMILIES:
            yield node.lineno, f"core names the method {node.value!r}"


def imported(node: ast.AST) -> list[list[str]]:
    """Return the dotted names of diptych that a statement imports, split at the dots."""
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    return [parts for parts in (name.split(".") for name in names) if parts[0] == "diptych"]


def test_imports_point_down():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        ("data/a.py", "from diptych.models.dual import DualEncoder", "data imports models"),
        ("models/a.py", "import diptych.training.loop", "models imports training"),
        ("training/a.py", "def f():\n    from diptych.evaluation import run", "training imports evaluation"),
        (
            "training/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diptych.methods.fdt",
            "imports methods",
        ),
        ("use/a.py", "from diptych import load", "not the module that defines it"),
        ("use/a.py", "import diptych", "not the module that defines it"),
        ("methods/b.py", "from diptych.methods.fdt import Config", "a method imports a method"),
        ("methods/b.py", "from diptych.methods import load_method", "a method imports a method"),
        ("training/a.py", "if slug == 'fdt':\n    pass", "core names the method"),
        ("training/a.py", "DEFAULT = 'clip'", "core names the method"),
        ("losses/a.py", "from . import contrastive", "relative import"),
        ("data/utils.py", "", "named for what it holds"),
    ],
)
def test_the_test_can_fail(tmp_path, file, code, complaint):
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text(code)
    (found,) = violations(tmp_path)
    assert file in found and complaint in found


def test_what_is_allowed(tmp_path):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "b.py").write_text("from diptych.models.dual import DualEncoder\nNAME = 'fdt'")
    (tmp_path / "verbs.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from diptych.training.recipe import Recipe"
    )
    assert violations(tmp_path) == []
