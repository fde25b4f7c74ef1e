"""Anomaly maps as pictures, the most abnormal first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

import numpy as np
from PIL import Image

from diptych.evaluation.anomaly import Anomaly
from diptych.types import Interval
from diptych.use.overlay import heat_colours, heat_overlay, outlined
from diptych.use.page import facts, interval_table, page, thumbnail, words


@dataclass(frozen=True)
class Suspect:
    """One picture and what was said of it.

    Attributes:
        name: Of the picture.
        image: RGB.
        map: Higher is more abnormal.
        score: Of the whole picture, alike.
        mask: True where it is abnormal, of the picture's size; None when nobody knows.
        label: What is known of it, such as the name of its fault.
    """

    name: str
    image: Image.Image
    map: np.ndarray
    score: float
    mask: np.ndarray | None = None
    label: str | None = None


def render_anomalies(
    suspects: Sequence[Suspect],
    *,
    title: str,
    lead: str,
    measured: Mapping[str, Anomaly],
    settings: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> str:
    """Return a page: numbers if there are any, then a card for each picture. All maps share one scale of colours.

    Args:
        suspects: In the order they are shown.
        title: One line.
        lead: A sentence or two.
        measured: Numbers of each class, by its name; empty where no mask is known.
        settings: Names and values.
        notes: Sentences.
    """
    low, high = colour_range([suspect.map for suspect in suspects])
    body = [f"<h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p>"]
    if len(measured) == 1:
        (one,) = measured.values()
        body.append(interval_table((name, value, one.chance(name)) for name, value in one.headline().items()))
    elif measured:
        body.append(_class_table({name: one.headline() for name, one in measured.items()}))
    body.append(f"<h2>Most abnormal first</h2>{_legend(low, high, any(s.mask is not None for s in suspects))}")
    body.append(f'<div class="gallery">{"".join(_card(suspect, low, high) for suspect in suspects)}</div>')
    if notes:
        body.append(f"<h2>Notes</h2><ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>")
    body.append(f"<h2>Settings</h2>{facts(settings)}")
    return page(title, "".join(body))


def _class_table(classes: Mapping[str, Mapping[str, Interval]]) -> str:
    """Return a row for each class, and their means."""
    names = list(dict.fromkeys(name for numbers in classes.values() for name in numbers))
    rows = [
        f"<tr><td>{words(kind)}</td>{''.join(_cell(numbers.get(name)) for name in names)}</tr>"
        for kind, numbers in classes.items()
    ]
    means = [fmean(numbers[name].value for numbers in classes.values() if name in numbers) for name in names]
    last = "".join(f'<td class="number"><strong>{mean:.3f}</strong></td>' for mean in means)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}<tr><td>mean of {len(rows)}</td>{last}</tr></table>"


def _cell(value: Interval | None) -> str:
    said = (
        ""
        if value is None
        else f"<strong>{value.value:.3f}</strong> <small>{value.low:.2f} to {value.high:.2f}</small>"
    )
    return f'<td class="number">{said}</td>'


def colour_range(maps: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the numbers that get the first and the last colour: half of all places are below, one in 500 is above.

    So what is usual stays dark, and one extreme place does not darken the rest.
    """
    if not maps:
        return 0.0, 1.0
    # Every map counts alike, however large: its own percentiles stand for it.
    several = np.concatenate([np.percentile(values, np.linspace(0, 100, 1001)) for values in maps])
    low, high = np.percentile(several, [50, 99.8])
    return float(low), float(high)


def _legend(low: float, high: float, marked: bool) -> str:
    colours = heat_colours(np.linspace(low, high, 12)[None], low, high)[0]
    stops = ", ".join(f"rgb({r},{g},{b})" for r, g, b in colours.tolist())
    line = " A light blue line is drawn around what is known to be abnormal." if marked else ""
    return (
        f'<p class="soft"><span style="display:inline-block;width:9rem;height:.8rem;border-radius:4px;vertical-align:middle;'
        f'background:linear-gradient(to right, {stops})"></span> from {low:.3f} (half of all places are below) to {high:.3f}, '
        f"the same for all.{line}</p>"
    )


def _card(suspect: Suspect, low: float, high: float) -> str:
    picture = suspect.image if suspect.mask is None else outlined(suspect.image, suspect.mask)
    heat = heat_overlay(suspect.image, suspect.map, low, high)
    label = "" if suspect.label is None else f' <span class="tag">{escape(suspect.label)}</span>'
    shown = "".join(
        f"<figure>{thumbnail(image, text, side=320)}</figure>"
        for image, text in ((picture, suspect.name), (heat, f"map of {suspect.name}"))
    )
    return (
        f'<div class="card"><div class="strip" style="grid-template-columns:1fr 1fr">{shown}</div>'
        f"<strong>{suspect.score:.4f}</strong>{label}<br><small>{words(suspect.name)}</small></div>"
    )
