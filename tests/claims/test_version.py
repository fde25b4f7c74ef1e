import pytest

from diptych.claims import version
from diptych.claims.version import code_version


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a package of three files: a imports b and b imports c, from inside of a function; d is by itself."""
    root = tmp_path / "diptych"
    (root / "models").mkdir(parents=True)
    (root / "__init__.py").write_text("import diptych.d")
    (root / "a.py").write_text('"""Doc."""\nimport numpy\nimport diptych\nfrom diptych.models.b import two\n')
    (root / "models" / "__init__.py").write_text("")
    (root / "models" / "b.py").write_text("def two():\n    from diptych import c\n    return c.ONE + 1\n")
    (root / "c.py").write_text("ONE = 1\n")
    (root / "d.py").write_text("ONE = 1\n")
    monkeypatch.setattr(version, "PACKAGE", root)
    return root


@pytest.mark.parametrize(
    ("file", "old", "new", "counts"),
    [
        ("a.py", "Doc.", "The result was 0.4.", False),
        ("a.py", "import numpy", "import numpy  # for speed", False),
        ("a.py", "two\n", "two\n'a string by itself'\n", False),
        ("c.py", "ONE = 1", "ONE  =  1", False),
        ("c.py", "ONE = 1", "ONE = 2", True),
        ("models/b.py", "+ 1", "- 1", True),
        ("models/b.py", "return", "'what comes back'\n    return", False),
        ("d.py", "ONE = 1", "ONE = 2", False),
    ],
)
def test_what_changes_the_version(package, file, old, new, counts):
    before = code_version(package / "a.py")
    assert code_version(package / "a.py") == before and len(before) == 16
    text = (package / file).read_text()
    assert old in text
    (package / file).write_text(text.replace(old, new))
    assert (code_version(package / "a.py") != before) == counts


def test_files_that_import_each_other_end(package):
    (package / "c.py").write_text("import diptych.a\nONE = 1\n")
    assert code_version(package / "a.py")


def test_the_core_behind_a_method_counts(monkeypatch):
    from pathlib import Path

    from diptych.methods import clip

    seen = []
    monkeypatch.setattr(
        version, "_imported", lambda tree, find=version._imported: seen.extend(found := list(find(tree))) or found
    )
    code_version(Path(clip.__file__))
    names = {path.relative_to(version.PACKAGE).as_posix() for path in seen}
    assert {"losses/contrastive.py", "models/dual.py", "training/recipe.py", "data/loader.py"} <= names
    assert not {"cli.py", "commands.py", "methods/siglip.py", "__init__.py"} & names
