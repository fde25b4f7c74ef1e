"""The audit card of a model: what it withstands, as a page with pictures, and as Markdown for a repository."""

import json
from collections.abc import Iterator
from html import escape

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from diptych.data.corruptions import SEVERITIES
from diptych.evaluation.robustness import ALL_CORRUPTIONS, Audit, Picture, Row, compare_audits
from diptych.types import Interval
from diptych.use.page import difference_table, facts, page, thumbnail, words

_TITLES = {
    "image_to_text/recall@1": "Image to text, recall at 1",
    "text_to_image/recall@1": "Text to image, recall at 1",
    "zeroshot/top1": "Zero-shot classification, top 1",
}


def lead(audit: Audit) -> str:
    """Return what an audit found, in a few sentences about its first metric."""
    metric, settings = audit.metrics[0], audit.settings
    said = [
        f"{settings['model'] or 'The model'} on {settings['images']} images of {settings['source']}. "
        f"{_TITLES[metric]}, is {_value(audit.rows[0], metric):.3f} on clean images ({audit.chance[metric]:.3f} at chance)"
    ]
    values = {row.name: _value(row, metric) for row in audit.summary()}
    if attacks := [row.name for row in audit.rows if row.family == "pgd"]:
        noise = attacks[-1].replace("PGD", "noise")
        said.append(
            f"{values[attacks[-1]]:.3f} under {attacks[-1]} of 255 levels, where random noise of that size leaves {values[noise]:.3f}"
        )
    if "wrong words" in values:
        said.append(
            f"{values['wrong words']:.3f} with wrong words written over the image, {values['empty box']:.3f} with the empty box"
        )
    if ALL_CORRUPTIONS in values:
        said.append(f"{values[ALL_CORRUPTIONS]:.3f} under common corruptions, the mean of all")
    return "; ".join(said) + "."


def audit_page(audit: Audit, against: Audit | None = None) -> str:
    """Return the card as an HTML document, beside another model's audit if one is given."""
    body = [f'<h1>What the model withstands</h1><p class="lead">{words(lead(audit))}</p>']
    for metric in audit.metrics:
        scores = [(row, row.scores[metric]) for row in audit.summary()]
        rows = [(row.name, score.value, None if row.family == "clean" else score.change) for row, score in scores]
        body.append(f"<h2>{escape(_TITLES[metric])}</h2><p class='soft'>{escape(_errors(audit, metric))}</p>")
        body.append(difference_table(rows))
        body.append(_severities(audit, metric))
        if against is not None:
            body += [f"<p>{words(_about(against))}</p>", difference_table(_beside(audit, against, metric))]
    if audit.pictures:
        body.append("<h2>What the model was shown</h2>" + "".join(map(_strip, audit.pictures)))
    if audit.notes:
        body.append(f"<h2>Notes</h2><ul>{''.join(f'<li>{escape(note)}</li>' for note in audit.notes)}</ul>")
    body.append(f"<h2>Settings</h2>{facts(_settings(audit))}")
    return page("What the model withstands", "".join(body))


def audit_markdown(audit: Audit, against: Audit | None = None) -> str:
    """Return the card as Markdown, without pictures, beside another model's audit if one is given."""
    parts = ["# What the model withstands", lead(audit)]
    for metric in audit.metrics:
        rows = [
            f"| {row.name} | {row.scores[metric].value} | {'' if row.family == 'clean' else row.scores[metric].change.signed()} |"
            for row in audit.summary()
        ]
        head = ["| images | value, 95 % interval | minus clean, 95 % interval |", "|---|---|---|"]
        parts += [f"## {_TITLES[metric]}", _errors(audit, metric), "\n".join([*head, *rows])]
        if grid := list(_grid(audit, metric)):
            lines = [f"| {kind} | {' | '.join(f'{value.value:.3f}' for value in values)} |" for kind, values in grid]
            numbers = " | ".join(map(str, SEVERITIES))
            parts.append("\n".join([f"| corruption, severity | {numbers} |", "|---" * 6 + "|", *lines]))
        if against is not None:
            beside = _beside(audit, against, metric)
            rows = [f"| {name} | {value} | {difference.signed()} |" for name, value, difference in beside]
            head = ["| images | value, 95 % interval | difference, 95 % interval |", "|---|---|---|"]
            parts += [_about(against), "\n".join([*head, *rows])]
    if audit.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in audit.notes)]
    parts += ["## Settings", "\n".join(f"- {name}: {value}" for name, value in _settings(audit))]
    return "\n\n".join(parts) + "\n"


def _value(row: Row, metric: str) -> float:
    return row.scores[metric].value.value


def _about(against: Audit) -> str:
    return (
        f"{against.settings['model'] or 'Another model'} on the same images, each attacked for itself, and by how much the model of this card "
        "scores more, paired over the same items:"
    )


def _beside(audit: Audit, against: Audit, metric: str) -> list[tuple[str, Interval, Interval]]:
    """Return for each change of the images what the other model scores, and by how much this one scores more."""
    values = {row.name: row.scores[metric].value for row in against.summary()}
    return [(name, values[name], difference) for name, difference in compare_audits(against, audit)[metric].items()]


def _errors(audit: Audit, metric: str) -> str:
    mean, relative = audit.corruption_error(metric), audit.relative_corruption_error(metric)
    said = f"At chance {audit.chance[metric]:.3f}."
    if mean is None or relative is None:
        return said
    return f"{said} Mean corruption error {mean}; beside clean images {relative.signed()}."


def _grid(audit: Audit, metric: str) -> Iterator[tuple[str, list[Interval]]]:
    """Yield each kind of corruption with its values from the weakest to the strongest."""
    single = [row for row in audit.rows if row.severity is not None]
    for kind in dict.fromkeys(row.name for row in single):
        yield kind, [row.scores[metric].value for row in single if row.name == kind]


def _severities(audit: Audit, metric: str) -> str:
    cells = [
        f"<tr><td>{escape(kind)}</td>"
        + "".join(f'<td class="number" title="{value}">{value.value:.3f}</td>' for value in values)
        + "</tr>"
        for kind, values in _grid(audit, metric)
    ]
    if not cells:
        return ""
    head = "".join(f"<th>{severity}</th>" for severity in SEVERITIES)
    return f"<p></p><table><tr><th>corruption, severity</th>{head}</tr>{''.join(cells)}</table>"


def _strip(picture: Picture) -> str:
    figures = "".join(
        f"<figure>{thumbnail(Image.fromarray(pixels), name, side=224)}<figcaption>{escape(name)}</figcaption></figure>"
        for name, pixels in _shown(picture)
    )
    return f'<p class="soft">{words(picture.key)}</p><div class="strip">{figures}</div>'


def _shown(picture: Picture) -> Iterator[tuple[str, UInt8[np.ndarray, "h w 3"]]]:
    """Yield the pictures by name, and behind each attack what it changed, enlarged."""
    clean = picture.shown["clean"].astype(np.int64)
    for name, pixels in picture.shown.items():
        yield name, pixels
        if name.startswith("PGD") and (largest := np.abs(pixels - clean).max()):
            factor = int(127 // largest)
            yield f"its change, times {factor}", (128 + factor * (pixels - clean)).astype(np.uint8)


def _settings(audit: Audit) -> list[tuple[str, str]]:
    """Return settings as names and words, nested ones with dots."""
    rows = []
    for name, value in audit.settings.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        rows += [(f"{name}.{key}" if key else name, _word(part)) for key, part in inner if key != "kind"]
    return rows


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
