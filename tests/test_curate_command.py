"""`diptych curate` as it is typed, on a small source of which some rows are bad."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from diptych.cli import main
from diptych.data.sources import open_source

BAD = {
    "text is not UTF-8": b'{"id": "not utf-8", "image": "s0.png", "caption": "caf\xe9 with a cat"}',
    "line is not a JSON object": b'{"id": "cut", "image": "s0.png", "capti',
    "no text": b'{"id": "empty", "image": "s0.png", "caption": "<br>"}',
    "an address or a file name": b'{"id": "name", "image": "s0.png", "caption": "cat_0042.jpg"}',
    "boilerplate": b'{"id": "phrase", "image": "s0.png", "caption": "click here for a cat"}',
    "no entry": b'{"id": "other", "image": "s0.png", "caption": "nothing of that kind"}',
    "no image": b'{"id": "lost", "image": "gone.png", "caption": "a cat that nobody has seen"}',
}
GOOD = 12


@pytest.fixture
def raw(tmp_path, drawings) -> Path:
    """Return a file with good and bad rows, beside its images and a word list."""
    lines = []
    for number, sample in enumerate(drawings(GOOD)):
        (tmp_path / f"{sample.key}.png").write_bytes(sample.image)
        row = {"id": sample.key, "image": f"{sample.key}.png", "caption": f"a cat , seen {number} times"}
        lines.append(json.dumps(row).encode())
    lines[6:6] = BAD.values()
    (tmp_path / "raw.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "words.txt").write_text("cat\ndog\n")
    return tmp_path / "raw.jsonl"


def curate(raw: Path, out: Path, *more: str) -> int:
    """Return the exit code."""
    settings = f"--match.words {raw.parent / 'words.txt'} --language.detector scripts --balance.no-on".split()
    with pytest.raises(SystemExit) as stop:
        main(["curate", str(raw), "--out", str(out), *(more or settings)])
    return int(stop.value.code or 0)


def test_every_row_is_counted_and_the_good_ones_are_written(raw, tmp_path, capsys):
    out = tmp_path / "out"
    assert curate(raw, out) == 0
    said = capsys.readouterr().err
    counts = {line[14:].strip(): int(line[:14]) for line in said.splitlines() if line[:14].strip().isdigit()}
    assert counts == {"kept": GOOD} | dict.fromkeys(BAD, 1)
    assert f"{GOOD} of {GOOD + len(BAD)} pairs are kept, as {GOOD} samples in 1 shards." in said
    assert f"diptych train {out / 'pairs'}" in said
    assert {path.name for path in out.iterdir()} == {
        "pairs",
        "reasons",
        "report.html",
        "report.md",
        "summary.json",
        "curation.json",
    }
    rows = pq.read_table(out / "reasons").to_pylist()
    found = {row["key"]: row["reason"] for row in rows}
    assert len(rows) == GOOD + len(BAD) and sum(reason is None for reason in found.values()) == GOOD
    named = {"empty": "no text", "name": "an address or a file name", "phrase": "boilerplate", "lost": "no image"}
    assert named.items() <= found.items()
    samples = list(open_source(str(out / "pairs")))
    assert [sample.texts[0].text for sample in samples] == [f"a cat , seen {number} times" for number in range(GOOD)]
    assert all(sample.image for sample in samples)


def test_the_report_has_the_counts_and_a_picture_of_each_kind(raw, tmp_path, capsys):
    curate(raw, tmp_path / "out")
    page, text = ((tmp_path / "out" / f"report.{ending}").read_text(encoding="utf-8") for ending in ("html", "md"))
    for reason in BAD:
        assert f"| {reason} | 1 |" in text.replace("\\", "") and reason in page
    assert f"| kept | {GOOD} |" in text and page.count("data:image/webp") >= 6
    assert "<script" not in page and "<br>" not in page


def test_the_same_words_again_and_the_written_settings_give_the_same(raw, tmp_path, capsys):
    curate(raw, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    curate(raw, tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert curate(raw, tmp_path / "again", "--config", str(tmp_path / "out" / "curation.json")) == 0
    assert (tmp_path / "again" / "summary.json").read_bytes() == (tmp_path / "out" / "summary.json").read_bytes()
    assert curate(raw, tmp_path / "out", "--rules.min-words", "3") == 2
    assert "other settings (config, " in capsys.readouterr().err


def test_the_help_names_every_step_in_its_order(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        main(["curate", "--help"])
    said = capsys.readouterr().out
    assert not stop.value.code and "with a reason for every pair that is left out" in said
    steps = "normalise unique language rules match balance text-duplicates image-duplicates score text-in-image decontaminate write"
    places = [said.index(f" {step} options ") for step in steps.split()]
    assert places == sorted(places)
    assert "--balance.threshold" in said and "Captions that each entry keeps in expectation." in said


def test_a_threshold_alone_and_a_list_that_matches_nothing(raw, tmp_path, capsys):
    words = ("--match.words", str(tmp_path / "words.txt"), "--language.detector", "scripts")
    assert curate(raw, tmp_path / "few", *words, "--balance.threshold", "8") == 0
    settings = json.loads((tmp_path / "few" / "curation.json").read_text())["config"]["balance"]
    assert (settings["threshold"], settings["tail_share"]) == (8.0, None)
    said = capsys.readouterr().err
    assert "entries over the threshold" in said and f"diptych train {tmp_path / 'few' / 'pairs'}" in said
    assert curate(raw, tmp_path / "both", *words, "--balance.threshold", "1", "--balance.tail-share", "0.1") == 2
    assert "Give one of threshold, tail_share and size" in capsys.readouterr().err
    (tmp_path / "words.txt").write_text("zebra\nokapi\n")
    assert curate(raw, tmp_path / "none", *words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "No text has an entry of the word list, which holds 2" in said and "match.words names another list" in said
    assert curate(raw, tmp_path / "nothing", *words, "--balance.threshold", "1") == 0
    said = capsys.readouterr().err
    assert "report.html says why" in said and "diptych train" not in said
