"""`diptych anomaly`, on drawn pictures and a tiny model."""

import csv

import numpy as np
import pytest
from PIL import Image

from diptych import commands
from diptych.commands import inspecting
from diptych.data.planted import planted_defects
from diptych.errors import DataError
from diptych.methods.anovl import Config


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (20, 30)), ("b.png", (24, 24)), ("c.png", (41, 20))):
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(folder / name)
    (folder / "d.png").write_bytes(b"no picture")
    return folder


def test_pictures_without_masks_are_scored_and_shown(photos, saved_model, tmp_path, capsys):
    out, html = tmp_path / "found", tmp_path / "found.html"
    settings = Config(product="bottle", steps=1)
    assert commands.anomaly(str(photos), model=saved_model, detector=settings, out=out, html=html) == {}
    said = capsys.readouterr()
    scores = [float(line.split()[0]) for line in said.out.splitlines()]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    assert "local ones of the image tower" in said.err and "sample 3" in said.err
    with (out / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == [line.split()[1] for line in said.out.splitlines()]
    sizes = set()
    for row in rows:
        with Image.open(out / row["map"]) as picture:
            sizes.add(picture.size)
    assert sizes == {(16, 24), (16, 16), (32, 16)}
    page = html.read_text()
    assert page.count("data:image/webp") == 6 and "bottle" in page and "cannot be used" in page


def test_masks_are_measured_class_by_class(saved_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inspecting, "open_source", lambda *rest, **more: planted_defects(count=48, size=16))
    found = commands.anomaly(
        "planted-defects", model=saved_model, detector=Config(steps=0), html=tmp_path / "a.html", count=5
    )
    assert set(found) == {sample.domain for sample in planted_defects(count=12)}
    assert all(set(one.headline()) == {"image_auroc", "image_ap", "pixel_auroc", "aupro"} for one in found.values())
    assert "mean of 12 classes" in capsys.readouterr().err
    page = (tmp_path / "a.html").read_text()
    assert page.count("data:image/webp") == 10 and "mean of 12" in page


def test_a_folder_without_pictures(tmp_path, saved_model):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="No picture of broken could be read"):
        commands.anomaly(str(tmp_path / "broken"), model=saved_model)
