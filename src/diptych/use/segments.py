"""Segmented pictures: the classes laid over them, with a legend."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from diptych.data.class_masks import UNKNOWN
from diptych.evaluation.segmentation import BACKGROUND, Segmentation
from diptych.use.overlay import class_colours, class_overlay
from diptych.use.page import facts, interval_table, page, thumbnail, words

SIDE = 320
"""Longest side of a picture on the page, pixels."""


@dataclass(frozen=True)
class Segmented:
    """One picture and the class of its pixels.

    Attributes:
        name: Of the picture.
        image: RGB.
        labels: One per pixel.
        truth: The same as it should be, negative where nobody knows; None where nothing is known.
    """

    name: str
    image: Image.Image
    labels: np.ndarray
    truth: np.ndarray | None = None


def colours_of(classes: Sequence[str]) -> UInt8[np.ndarray, "k 3"]:
    """Return the colour of each class; black for background in the first place."""
    if classes[0] != BACKGROUND:
        return class_colours(len(classes))
    return np.concatenate([np.zeros((1, 3), dtype=np.uint8), class_colours(len(classes) - 1)])


def reduced(picture: Segmented) -> Segmented:
    """Return a picture in the size that pages show; labels are the nearest of each place."""
    small = picture.image.copy()
    small.thumbnail((SIDE, SIDE))
    truth = None if picture.truth is None else _nearest(picture.truth, small)
    return Segmented(picture.name, small, _nearest(picture.labels, small), truth)


def painted(image: Image.Image, labels: Int64[np.ndarray, "h w"], classes: Sequence[str]) -> Image.Image:
    """Return a picture under the colours of its classes; background stays as it is."""
    first = int(classes[0] == BACKGROUND)
    return class_overlay(image, np.where(labels < first, UNKNOWN, labels), colours_of(classes))


def render_segments(
    pictures: Sequence[Segmented],
    classes: Sequence[str],
    *,
    title: str,
    lead: str,
    measured: Segmentation | None = None,
    settings: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> str:
    """Return a page: numbers if there are any, then a card for each picture.

    Args:
        pictures: In the order they are shown; `reduced` ones take less memory.
        classes: Names by number; `background` in the first place is not painted.
        title: One line.
        lead: A sentence or two.
        measured: Against known masks.
        settings: Names and values.
        notes: Sentences.
    """
    body = [f"<h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p>"]
    if measured is not None:
        chances = {"miou": measured.chance}
        rows = [(name, value, chances.get(name)) for name, value in measured.headline().items()]
        body.append(f"{interval_table(rows)}<h2>Classes</h2>")
        body.append(interval_table((name, value, None) for name, value in measured.iou.items() if value is not None))
        if missing := [name for name, value in measured.iou.items() if value is None]:
            body.append(f'<p class="soft">Neither shown nor said anywhere: {words(", ".join(missing))}.</p>')
    body.append(f'<h2>Pictures</h2><div class="gallery">{"".join(_card(one, classes) for one in pictures)}</div>')
    if notes:
        body.append(f"<h2>Notes</h2><ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>")
    if settings:
        body.append(f"<h2>Settings</h2>{facts(settings)}")
    return page(title, "".join(body))


def _card(picture: Segmented, classes: Sequence[str]) -> str:
    one = reduced(picture)
    shown = [(one.image, one.name), (painted(one.image, one.labels, classes), f"classes of {one.name}")]
    if one.truth is not None:
        shown.append((painted(one.image, one.truth, classes), f"true classes of {one.name}"))
    figures = "".join(
        f"<figure>{thumbnail(image, text, side=SIDE)}<figcaption>{title}</figcaption></figure>"
        for (image, text), title in zip(shown, ("", "found", "true"), strict=False)
    )
    return (
        f'<div class="card"><div class="strip" style="grid-template-columns:repeat({len(shown)}, 1fr)">{figures}</div>'
        f"{_legend(one.labels, classes)}<br><small>{words(one.name)}</small></div>"
    )


def _legend(labels: np.ndarray, classes: Sequence[str]) -> str:
    """Return the classes of a picture with their colours and shares, the largest first."""
    colours = colours_of(classes)
    share = np.bincount(labels.ravel(), minlength=len(classes)) / labels.size
    parts = []
    for number in np.argsort(-share, kind="stable").tolist():
        if not share[number]:
            break
        black = classes[number] == BACKGROUND and number == 0
        colour = "var(--line)" if black else "rgb({},{},{})".format(*colours[number].tolist())
        said = f"{100 * share[number]:.0f}" if share[number] >= 0.005 else "&lt;1"
        parts.append(
            f'<span style="white-space:nowrap"><span style="color:{colour}">■</span> {words(classes[number])} '
            f"<small>{said} %</small></span>"
        )
    return " ".join(parts)


def _nearest(labels: np.ndarray, image: Image.Image) -> np.ndarray:
    """Return labels in the size of a smaller picture, the nearest of each place."""
    rows, columns = (
        ((np.arange(small) + 0.5) * large / small).astype(np.int64)
        for small, large in ((image.height, labels.shape[0]), (image.width, labels.shape[1]))
    )
    return np.asarray(labels[rows][:, columns])
