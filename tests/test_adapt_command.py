"""`diptych adapt`, on drawings and a tiny model."""

import csv
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from diptych import commands
from diptych.cli import main
from diptych.data.sources import Columns
from diptych.errors import ConfigError
from diptych.methods import anovl, ip_clip
from diptych.models.weights import load
from tiny_run import write_photos

SMALL = ip_clip.Config(
    authorised="day", hidden=4, image_tokens=1, domain_repeats=1, batch_size=4, epochs=2, precision="fp32"
)


@pytest.fixture
def table(tmp_path, drawings) -> str:
    """Return a table of drawings of two classes by day, and of their negatives by night."""
    folder = write_photos(tmp_path / "photos", drawings(24))
    rows = []
    for place, path in enumerate(sorted(folder.glob("*.png"))):
        night = path.with_name(f"night-{path.name}")
        ImageOps.invert(Image.open(path).convert("RGB")).save(night)
        label = ("circle", "square")[place % 2]
        rows += [(path.name, label, "day"), (night.name, label, "night")]
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "label", "domain"), *rows])
    return str(folder / "list.csv")


COLUMNS = Columns(image="image", label="label", domain="domain", texts=())


def test_what_was_learnt_is_saved_and_measured(table, saved_model, tmp_path, capsys):
    report = commands.adapt(table, settings=SMALL, model=saved_model, out=tmp_path / "fence", columns=COLUMNS)
    assert {"zero-shot", "learnt", "learnt minus zero-shot", "learnt, day", "learnt, night"} <= set(report.metrics)
    said = capsys.readouterr().err
    assert "Learning from 38 samples" in said and "10 samples that were not learnt on" in said
    found = ip_clip.read_predictor(tmp_path / "fence", load(saved_model))
    assert found.classes == ("circle", "square") and found.projector.config == SMALL


def test_what_cannot_be_read_is_left_out_as_evaluate_leaves_it_out(table, saved_model, tmp_path, capsys):
    for name in ("s2.png", "night-s3.png"):
        Path(table).with_name(name).write_bytes(b"no image")
    where = {"model": saved_model, "columns": COLUMNS}
    with pytest.warns(UserWarning, match="1 images could not be read and were left out"):
        report = commands.adapt(table, settings=SMALL, out=tmp_path / "fence", evaluate_on=table, **where)
    said = capsys.readouterr().err
    assert "46 samples that were not learnt on" in said and "  2 images could not be read" in said
    evaluated = commands.evaluate(table, tasks=("zeroshot",), precision="fp32", **where)
    assert report.metrics["zero-shot"].value == evaluated.zeroshot.top1.value
    assert report.notes == evaluated.notes


def test_from_the_command_line_with_the_settings_of_the_method(table, saved_model, tmp_path, capsys):
    flags = ["--authorised", "day", "--hidden", "4", "--batch-size", "4", "--epochs", "1", "--precision", "fp32"]
    where = ["--model", saved_model, "--out", str(tmp_path / "fence"), "--evaluate-on", table]
    columns = [word for name in ("image", "label", "domain") for word in (f"--columns.{name}", name)]
    with pytest.raises(SystemExit) as stop:
        main(["adapt", table, *flags, *where, *columns])
    assert stop.value.code == 0
    assert "learnt minus zero-shot, night" in capsys.readouterr().err
    assert ip_clip.read_predictor(tmp_path / "fence", load(saved_model)).projector.config.authorised == "day"


def test_adapters_that_keep_nothing_are_refused(table, saved_model, tmp_path):
    with pytest.raises(ConfigError, match="What anovl makes is no classifier"):
        commands.adapt(
            table, settings=anovl.Config(), method="anovl", model=saved_model, out=tmp_path / "a", columns=COLUMNS
        )
    assert not (tmp_path / "a").exists()
