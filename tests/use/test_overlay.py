import numpy as np
from PIL import Image

from diptych.use.overlay import HEAT, MARK, class_colours, class_overlay, heat_colours, heat_overlay, outlined


def test_colours_go_from_first_to_last_and_stop_there():
    found = heat_colours(np.array([[-5.0, 0.0, 0.5, 1.0, 9.0]]), 0.0, 1.0)[0].tolist()
    assert found[0] == found[1] == list(HEAT[0]) and found[3] == found[4] == list(HEAT[-1])
    assert found[2] == [round((a + b) / 2) for a, b in zip(HEAT[2], HEAT[3], strict=True)]
    assert heat_colours(np.zeros((2, 3)), 0.0, 0.0).shape == (2, 3, 3)  # no range: nothing to divide by


def test_lightness_grows_with_the_number():
    colours = heat_colours(np.linspace(0, 1, 50)[None], 0.0, 1.0)[0] @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(colours) > 0).all()


def test_a_map_of_any_size_lies_over_the_picture():
    image = Image.new("RGB", (20, 10), (100, 100, 100))
    values = np.zeros((5, 10))
    values[:, 5:] = 1
    pixels = np.asarray(heat_overlay(image, values, 0.0, 1.0, strength=0.5))
    assert pixels.shape == (10, 20, 3)
    expected = np.array([[(100 + part) / 2 for part in colour] for colour in (HEAT[0], HEAT[-1])])
    assert (np.abs(pixels[5, [0, 19]] - expected) <= 1).all()


def test_the_line_runs_just_outside_the_mask():
    mask = np.zeros((6, 6), dtype=bool)
    mask[0:2, 2:4] = True
    marked = (np.asarray(outlined(Image.new("RGB", (6, 6)), mask)) == MARK).all(-1)
    expected = np.zeros((6, 6), dtype=bool)
    expected[0:3, 1:5] = True
    assert (marked == (expected & ~mask)).all()
    assert not np.asarray(outlined(Image.new("RGB", (6, 6)), np.zeros((6, 6), dtype=bool))).any()


def test_classes_have_colours_of_their_own():
    colours = class_colours(40)
    assert colours.shape == (40, 3) and class_colours(0).shape == (0, 3)
    assert (class_colours(12) == colours[:12]).all()  # more classes change none
    apart = np.abs(colours[:12, None].astype(int) - colours[None, :12]).sum(-1)
    assert apart[~np.eye(12, dtype=bool)].min() > 40


def test_classes_lie_over_the_picture_and_leave_out_what_is_none():
    image = Image.new("RGB", (3, 1), (100, 100, 100))
    found = class_overlay(image, np.array([[0, 1, -1]]), np.array([[200, 0, 0], [0, 50, 0]], np.uint8), strength=0.5)
    assert np.asarray(found).tolist() == [[[150, 50, 50], [50, 75, 50], [100, 100, 100]]]
