"""The parts of a self-contained HTML page: shell, style, thumbnails, tables, line charts. No scripts, no outside files."""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from diptych.types import Interval

STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --soft: #5c667a; --paper: #fbfaf7; --card: #ffffff; --line: #e3e1da;
  --left: #b4532a; --right: #2f6b8f; --good: #2e7d4f; --bad: #b3392f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e6e1; --soft: #a3a9b5; --paper: #15181d; --card: #1e2229;
  --line: #343a44; --left: #e08a5f; --right: #79b4d6; --good: #6cc08b; --bad: #e57f76; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; }
p.lead { color: var(--soft); margin: 0 0 1.4rem; max-width: 46rem; } small, .soft { color: var(--soft); }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .42rem .7rem .42rem 0; vertical-align: top; }
tr + tr { border-top: 1px solid var(--line); } th { font-weight: 600; color: var(--soft); font-size: .86rem; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; } td.bar { width: 38%; min-width: 9rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 1rem; }
.query { display: flex; gap: .8rem; align-items: center; font-weight: 600; margin-bottom: .6rem; overflow-wrap: anywhere; }
.query img { width: 72px; height: 72px; } .query.wide { flex-direction: column; align-items: flex-start; gap: .3rem; }
.query.wide img { width: auto; height: auto; max-width: 100%; } img { object-fit: contain; background: #fff; border-radius: 6px; }
ol { margin: 0; padding-left: 1.4rem; } li { overflow-wrap: anywhere; } li .score { color: var(--soft); font-size: .85rem; }
li.right { color: var(--good); font-weight: 600; } .tag { font-size: .78rem; font-weight: 700; letter-spacing: .03em; }
.tag.hit { color: var(--good); } .tag.miss { color: var(--bad); }
.strip { display: grid; grid-template-columns: repeat(5, 1fr); gap: .5rem; } .strip figure { margin: 0; min-width: 0; }
.strip img { width: 100%; aspect-ratio: 1; border: 2px solid transparent; }
.strip.wide { grid-template-columns: repeat(2, 1fr); } .strip.wide img { aspect-ratio: 4; }
.strip .right img { border-color: var(--good); } figcaption { font-size: .74rem; color: var(--soft); overflow-wrap: anywhere; line-height: 1.25; }
svg { width: 100%; height: auto; display: block; } td.bar svg { overflow: visible; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
@media (max-width: 560px) { .bar { display: none; } td.number small { display: block; } }
"""


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: For the legend.
        points: (x, y) pairs, x ascending.
    """

    name: str
    points: tuple[tuple[float, float], ...]


def page(title: str, body: str) -> str:
    """Return a whole document around `body`, which is HTML already."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def thumbnail(image: Image.Image, text: str, *, side: int = 96) -> str:
    """Return an `img` element with the picture inside it.

    Args:
        image: RGB.
        text: For those who cannot see it.
        side: Longest side, pixels.
    """
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/webp;base64,{data}" alt="{escape(text, quote=True)}" loading="lazy">'


def words(text: str) -> str:
    """Return a user's text, escaped, in its own reading direction."""
    return f'<span dir="auto">{escape(text)}</span>'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of names and values."""
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{words(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def interval_table(rows: Iterable[tuple[str, Interval, float | None]]) -> str:
    """Return a table of measured shares with their intervals drawn as bars from 0 to 1; the third value is the one at chance, where known."""
    rows = list(rows)
    head = "<th>at chance</th>" if any(chance is not None for _, _, chance in rows) else ""
    cells = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{_number(value, "")}</td><td class="bar">{_bar(value)}</td>'
        f'<td class="number soft">{"" if chance is None else f"{chance:.3f}"}</td></tr>'
        for name, value, chance in rows
    )
    return f"<table><tr><th></th><th>value, 95 % interval</th><th class='bar'></th>{head}</tr>{cells}</table>"


def _bar(value: Interval) -> str:
    x, low, high = (f"{200 * v:.1f}" for v in (value.value, value.low, value.high))
    return (
        f'<svg viewBox="0 0 200 16" role="img" aria-label="{value}"><rect x="0" y="6" width="200" height="4" rx="2" fill="var(--line)"/>'
        f'<rect x="0" y="6" width="{x}" height="4" rx="2" fill="var(--right)"/>'
        f'<line x1="{low}" x2="{high}" y1="8" y2="8" stroke="var(--ink)" stroke-width="1.5"/>'
        f'<circle cx="{x}" cy="8" r="4" fill="var(--right)"/></svg>'
    )


def difference_table(rows: Sequence[tuple[str, Interval, Interval | None]]) -> str:
    """Return a table of values and of their differences to one of them; these are drawn around 0, hollow where their interval holds it."""
    differences = [difference for _, _, difference in rows if difference is not None]
    reach = max((abs(end) for each in differences for end in (each.low, each.high)), default=0.0) or 1.0
    cells = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{_number(value, "")}</td>'
        + ("<td></td><td class='bar'></td>" if difference is None else _difference(difference, reach))
        + "</tr>"
        for name, value, difference in rows
    )
    head = "<th></th><th>value, 95 % interval</th><th>difference, 95 % interval</th><th class='bar'></th>"
    return f"<table><tr>{head}</tr>{cells}</table>"


def _number(value: Interval, sign: str) -> str:
    return f"<strong>{value.value:{sign}.3f}</strong> <small>{value.low:{sign}.3f} to {value.high:{sign}.3f}</small>"


def _difference(value: Interval, reach: float) -> str:
    x, low, high = (f"{100 + 94 * v / reach:.1f}" for v in (value.value, value.low, value.high))
    fill = "var(--paper)" if value.low <= 0 <= value.high else "var(--right)"
    return (
        f'<td class="number">{_number(value, "+")}</td><td class="bar"><svg viewBox="0 0 200 16" role="img" aria-label="{value}">'
        f'<line x1="100" x2="100" y1="0" y2="16" stroke="var(--soft)"/>'
        f'<line x1="{low}" x2="{high}" y1="8" y2="8" stroke="var(--ink)" stroke-width="1.5"/>'
        f'<circle cx="{x}" cy="8" r="4" fill="{fill}" stroke="var(--right)" stroke-width="1.5"/></svg></td>'
    )


def line_chart(title: str, lines: Sequence[Line], *, x_name: str = "step") -> str:
    """Return a card with curves over a common x axis; empty when there is nothing to draw."""
    lines = [line for line in lines if len(line.points) > 1]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(*ys, 0) if min(ys) < 0.3 * max(ys) else min(ys), max(ys))
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(*ys, y_ticks[0]), max(*ys, y_ticks[-1]))

    def place(x: float, y: float) -> tuple[float, float]:
        return 44 + 366 * (x - x0) / ((x1 - x0) or 1), 180 - 165 * (y - y0) / ((y1 - y0) or 1)

    grid = "".join(
        f'<line x1="44" x2="410" y1="{place(x0, y)[1]:.1f}" y2="{place(x0, y)[1]:.1f}" stroke="var(--line)"/>'
        f'<text x="38" y="{place(x0, y)[1] + 4:.1f}" text-anchor="end">{y:g}</text>'
        for y in y_ticks
    ) + "".join(
        f'<text x="{place(x, y0)[0]:.1f}" y="197" text-anchor="middle">{x:g}</text>' for x in x_ticks if x >= x0
    )
    colours = ("var(--right)", "var(--left)", "var(--good)", "var(--soft)")
    curves = "".join(
        f'<polyline fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round" points="'
        + " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line.points)
        + f'"><title>{escape(line.name)}: {line.points[-1][1]:.4g} at {escape(x_name)} {line.points[-1][0]:g}</title></polyline>'
        for line, colour in zip(lines, colours, strict=False)
    )
    legend = " ".join(
        f'<small><span style="color:{colour}">■</span>&nbsp;{escape(line.name)}</small>'
        for line, colour in zip(lines, colours, strict=False)
    )
    return (
        f'<div class="card"><strong>{escape(title)}</strong> {legend if len(lines) > 1 else ""}'
        f'<svg viewBox="0 0 420 212" role="img" aria-label="{escape(title, quote=True)}">{grid}{curves}'
        f'<text x="410" y="210" text-anchor="end">{escape(x_name)}</text></svg></div>'
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers that cover [low, high], about `count` of them."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    return [round(i * step, 10) for i in range(first, math.ceil(high / step - 1e-9) + 1)]
