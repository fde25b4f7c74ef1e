"""Which code a number came from."""

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def code_version(*files: Path) -> str:
    """Return 16 hex digits that change with the code of these files or of anything in this package that they import, at any depth.

    Comments, docstrings and layout do not count, so that a result can be written into the file that it came from.
    """
    waiting, found = list(files), dict[Path, str]()
    while waiting:
        path = waiting.pop()
        if path not in found:
            tree = _without_docstrings(ast.parse(path.read_text(encoding="utf-8")))
            found[path] = ast.dump(tree)
            waiting += _imported(tree)
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(found):
        digest.update(f"{path.name}\n{found[path]}\n".encode())
    return digest.hexdigest()


def _without_docstrings(tree: ast.Module) -> ast.Module:
    """Return the tree without strings that stand by themselves."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [line for line in node.body if not _is_text(line)]
    return tree


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


def _imported(tree: ast.Module) -> Iterator[Path]:
    """Yield the files of this package that a file imports, wherever in it."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    for parts in (name.split(".") for name in names):
        if parts[0] == PACKAGE.name:
            yield from _file_of(parts[1:])


def _file_of(parts: list[str]) -> Iterator[Path]:
    """Yield the file that a dotted name lies in; nothing for the package itself, which holds no code."""
    for end in range(len(parts), 0, -1):
        place = PACKAGE.joinpath(*parts[:end])
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file():
                yield path
                return
