"""Imports point one way. This parses every file and fails on an upward arrow."""

import ast
from pathlib import Path

import pytest

import diptych

PACKAGE = Path(diptych.__file__).parent

# Lowest first. A module may import from its own layer's earlier names and from everything below.
ORDER = (
    "types",
    "errors",
    "files",
    "config",
    "data",
    "losses",
    "models",
    "verbs",
    "training",
    "evaluation",
    "curate",
    "use",
    "methods",
    "claims",
    "commands",
    "cli",
    "__main__",
)
FORBIDDEN_NAMES = {"utils", "helpers", "misc", "common"}
METHOD_TABLE = "methods/__init__.py"


def violations(package: Path) -> list[str]:
    """Return one sentence per broken rule."""
    found = []
    slugs = {path.stem for path in (package / "methods").glob("*.py")} - {"__init__"}
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if path.stem in FORBIDDEN_NAMES:
            found.append(f"{name}: a file is named for what it holds")
        if name == "__init__.py":
            continue  # the lazy table of public names
        own = name.split("/")[0].removesuffix(".py")
        tree = ast.parse(path.read_text())
        typing_only = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
            for node in ast.walk(block)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                found.append(f"{name}:{node.lineno}: relative import")
            for target in imported(node):
                parts = target.split(".")
                if parts[0] != "diptych" or len(parts) < 2 or parts[1] not in ORDER:
                    continue
                if ORDER.index(parts[1]) > ORDER.index(own) and not (own == "verbs" and id(node) in typing_only):
                    found.append(f"{name}:{node.lineno}: {own} imports {parts[1]}, which lies above it")
                if own == "methods" and name != METHOD_TABLE and parts[1] == "methods" and len(parts) > 2:
                    found.append(f"{name}:{node.lineno}: a method imports a method")
        if ORDER.index(own) < ORDER.index("methods"):
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and node.value in slugs - {"clip"}:  # "clip" also names a weight family
                    found.append(f"{name}:{node.lineno}: core names the method {node.value!r}")
    return found


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def test_imports_point_down():
    problems = [v for v in violations(PACKAGE) if "huggingface.py" not in v or "siglip" not in v]  # a family of weights, too
    problems = [v for v in problems if "openclip.py" not in v or "siglip" not in v]
    assert problems == []


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        ("data/a.py", "from diptych.models.dual import DualEncoder", "data imports models"),
        ("models/a.py", "import diptych.training.loop", "models imports training"),
        ("methods/b.py", "from diptych.methods.fdt import Config", "a method imports a method"),
        ("training/a.py", "if slug == 'fdt':\n    pass", "core names the method"),
        ("losses/a.py", "from . import contrastive", "relative import"),
        ("data/utils.py", "", "named for what it holds"),
        ("training/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diptych.methods.fdt", "imports methods"),
    ],
)
def test_the_test_can_fail(tmp_path, file, code, complaint):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "fdt.py").touch()
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(code)
    assert any(complaint in violation for violation in violations(tmp_path))
