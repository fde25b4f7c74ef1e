import json
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diptych.curate.language_model import LanguageModelConfig
from diptych.curate.rewrite import (
    RewriteConfig,
    Rewriter,
    align_lines,
    prompts_for,
    read_journal,
    rewrite_source,
    row_captions,
)
from diptych.curate.wording import QualityConfig
from diptych.curate.writers import AbstractWriter
from diptych.data.sources import open_source
from diptych.data.texts import choose_text
from diptych.errors import ColumnError, ConfigError, DataError
from diptych.types import Text


class Scripted(AbstractWriter):
    """Writes what its script says, and may be stopped."""

    styles = ("plain", "loud")
    name = "scripted"

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after, self.calls = stop_after, []

    def write(self, captions: Sequence[str], style: str, *, seed: int) -> list[str]:
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((tuple(captions), style, seed))
        return [f"behold {caption} {seed}" if style == "plain" else caption.upper() for caption in captions]


TABLE = pa.table({"image": [f"{i}.jpg" for i in range(5)], "caption": [f"a dog and ball {i}" for i in range(5)]})
CONFIG = RewriteConfig(styles=("plain", "loud"), batch_size=2)


def test_rewrites_are_kept_or_dropped_with_a_verdict():
    found = Rewriter(Scripted(), CONFIG).curate(TABLE).to_pylist()
    assert [row["rewrite"] for row in found] == [[f"behold a dog and ball {i} {1000 * (i // 2)}"] for i in range(5)]
    assert found[3]["verdict"] == "plain: kept. loud: copy of the caption ('A DOG AND BALL 3')"
    assert {row["reason"] for row in found} == {None}  # the row itself stays
    assert [row["caption"] for row in found] == TABLE["caption"].to_pylist()


def test_rows_with_several_captions_or_none():
    table = pa.table({"captions": [["a dog runs", "a brown dog"], ["a cat sleeps"], [], None, ["  ", "a cow"]]})
    rewriter = Rewriter(Scripted(), RewriteConfig(styles=("plain",), captions=None))
    found = rewriter.curate(table).to_pylist()
    assert [len(row["rewrite"]) for row in found] == [2, 1, 0, 0, 1]
    assert [row["verdict"] for row in found] == [
        "plain: kept. plain: kept",
        "plain: kept",
        None,
        None,
        "plain: kept",
    ]
    assert [row["reason"] for row in found] == [None, None, "no text", "no text", None]
    once = Rewriter(Scripted(), RewriteConfig(styles=("plain",))).curate(table).to_pylist()
    assert [len(row["rewrite"]) for row in once] == [1, 1, 0, 0, 1]


def test_a_rewrite_that_is_there_already_is_a_duplicate():
    first = Rewriter(Scripted(), CONFIG).curate(TABLE)
    again = Rewriter(Scripted(), CONFIG).curate(first)
    assert again["rewrite"] == first["rewrite"]
    assert again["verdict"][0].as_py().startswith("plain: duplicate")


def test_rows_with_a_reason_are_not_rewritten():
    writer = Scripted()
    earlier = pa.array([None, "too short", None, None, "too short"])
    found = Rewriter(writer, CONFIG).curate(TABLE.append_column("reason", earlier)).to_pylist()
    assert [row["reason"] for row in found] == earlier.to_pylist()
    assert [len(row["rewrite"]) for row in found] == [1, 0, 1, 1, 0]
    assert [row["verdict"] is None for row in found] == [False, True, False, False, True]
    assert not any(f"ball {i}" in text for texts, _, _ in writer.calls for text in texts for i in (1, 4))


@pytest.mark.parametrize("stop", range(7))
def test_a_stopped_run_goes_on_to_the_same_result(tmp_path, stop):
    journal = tmp_path / "rewrites.part"
    whole = Rewriter(Scripted(), CONFIG).curate(TABLE)
    if stop < 6:
        with pytest.raises(KeyboardInterrupt):
            Rewriter(Scripted(stop), CONFIG, journal=journal).curate(TABLE)
    second = Scripted()
    assert Rewriter(second, CONFIG, journal=journal).curate(TABLE) == whole
    assert len(second.calls) == 6 - stop if stop < 6 else 6


def test_a_line_that_was_cut_is_written_again(tmp_path):
    journal = tmp_path / "rewrites.part"
    with pytest.raises(KeyboardInterrupt):
        Rewriter(Scripted(3), CONFIG, journal=journal).curate(TABLE)
    journal.write_bytes(journal.read_bytes()[:-4])
    again = Scripted()
    assert Rewriter(again, CONFIG, journal=journal).curate(TABLE) == Rewriter(Scripted(), CONFIG).curate(TABLE)
    assert len(again.calls) == 4
    assert len(read_journal(journal, json.loads(journal.read_text().splitlines()[0]))) == 6


@pytest.mark.parametrize("left", [b"", b'"half', b'{"not'])
def test_a_journal_that_holds_nothing_whole_is_begun_anew(tmp_path, left):
    journal = tmp_path / "rewrites.part"
    journal.write_bytes(left)
    assert read_journal(journal, "me") == [] and journal.read_text() == '"me"\n'


def test_a_journal_of_other_settings_is_refused(tmp_path):
    journal = tmp_path / "rewrites.part"
    with pytest.raises(KeyboardInterrupt):
        Rewriter(Scripted(2), CONFIG, journal=journal).curate(TABLE)
    kept = journal.read_bytes()
    for other, table in ((RewriteConfig(styles=("loud",)), TABLE), (CONFIG, TABLE[:4])):
        with pytest.raises(ConfigError, match="another table, model or settings"):
            Rewriter(Scripted(), other, journal=journal).curate(table)
    assert journal.read_bytes() == kept


def test_progress_counts_rewrites(tmp_path):
    steps: list[int] = []
    Rewriter(Scripted(), CONFIG, advance=steps.append).curate(TABLE)
    assert steps == [0, 2, 2, 1, 2, 2, 1]


def test_columns_that_hold_no_captions(tmp_path):
    with pytest.raises(ColumnError, match=r"No column holds captions.*image"):
        row_captions(TABLE.select(["image"]))
    with pytest.raises(ColumnError, match="capshun"):
        row_captions(TABLE, "capshun")
    with pytest.raises(ConfigError, match="no style"):
        Rewriter(Scripted(), RewriteConfig(styles=("odd",)))
    with pytest.raises(ConfigError, match="batch_size"):
        RewriteConfig(batch_size=0)


def test_examples_may_be_the_captions_of_the_table():
    table = pa.table({"captions": [[f"a dog {i}", f"dog number {i}"] for i in range(4)]})
    shots = prompts_for(RewriteConfig(styles=("captions", "short")), table)
    assert shots["captions"].drawn and len(shots["captions"].examples) == 4 and not shots["short"].drawn
    with pytest.raises(ConfigError, match="only 0 have them"):
        prompts_for(RewriteConfig(styles=("captions",)), TABLE)
    with pytest.raises(ConfigError, match="reworded"):
        prompts_for(RewriteConfig(styles=("rewordet",)), TABLE)


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_folder_of_photos_becomes_a_table_to_train_on(tmp_path, drawings, ending):
    (tmp_path / "photos").mkdir()
    for sample in drawings(6):
        (tmp_path / "photos" / f"{sample.key}.png").write_bytes(sample.image)
        (tmp_path / "photos" / f"{sample.key}.txt").write_text(sample.texts[0].text)
    out = tmp_path / "made" / f"rewritten.{ending}"
    config = RewriteConfig(styles=("framed", "both"), quality=QualityConfig(max_new_nouns=3))
    rewrite_source(open_source(tmp_path / "photos"), out, config=config, model=None)
    assert not out.with_name(f"{out.name}.part").exists()
    again = open_source(out)
    for sample in again:
        roles = [text.role for text in sample.texts]
        assert roles[0] == "caption" and roles[1:].count("rewrite") == len(roles) - 1 >= 1
        assert sample.image


def test_a_parquet_file_may_be_written_over_and_keeps_its_images(tmp_path, drawings):
    path, samples = tmp_path / "a.parquet", drawings(6).samples
    images = [{"bytes": sample.image, "path": None} for sample in samples[1:]]
    captions = [sample.texts[0].text for sample in samples]
    pq.write_table(pa.table({"image": [None, *images], "caption": captions}), path, row_group_size=2)
    config = RewriteConfig(styles=("framed",), quality=QualityConfig(max_new_nouns=3))
    rewrite_source(open_source(path), path, config=config, model=None)
    assert pq.read_table(path)["image"].to_pylist() == [None, *images]
    again = open_source(path)
    assert [sample.image for sample in again] == [None, *(sample.image for sample in samples[1:])]
    assert {text.role for text in again.texts(1)} == {"caption", "rewrite"}


def test_a_source_without_a_table_and_a_limit(tmp_path, drawings):
    config = RewriteConfig(styles=("framed",), quality=QualityConfig(max_new_nouns=3))
    found = rewrite_source(drawings(6), tmp_path / "r.parquet", config=config, model=None, limit=2)
    assert found.num_rows == 2 and found["key"].to_pylist() == ["s0", "s1"]
    with pytest.raises(ConfigError, match="must end in"):
        rewrite_source(drawings(6), tmp_path / "r.csv", config=config, model=None)


def test_a_failed_run_leaves_no_output_and_keeps_its_journal(tmp_path, drawings):
    gone = LanguageModelConfig("http://127.0.0.1:9/v1", served="tiny", timeout=2.0)
    with pytest.raises(Exception, match="cannot be reached"):
        rewrite_source(drawings(2), tmp_path / "r.parquet", model=gone)
    assert [path.name for path in tmp_path.iterdir()] == ["r.parquet.part"]


@pytest.fixture
def official(data: Path) -> dict:
    folder = data.parent / "golden"
    if not folder.is_dir():
        pytest.skip("there are no official numbers beside DIPTYCH_DATA")
    return json.loads((folder / "laclip.json").read_text())


@pytest.mark.data
def test_official_lists_and_picks(official):
    cases = {name: case for name, case in official.items() if name.startswith("picks_")}
    assert cases
    for name, case in cases.items():
        rows = ([["title", "caption"]] if case["header"] else []) + case["rows"]
        if "error" in case:
            with pytest.raises(DataError, match=r"\d+ rows .* lines"):
                align_lines([tuple(row) for row in rows], case["rewrites"])
            continue
        lists = align_lines([tuple(row) for row in rows], case["rewrites"])
        assert len(lists) == case["length"] and lists[: case["num_samples"]] == case["caption_lists"], name
        rng, picked = random.Random(case["seed"]), []
        for item in case["order"]:
            texts = [Text(text) for text in lists[item]]
            place = rng.choice(range(len(texts)))
            picked.append(choose_text(texts, place, min_words=2, count_spaces=True).text)
        assert picked == case["picked"], name


def test_lines_must_be_as_many_as_images():
    rows = [("a.jpg", "one dog"), ("b.jpg", "two dogs"), ("c.gif", "no"), ("d.JPG", "no")]
    assert align_lines(rows, [["x", "y"]]) == [["one dog", "x"], ["two dogs", "y"]]
    for lines in ([["x"], ["x", "y"]], [["x", "y", "z"]], [[]], []):
        with pytest.raises(DataError, match="2 rows"):
            align_lines(rows, lines)
