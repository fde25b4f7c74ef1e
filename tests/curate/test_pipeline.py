import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diptych.config import to_json
from diptych.curate.decontaminate import DecontaminationConfig
from diptych.curate.duplicates import SIMILAR_IMAGE, SIMILAR_TEXT, ImageDuplicatesConfig, TextDuplicatesConfig
from diptych.curate.engine import LocalEngine, RayEngine
from diptych.curate.entries import BalanceConfig, MatchConfig
from diptych.curate.language import LanguageConfig
from diptych.curate.pipeline import CurateConfig, curate_source
from diptych.curate.shards import WriteConfig
from diptych.curate.summary import markdown
from diptych.data.sources import open_source
from diptych.errors import ConfigError, DataError
from diptych.use.curation import curation_page


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("cat\ndog\nbird\nfish\nred car\nnever\n")
    return path


@pytest.fixture
def config(words):
    return CurateConfig(
        match=MatchConfig(words=(str(words),)),
        language=LanguageConfig(detector="scripts"),
        balance=BalanceConfig(tail_share=None, threshold=20.0),
        part_bytes=4000,
    )


def captions(count: int) -> list[str]:
    """Return captions in which cats are frequent, birds are rare, and a seventh has no entry."""
    kinds = {1: "nothing to see", 2: "a red car", 3: "one dog and one cat"}
    return [f"{kinds.get(i % 7, 'the cat sat') if i % 50 else 'a bird on a wire'} , number {i}" for i in range(count)]


def jsonl(path: Path, texts: list[str], **more: object) -> Path:
    lines = (json.dumps({"id": f"p{i}", "caption": text, "width": i, **more}) for i, text in enumerate(texts))
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def reasons_of(out: Path) -> dict[str, str | None]:
    table = pa.concat_tables([pq.read_table(path) for path in sorted((out / "reasons").iterdir())])
    return dict(zip(table["key"].to_pylist(), table["reason"].to_pylist(), strict=True))


def counts(summary) -> dict[str, int]:
    return {one.reason: one.count for one in summary.reasons}


def test_every_pair_has_one_fate(tmp_path, config):
    source = jsonl(tmp_path / "raw.jsonl", captions(300))
    summary = curate_source(str(source), tmp_path / "out", config)
    reasons = reasons_of(tmp_path / "out")
    assert sorted(reasons) == sorted(f"p{i}" for i in range(300))
    assert summary.parts > 3 and summary.pairs == 300 and sum(counts(summary).values()) == 300
    kept = open_source(tmp_path / "out" / "pairs")
    assert sorted(sample.key for sample in kept) == sorted(key for key, reason in reasons.items() if reason is None)
    for sample in kept:
        assert sample.texts[0].text == captions(300)[int(sample.key[1:])]
    assert counts(summary)["no entry"] == sum("nothing" in text for text in captions(300))
    assert all(reasons[f"p{i}"] is None for i in range(0, 300, 50))
    table = pq.read_table(tmp_path / "out" / "pairs")
    assert table["width"].to_pylist() == [int(key[1:]) for key in table["id"].to_pylist()]
    assert not (tmp_path / "out" / "work").exists()


def test_balance_is_that_of_the_whole_pool(tmp_path, config):
    """Parts change nothing: counts add up, and draws follow from the key."""
    source = jsonl(tmp_path / "raw.jsonl", captions(400))
    results = []
    for name, size in (("one", 1 << 20), ("many", 1500)):
        summary = curate_source(str(source), tmp_path / name, replace(config, part_bytes=size))
        results.append((reasons_of(tmp_path / name), counts(summary), summary.head, summary.ranks, summary.reasons))
    assert results[0] == results[1]
    cat = next(entry for entry in results[0][2] if entry.entry == "cat")
    assert cat.before == sum("cat" in text for text in captions(400)) and 8 <= cat.after <= 40


@pytest.mark.parametrize("change", [{"threshold": 5.0}, {"threshold": None, "size": 60.0}, {"online": True}])
def test_how_much_is_kept(tmp_path, config, change):
    source = jsonl(tmp_path / "raw.jsonl", captions(400))
    balance = replace(config.balance, **change)
    summary = curate_source(str(source), tmp_path / "out", replace(config, balance=balance))
    table = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "out" / "reasons").iterdir())])
    expected = pc.sum(table["chance"]).as_py()
    if balance.online:
        assert summary.kept == 400 - counts(summary)["no entry"] > expected
    else:
        assert abs(summary.kept - expected) < 4 * 400**0.5 / 2
    if balance.size:
        assert expected == pytest.approx(60)
    assert pq.read_table(tmp_path / "out" / "pairs")["chance"].null_count == 0


@pytest.mark.slow
def test_several_processes_give_the_same_bytes(tmp_path, config):
    source = jsonl(tmp_path / "raw.jsonl", captions(300))
    curate_source(str(source), tmp_path / "one", config)
    curate_source(str(source), tmp_path / "two", config, engine=LocalEngine(2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_gives_the_same_bytes(tmp_path, config):
    pytest.importorskip("ray")
    source = jsonl(tmp_path / "raw.jsonl", captions(300))
    curate_source(str(source), tmp_path / "local", config)
    import ray

    try:
        curate_source(str(source), tmp_path / "ray", config, engine=RayEngine(workers=2))
    finally:
        ray.shutdown()
    assert contents(tmp_path / "local") == contents(tmp_path / "ray")


RUN = """
import json, os, signal, sys
from pathlib import Path
from diptych.config import from_json
from diptych.curate import pipeline
from diptych.curate.engine import AbstractEngine
source, out, settings, title, after = sys.argv[1:]
done = {"title": "", "count": 0}

def advance(name, total, more):
    if name == title:
        done["count"] += more
        if done["count"] >= int(after):
            os.kill(os.getpid(), signal.SIGKILL)

pipeline.curate_source(source, Path(out), from_json(pipeline.CurateConfig, json.loads(settings)), advance=advance)
"""


def run_until(source: Path, out: Path, config: CurateConfig, title: str, after: int) -> int:
    """Curate in a process of its own that kills itself when so many parts of a pass are done; return its exit code."""

    command = [sys.executable, "-c", RUN, str(source), str(out), json.dumps(to_json(config)), title, str(after)]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


@pytest.mark.slow
@pytest.mark.parametrize(
    ("title", "after"), [("pass 1 of 3", 2), ("pass 2 of 3", 3), ("pass 3 of 3", 1), ("writing shards", 1)]
)
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, config, title, after):
    source = jsonl(tmp_path / "raw.jsonl", captions(300))
    config = replace(config, write=WriteConfig(shard_rows=20))
    curate_source(str(source), tmp_path / "whole", config)
    assert run_until(source, tmp_path / "cut", config, title, after) == -signal.SIGKILL
    assert (tmp_path / "cut" / "work").exists() and not (tmp_path / "cut" / "summary.json").exists()
    done = contents(tmp_path / "cut" / "work")
    summary = curate_source(str(source), tmp_path / "cut", config)
    assert done and contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert summary.pairs == 300


@pytest.mark.slow
def test_a_run_killed_at_random_moments(tmp_path, config):
    source = jsonl(tmp_path / "raw.jsonl", captions(3000))
    curate_source(str(source), tmp_path / "whole", config)

    command = [sys.executable, "-c", RUN, str(source), str(tmp_path / "cut"), json.dumps(to_json(config)), "", "1"]
    codes = []
    for moment in (0.3, 0.9, 0.05):
        process = subprocess.Popen(command)
        while not (tmp_path / "cut" / "curation.json").exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(moment)
        process.kill()
        codes.append(process.wait())
    assert -signal.SIGKILL in codes
    curate_source(str(source), tmp_path / "cut", config)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_full_disk_loses_nothing(tmp_path, config, monkeypatch):
    source = jsonl(tmp_path / "raw.jsonl", captions(300))
    curate_source(str(source), tmp_path / "whole", config)
    write, left = pq.ParquetWriter.write_table, [9]

    def full(self, *args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28, "No space left on device")
        write(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        curate_source(str(source), tmp_path / "out", config)
    assert not list((tmp_path / "out").rglob(".????????.*"))
    monkeypatch.undo()
    curate_source(str(source), tmp_path / "out", config)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_run_answers_again_and_another_is_refused(tmp_path, config):
    source = jsonl(tmp_path / "raw.jsonl", captions(50))
    first = curate_source(str(source), tmp_path / "out", config)
    assert curate_source(str(source), tmp_path / "out", config) == first
    with pytest.raises(ConfigError, match=r"other settings \(config\)"):
        curate_source(str(source), tmp_path / "out", replace(config, balance=replace(config.balance, seed=1)))
    jsonl(source, captions(51))
    with pytest.raises(ConfigError, match=r"another source .*\(files\)"):
        curate_source(str(source), tmp_path / "out", config)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        curate_source(str(source), tmp_path / "full", config)
    with pytest.raises(DataError, match="nowhere"):
        curate_source("nowhere.jsonl", tmp_path / "none", config)


def test_balance_needs_matches():
    with pytest.raises(ConfigError, match=r"Set match\.on"):
        CurateConfig(match=MatchConfig(on=False))


def test_tar_shards_can_be_trained_on(tmp_path, config, drawings):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for sample in drawings(9):
        (folder / f"{sample.key}.png").write_bytes(sample.image)
        (folder / f"{sample.key}.txt").write_text(f"{sample.texts[0].text}\nthe cat of {sample.key}")
    plain = replace(config, match=MatchConfig(on=False), balance=BalanceConfig(on=False))
    for form in ("parquet", "tar"):
        config = replace(plain, write=WriteConfig(format=form, shard_rows=4))
        summary = curate_source(str(folder), tmp_path / form, config)
        assert len(summary.shards) == 3 and summary.samples == 9 and summary.kept == 18
        read = {sample.key: sample for sample in open_source(tmp_path / form / "pairs")}
        for sample in drawings(9):
            assert read[sample.key].image == sample.image
            assert [text.text for text in read[sample.key].texts] == [sample.texts[0].text, f"the cat of {sample.key}"]
    with tarfile.open(tmp_path / "tar" / "pairs" / "00000-000.tar") as archive:
        assert {(member.mtime, member.uid, member.uname) for member in archive} == {(0, 0, "")}


def test_a_missing_image_is_a_reason(tmp_path, config, drawings):
    (tmp_path / "0.png").write_bytes(drawings(1)[0].image)
    rows = ["image,caption", "0.png,a cat here", "1.png,a cat gone", ",a cat without a name", "0.png,another cat"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    summary = curate_source(str(tmp_path / "list.csv"), tmp_path / "out", config)
    assert counts(summary) == {"kept": 2, "no image": 2}
    assert [sample.image for sample in open_source(tmp_path / "out" / "pairs")] == [drawings(1)[0].image] * 2
    assert [example.picture is None for example in summary.reasons[0].examples] == [False, False]


def test_the_report(tmp_path, config):
    source = jsonl(tmp_path / "raw.jsonl", [*captions(200), "a | cat <b>&", "猫 neko ねこ"])
    summary = curate_source(str(source), tmp_path / "out", config)
    text, html = markdown(summary), curation_page(summary)
    assert f"| kept | {summary.kept:,} |" in text and "entries over the threshold" in text
    assert "| ja | 1 |" in text and "CLD2 tells them: pip install" in text
    for shown in ("Most frequent entries", "the cat sat , number", "<svg", "entries over the threshold"):
        assert shown in html
    assert "<b>" not in html and "<script" not in html


def photo(seed: int, form: str = "PNG", size: int = 64) -> bytes:
    """Return a picture with soft spots of colour, the same for a seed whatever its form."""
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8))
    small.resize((size, size), Image.Resampling.BICUBIC).save(file := io.BytesIO(), form)
    return file.getvalue()


def test_steps_that_look_at_images_and_at_all_rows(tmp_path, config):
    """Planted: a picture saved again, one of an evaluation set, a caption that returns with another number, and one that cannot be decoded."""
    folder, evaluation = tmp_path / "raw", tmp_path / "evaluation"
    folder.mkdir()
    evaluation.mkdir()
    for i in range(8):
        one, other = (
            "cat " + " ".join(f"{word}{i}{place}" for word in ("sun", "lake", "wall", "ship")) for place in (0, 1)
        )
        (folder / f"{i}.png").write_bytes(photo(i))
        (folder / f"{i}.txt").write_text(f"{one}\n{other}")
    (folder / "8.jpg").write_bytes(photo(3, "JPEG", 80))
    (folder / "8.txt").write_text("a caption that nobody else has , and a cat")
    (folder / "9.png").write_bytes(photo(9))
    (folder / "9.txt").write_text((folder / "5.txt").read_text().splitlines()[0] + " .")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "broken.txt").write_text("a cat in the dark of night")
    (evaluation / "x.jpg").write_bytes(photo(6, "JPEG", 80))
    (evaluation / "x.txt").write_text("what is tested")
    config = replace(
        config,
        balance=BalanceConfig(on=False),
        text_duplicates=TextDuplicatesConfig(on=True),
        image_duplicates=ImageDuplicatesConfig(on=True),
        decontaminate=DecontaminationConfig(on=True, sources=(str(evaluation),)),
    )
    summary = curate_source(str(folder), tmp_path / "out", config)
    reasons = reasons_of(tmp_path / "out")
    assert sum(reason is not None for key, reason in reasons.items() if key[0] in "01247") == 0
    near_text = {key for key, reason in reasons.items() if reason == SIMILAR_TEXT}
    assert near_text in ({"5"}, {"9"})
    near_image = {key for key, reason in reasons.items() if reason == SIMILAR_IMAGE}
    assert near_image in ({"3", "3#2"}, {"8"})
    assert {key for key, reason in reasons.items() if reason and "evaluation" in reason} == {"6", "6#2"}
    assert reasons["broken"] == "image cannot be read"
    assert summary.pairs == 19 and summary.kept == 19 - 1 - len(near_image) - 2 - 1
    assert curate_source(str(folder), tmp_path / "again", config).reasons == summary.reasons
    assert "duplicate of" in curation_page(summary)
