import numpy as np
from PIL import Image

from diptych.evaluation.segmentation import measure_segmentation
from diptych.use.overlay import class_colours
from diptych.use.segments import Segmented, painted, render_segments


def halves(width: int = 8) -> np.ndarray:
    labels = np.zeros((6, width), dtype=np.int64)
    labels[:, : width // 2] = 1
    return labels


def test_background_is_not_painted():
    image = Image.new("RGB", (8, 6), (10, 20, 30))
    pixels = np.asarray(painted(image, halves(), ("background", "cat")))
    assert (pixels[:, 4:] == (10, 20, 30)).all()
    expected = 0.4 * np.array([10, 20, 30]) + 0.6 * class_colours(1)[0]
    assert (np.abs(pixels[:, :4] - expected) <= 1).all()
    every = np.asarray(painted(image, halves(), ("dog", "cat")))
    assert (every[0, 0] != every[0, 7]).any() and (every[:, 4:] != (10, 20, 30)).any()


def test_a_page_with_numbers_legend_and_truth():
    image = Image.new("RGB", (8, 6))
    wide = Segmented("wide.png", Image.new("RGB", (900, 6)), halves(900), halves(900) - 1)
    found = measure_segmentation(np.array([[[20, 4, 0], [4, 20, 0], [0, 0, 0]]]), ("background", "cat", "<cow>"))
    page = render_segments(
        [Segmented("a.png", image, halves()), wide],
        ("background", "cat", "<cow>"),
        title="Two",
        lead="Found.",
        measured=found,
        settings=[("model", "m")],
        notes=["One was lost."],
    )
    assert page.count("data:image/webp") == 5 and page.count("<figcaption>true</figcaption>") == 1
    assert (
        "50 %" in page and "Neither shown nor said anywhere" in page and "&lt;cow&gt;" in page and "<cow>" not in page
    )
    assert f"{found.chance:.3f}" in page and "One was lost." in page
