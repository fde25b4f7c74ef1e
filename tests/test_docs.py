"""Every example of the pages runs, in order, in a folder that holds two others.

`photos` are twelve small pictures with captions, `holiday` are fifty with a table.

Python blocks of a page share their names. Of bash blocks, `diptych` is run; what `make` and `pip install` name must exist. What is
not meant to run is a text block. A page with the comment `slow` runs in `make docs` and `make test-slow`.
"""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

import diptych
from diptych.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


EXAMPLES = [
    pytest.param(page, id=page.name, marks=[pytest.mark.slow] if "<!-- slow" in page.read_text() else [])
    for page in PAGES
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make the folder that the pages speak of, and work in it."""
    (tmp_path / "photos").mkdir()
    for number in range(12):
        shape = ("circle", "square")[number % 2]
        image = Image.new("RGB", (96, 80), (20 * number, 90, 255 - 20 * number))
        canvas = ImageDraw.Draw(image)
        (canvas.ellipse if shape == "circle" else canvas.rectangle)((25, 15, 75, 65), fill="white")
        image.save(tmp_path / "photos" / f"{number}.jpg")
        (tmp_path / "photos" / f"{number}.txt").write_text(f"a white {shape} on ground number {number}\n")
    (tmp_path / "holiday").mkdir()
    lines = ["nr;bild;was man sieht"]
    colours, skies = ("red", "yellow", "green", "purple", "black"), ("calm water", "a dark sky")
    for number in range(1, 51):
        colour, sky = colours[number % 5], skies[number // 5 % 2]
        image = Image.new("RGB", (120, 80), "midnightblue" if sky == "a dark sky" else "lightblue")
        ImageDraw.Draw(image).polygon([(20 + number % 7, 50), (100, 50), (80, 70), (40, 70)], fill=colour)
        image.save(tmp_path / "holiday" / f"holiday-{number:02}.jpg")
        place = "under" if sky == "a dark sky" else "on"
        lines.append(f"{number};holiday-{number:02}.jpg;a {colour} boat {place} {sky}")
    (tmp_path / "holiday" / "list.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_run(page, folder):
    names: dict[str, object] = {"__name__": "__main__"}
    for language, code in BLOCK.findall(page.read_text()):
        if language == "python":
            exec(compile(code, page.name, "exec"), names)
        else:
            for line in code.splitlines():
                run_line(shlex.split(line, comments=True))


def run_line(words: list[str]) -> None:
    match words:
        case []:
            pass
        case ["diptych", *arguments]:
            with pytest.raises(SystemExit) as stop:
                main(arguments)
            assert not stop.value.code, words
        case ["make", *targets]:
            known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(targets) <= set(known)
        case ["pip", "install", place]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(re.findall(r"\w+", place.partition("[")[2])) <= set(extras)
        case _:
            pytest.fail(f"{shlex.join(words)}: put what cannot run here in a text block")


def test_a_line_that_fails_is_seen(folder):
    with pytest.raises(AssertionError):
        run_line(["diptych", "doctor", "nowhere"])
    with pytest.raises(AssertionError):
        run_line(["make", "coffee"])
    with pytest.raises(pytest.fail.Exception):
        run_line(["rm", "-r", "photos"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_public_name_is_on_the_python_page():
    mentioned = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "python.md").read_text()))
    assert set(diptych.__all__) <= mentioned


def test_errors_page_draws_the_tree_of_the_code():
    tree = re.search(r"```text\n(.*?)```", (ROOT / "docs" / "errors.md").read_text(), re.DOTALL)
    code = (ROOT / "src" / "diptych" / "errors.py").read_text()
    assert tree is not None
    assert all(line in code for line in tree[1].splitlines())


def test_install_page_lists_every_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "install.md").read_text(), re.MULTILINE)
    assert set(listed) == set(extras)
