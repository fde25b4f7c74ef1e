import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diptych.claims.plot import COLOURS, plot_results
from diptych.errors import MissingExtraError


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_every_arm_is_drawn_in_its_colour(result, tmp_path):
    pytest.importorskip("matplotlib")
    plot_results([result], tmp_path / "new" / "fake.png")
    seen = pixels(tmp_path / "new" / "fake.png")
    for colour in COLOURS.values():
        wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        assert (abs(seen.astype(int) - wanted).max(-1) <= 2).sum() > 100, colour
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["fake.png"]


def test_a_row_per_claim(result, tmp_path):
    pytest.importorskip("matplotlib")
    worse = replace(result, name="photos", higher_is_better=False, verdict="not reproduced")
    plot_results([result], tmp_path / "one.png")
    plot_results([result, worse], tmp_path / "two.png")
    one, two = pixels(tmp_path / "one.png"), pixels(tmp_path / "two.png")
    assert two.shape[1] == one.shape[1] and two.shape[0] == 2 * one.shape[0]


def test_without_matplotlib_the_error_names_the_extra(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'diptych\[plot\]'"):
        plot_results([result], tmp_path / "fake.png")
    assert list(tmp_path.iterdir()) == []
