import re

import numpy as np
import torch
from PIL import Image

from diptych.evaluation.anomaly import measure_anomaly
from diptych.use.anomalies import Suspect, colour_range, render_anomalies


def suspect(name: str = "a.png", **more) -> Suspect:
    return Suspect(name, Image.new("RGB", (8, 6), "green"), np.linspace(0.4, 0.6, 48).reshape(6, 8), 0.5123, **more)


def measured():
    masks = [torch.zeros(6, 8, dtype=torch.bool) for _ in range(4)]
    masks[0][1:3], masks[1][2:4] = True, True
    maps = [mask + 0.01 * torch.arange(48.0).view(6, 8) for mask in masks]
    return measure_anomaly(torch.tensor([0.9, 0.3, 0.4, 0.1]), maps, masks)


def render(suspects, found=None, **more) -> str:
    return render_anomalies(suspects, title="Found", lead="Words.", measured=found or {}, **more)


def test_pictures_maps_scores_and_names_are_shown_and_escaped():
    html = render([suspect("<b>&.png", label="crack"), suspect("b.png")])
    assert html.count("data:image/webp") == 4 and "&lt;b&gt;&amp;.png" in html and "<b>" not in html
    assert "0.5123" in html and "crack" in html and "http" not in html.replace("http-equiv", "")


def test_masks_are_drawn_and_explained():
    mask = np.zeros((6, 8), dtype=bool)
    mask[2:4, 2:4] = True
    plain, marked = render([suspect()]), render([suspect(mask=mask)])
    assert "light blue line" in marked and "light blue line" not in plain
    assert re.findall(r"webp;base64,([^\"]+)", plain)[0] != re.findall(r"webp;base64,([^\"]+)", marked)[0]


def test_one_class_has_bars_and_several_a_row_each_with_means():
    one = render([suspect()], {"pear": measured()})
    assert "at chance" in one and "0.150" in one and "image_auroc" in one
    several = render([suspect()], {"pear": measured(), "<bell>": measured()}, notes=["One was left out."])
    assert "mean of 2" in several and "&lt;bell&gt;" in several and "One was left out." in several
    assert several.count("<strong>0.750</strong>") == 3  # image AUROC, twice and as a mean


def test_every_map_counts_alike_for_the_colours():
    small, large = np.full((2, 2), 0.2), np.full((100, 100), 0.8)
    low, high = colour_range([small, small, large])
    assert low == 0.2 and high == 0.8
    assert colour_range([]) == (0.0, 1.0)
    assert "0 pictures" not in render([])
