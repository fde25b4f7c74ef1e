import json
import shutil
from pathlib import Path

import pytest

from diptych.bench.plot import plot_record
from diptych.bench.record import Bar, Column, Finding, Record, Table, markdown, read_record, update_page, write_record
from diptych.bench.run import AREAS
from diptych.errors import ConfigError
from diptych.types import Interval

ROOT = Path(__file__).parents[2]
MACHINE = {
    "date": "2026-01-02",
    "processor": "A",
    "vector": "AVX2",
    "threads": 2,
    "cores": 4,
    "peak_gflops": {"fp32": 100.4, "bf16": 1000.0},
}


def record(*, area: str = "train", quick: bool = False) -> Record:
    rows = (
        {"name": "diptych", "over_levers": Interval(1.0, 1.0, 1.0), "seconds": 0.25},
        {"name": "a|b", "over_levers": Interval(2.0, 1.5, 2.5), "seconds": None},
    )
    columns = (Column("name", "step"), Column("over_levers", "ratio"), Column("seconds", "s", ".3f"))
    bars = (Bar("a / ours", 1.5, True, 2.0), Bar("MB", 100, False, 120.0), Bar("gone", 1, True, None))
    finding = Finding("What it is.", {"steps": 3}, (Table("Three turns", columns, rows),), bars, ("A note.",))
    return Record(area, finding, quick, 1.25, "diptych bench train", MACHINE, {"torch": "2"}, ("c is left out: why.",))


def test_markdown_says_all_that_was_measured():
    lines = markdown(record()).splitlines()
    assert "| a / ours | >= 1.5 | 2 | yes |" in lines
    assert "| MB | <= 100 | 120 | NO |" in lines
    assert "| gone | >= 1 | - | not measured |" in lines
    assert "| diptych | 1.00 [1.00, 1.00] | 0.250 |" in lines
    assert "| a&#124;b | 2.00 [1.50, 2.50] | - |" in lines
    assert lines[-1].startswith("`diptych bench train`, 1.2 minutes, 2026-01-02. A (AVX2), 2 threads on 4 cores")
    assert lines[-1].endswith("reaches 100 (fp32) and 1,000 (bf16) GFLOP/s.")
    assert "- A note." in lines and "- c is left out: why." in lines


def test_what_is_read_prints_as_what_was_written(tmp_path):
    path = write_record(record(), tmp_path)
    assert path == tmp_path / "train.json"
    assert markdown(read_record(path)) + "\n" == (tmp_path / "train.md").read_text() == markdown(record()) + "\n"


def test_a_broken_record_says_what_to_do(tmp_path):
    (tmp_path / "train.json").write_text("{")
    with pytest.raises(ConfigError, match="Run `diptych bench train` again"):
        read_record(tmp_path / "train.json")
    path = write_record(record(), tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"minuts": 1}))
    with pytest.raises(ConfigError, match="Did you mean 'minutes'"):
        read_record(path)


def test_the_page_shows_real_records_only(tmp_path):
    page = tmp_path / "page.md"
    marks = (
        "<!-- {}: written by `diptych bench` from benchmarks/results/, not by hand -->\n\nOld.\n\n<!-- end of {} -->"
    )
    page.write_text("\n\n".join(["# Mine", *(marks.format(area, area) for area in ("train", "loss", "data")), "End."]))
    write_record(record(), tmp_path / "results")
    write_record(record(area="loss", quick=True), tmp_path / "results")
    for area in ("train", "loss"):
        update_page(page, tmp_path / "results", area)
    text = page.read_text()
    assert "Three turns" in text and text.count("Not measured yet.") == 1 and "![train]" not in text
    assert text.startswith("# Mine\n") and text.endswith("End.") and text.count("Old.") == 1  # `data` was not asked for
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "train.png").touch()
    update_page(page, tmp_path / "results", "train")
    assert "![train](benchmarks/train.png)" in page.read_text()


def test_the_page_of_this_project_says_what_was_measured(tmp_path):
    """Fails if a number was typed, or results changed without the page."""
    page = tmp_path / "benchmarks.md"
    shutil.copyfile(ROOT / "docs" / "benchmarks.md", page)
    if (ROOT / "docs" / "benchmarks").is_dir():
        shutil.copytree(ROOT / "docs" / "benchmarks", tmp_path / "benchmarks")
    for area in AREAS:
        assert f"<!-- end of {area} -->" in page.read_text()
        update_page(page, ROOT / "benchmarks" / "results", area)
    assert page.read_text() == (ROOT / "docs" / "benchmarks.md").read_text()


@pytest.mark.parametrize("area", ["train", "loss", "data"])
def test_plots(tmp_path, area):
    rows = {
        "train": record().finding.tables[0].rows,
        "data": ({"name": "diptych", "workers": 0, "speed": Interval(1.0, 0.9, 1.2)},),
        "loss": tuple(
            {"loss": "InfoNCE", "n": n, "d": d, "tiled_s": 1.0, "tiled_mb": 2.0} | extra
            for d in (16, 32)
            for n, extra in ((256, {"plain_s": 3.0, "plain_mb": 9.0}), (512, {}))
        ),
    }[area]
    found = record(area=area)
    finding = Finding("", {}, (Table("", (), rows),))
    plot_record(Record(area, finding, False, 1.0, "", found.machine, {}), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
