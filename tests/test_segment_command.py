"""`diptych segment`, on drawn pictures and a tiny model."""

import csv

import numpy as np
import pytest
from PIL import Image

from diptych import commands
from diptych.commands import segmenting
from diptych.data.scenes import SceneConfig, scenes
from diptych.errors import DataError
from diptych.methods.trident import Config

SETTINGS = Config(prompts="name", least_area=4)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (20, 30)), ("b.png", (41, 20))):
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(folder / name)
    (folder / "c.png").write_bytes(b"no picture")
    return folder


def test_one_picture(photos, saved_model, capsys):
    assert (
        commands.segment(str(photos / "a.png"), labels="red,a blue square", model=saved_model, settings=SETTINGS)
        is None
    )
    said = capsys.readouterr()
    key, shares = said.out.strip().split("  ")
    assert key == "a.png" and "values of the image tower" in said.err
    assert sum(float(part.split()[-1]) for part in shares.split(", ")) == pytest.approx(1, abs=0.002)


def test_a_folder_becomes_masks_pictures_and_a_page(photos, saved_model, tmp_path, capsys):
    out, html = tmp_path / "found", tmp_path / "found.html"
    commands.segment(
        str(photos),
        labels="red, a <blue> square",
        background="sky,wall",
        model=saved_model,
        settings=SETTINGS,
        out=out,
        html=html,
    )
    assert "sample 2" in capsys.readouterr().err
    with (out / "classes.csv").open() as file:
        classes = list(csv.DictReader(file))
    assert [row["class"] for row in classes] == ["background", "red", "a <blue> square"]
    assert classes[0]["colour"] == "#000000" and len({row["colour"] for row in classes}) == 3
    with (out / "pictures.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for row, size in zip(rows, ((20, 30), (41, 20)), strict=True):
        with Image.open(out / row["mask"]) as mask, Image.open(out / row["overlay"]) as overlay:
            assert mask.size == overlay.size == size and mask.mode == "P"
            shares = np.bincount(np.asarray(mask).ravel(), minlength=3) / (size[0] * size[1])
        assert [float(row[name["class"]]) for name in classes] == pytest.approx(shares.tolist(), abs=1e-4)
    page = html.read_text()
    assert page.count("data:image/webp") == 4 and "a &lt;blue&gt; square" in page and "<blue>" not in page
    assert "cannot be used" in page and "like colours" in page


def test_masks_are_measured(saved_model, tmp_path, capsys, monkeypatch):
    source = scenes("test", count=4, config=SceneConfig(size=48, nouns=4, things=(1, 2)))
    monkeypatch.setattr(segmenting, "open_source", lambda *rest, **more: source)
    found = commands.segment(
        "scenes:test", background="sky", model=saved_model, settings=SETTINGS, html=tmp_path / "a.html", count=3
    )
    assert found.images == 4 and set(found.headline()) == {"miou", "foreground_miou", "pixel_accuracy"}
    assert "background" in found.iou and set(found.iou) <= {"background", "cat", "dog", "horse", "cow"}
    assert f"miou               {found.miou}" in capsys.readouterr().err
    page = (tmp_path / "a.html").read_text()
    assert page.count("data:image/webp") == 9 and "at chance" in page


def test_nothing_that_can_be_read(tmp_path, saved_model):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="No picture of broken could be read"):
        commands.segment(str(tmp_path / "broken"), labels="a,b", model=saved_model)
    with pytest.raises(DataError, match="Name labels"):
        commands.segment(str(tmp_path / "broken"), model=saved_model)
