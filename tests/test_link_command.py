"""`diptych link` and `diptych cluster`, on drawn pictures and a tiny model."""

import csv
import runpy
from pathlib import Path

import pytest
from PIL import Image

from diptych import commands
from diptych.cli import main
from diptych.commands import linking
from diptych.errors import ConfigError, DiptychError, InputError

COLOURS = ("red", "green", "blue", "orange", "purple", "black")


@pytest.fixture
def scans(tmp_path) -> Path:
    """Return a folder with 24 pictures of 6 colours, wide ones and square ones, and tables without texts: `scans.csv` and `nobody.csv`."""
    rows = []
    for number in range(24):
        size = (80, 12) if number % 2 else (16, 16)
        Image.new("RGB", size, COLOURS[number % 6]).save(tmp_path / f"{number}.png")
        rows.append((f"{number}.png", COLOURS[number % 6]))
    write(tmp_path / "scans.csv", ("image", "group"), rows)
    write(tmp_path / "nobody.csv", ("image",), [row[:1] for row in rows])
    write(tmp_path / "known.csv", ("text", "group"), [(f"<b>{c}</b>", c) for c in COLOURS[:5]])
    return tmp_path


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Put a reader in place that says the colour, and return what it was asked."""
    asked = []

    def reader(image: Image.Image) -> str:
        asked.append(image.getpixel((0, 0)))
        return next((c for c in COLOURS if Image.new("RGB", (1, 1), c).getpixel((0, 0)) == asked[-1]), "")

    monkeypatch.setattr(linking, "read_line", reader)
    return asked


def write(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_pictures_without_texts_are_read_and_linked_to_names(scans, read, saved_model, capsys):
    found = commands.link(
        str(scans / "scans.csv"),
        str(scans / "known.csv"),
        model=saved_model,
        ocr="line",
        out=scans / "links.csv",
        html=scans / "links.html",
    )
    said, rows = capsys.readouterr().err, rows_of(scans / "links.csv")
    assert len(read) == 24 and "reading them from 24 images" in said and "On 12 queries that chose nothing" in said
    assert [row["query_text"] for row in rows] == [COLOURS[number % 6] for number in range(24)]
    assert (
        sum(bool(row["reference"]) for row in rows) == found.kept.sum() and f"{found.kept.sum()} of 24 records" in said
    )
    page = (scans / "links.html").read_text()
    assert "12 queries that chose nothing" in page and "precision" in page and "at chance" not in page
    assert "<b>" not in page and "&lt;b&gt;" in page and 'class="query wide"' in page and 'class="query"' in page


def test_without_groups_all_are_linked_and_the_way_out_is_said(scans, read, saved_model, capsys):
    sources = str(scans / "nobody.csv"), str(scans / "known.csv")
    found = commands.link(*sources, model=saved_model, ocr="off", out=scans / "a.csv", html=scans / "a.html")
    assert found.kept.all() and not read and "set --threshold" in capsys.readouterr().err
    assert "HIT" not in (scans / "a.html").read_text()
    commands.link(*sources, model=saved_model, ocr="off", threshold=2.0, out=scans / "a.csv")
    assert "0 of 24 records are linked above a cosine of 2.000" in capsys.readouterr().err


def test_clusters(scans, read, saved_model, capsys):
    commands.cluster(
        str(scans / "nobody.csv"), model=saved_model, ocr="line", threshold=1e-5, image_weight=0.0, out=scans / "a.csv"
    )
    rows = rows_of(scans / "a.csv")
    assert [row["cluster"] for row in rows] == [str(number % 6) for number in range(24)]  # equal texts, equal vectors
    assert "24 records are 6 clusters" in capsys.readouterr().err


def test_records_that_have_nothing_are_counted(scans, read, saved_model, capsys):
    (scans / "1.png").write_bytes(b"no picture")
    (scans / "2.png").unlink()
    Image.new("RGB", (8, 8), "white").save(scans / "3.png")  # the reader finds nothing on it
    commands.cluster(str(scans / "nobody.csv"), model=saved_model, ocr="line", threshold=0.1, out=scans / "a.csv")
    said = capsys.readouterr().err
    assert "Nothing could be read in 3 of them" in said and "2 records of nobody.csv have no text and no image" in said
    assert len(rows_of(scans / "a.csv")) == 22


def test_what_cannot_work_is_said_before_anything_is_read(scans, read, monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(linking, "load", load)
    scan, out = str(scans / "nobody.csv"), scans / "a.csv"
    with pytest.raises(ConfigError, match="--threshold"):
        commands.cluster(scan, ocr="line", out=out)
    with pytest.raises(DiptychError, match=r"absent\.csv"):
        commands.link(scan, str(scans / "absent.csv"), ocr="line", out=out)
    for run in (
        lambda: commands.cluster(scan, image_weight=3.0, out=out),
        lambda: commands.link(scan, scan, image_weight=3.0, out=out),
    ):
        with pytest.raises(InputError, match="not 3"):
            run()
    assert not read and not out.exists()


def test_help_names_what_is_linked_to_what(capsys):
    with pytest.raises(SystemExit):
        main(["link", "--help"])
    assert "QUERIES REFERENCES" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_reads_links_and_makes_a_page(tmp_path, monkeypatch, capsys, saved_model):
    for package in ("matplotlib", "emoji", "rapidocr"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "link_scans.py"))
    example["main"](model=saved_model)
    assert "F1 of links" in capsys.readouterr().out
    rows = rows_of(tmp_path / "runs" / "link_scans" / "links.csv")
    # Few letters of a legible line are misread, whatever the model.
    names = {row["query"]: row["query_text"] for row in rows}
    assert len(names) == 60 and sum(bool(text) for text in names.values()) >= 55
    assert (tmp_path / "runs" / "link_scans" / "links.html").read_text().count('class="card"') == 30


@pytest.mark.slow
@pytest.mark.data
def test_the_example_on_directories_that_were_read_by_machine(capsys):
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "link_firms.py"))
    example["main"](model="mini")
    lines = capsys.readouterr().out.splitlines()
    f1 = [float(line.split("F1 ")[1].split()[0]) for line in lines]
    assert len(f1) == 4 and f1[1] > f1[0] > 0.7  # by letters: more fields say more
