"""An attack as a page: numbers of every victim beside random noise, and pictures before and after."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape

import torch
from PIL import Image
from torch import Tensor

from diptych.data.sources import AbstractSource
from diptych.data.words import Span
from diptych.evaluation.attack import AttackReport, Rewording, hits_of
from diptych.evaluation.zeroshot import class_embeddings
from diptych.models.dual import DualEncoder
from diptych.models.embedding import embed_texts, evaluation_view
from diptych.models.perturbation import AbstractPerturbation, as_floats
from diptych.types import Interval
from diptych.use.gallery import half_and_half
from diptych.use.page import facts, page, thumbnail, words

SHOWN_LEVELS = 96
"""The largest change is shown this many levels from grey, whatever eps is."""


@dataclass(frozen=True)
class Struck:
    """One picture before and after, and what the model makes of it.

    Attributes:
        name: Of the picture.
        clean: As the model sees it.
        attacked: The same, changed.
        change: What was added, around grey, magnified.
        before: What the model says of the clean picture: its caption or class, the nearest of all.
        after: Of the changed one.
        fooled: Whether it was right before and is wrong after.
    """

    name: str
    clean: Image.Image
    attacked: Image.Image
    change: Image.Image
    before: str
    after: str
    fooled: bool


def strike(
    model: DualEncoder,
    source: AbstractSource,
    report: AttackReport,
    perturbation: AbstractPerturbation,
    *,
    count: int = 8,
    seed: int = 0,
) -> list[Struck]:
    """Return pictures that the model understood before, half of them fooled and half not, as far as there are any.

    Args:
        model: The victim.
        source: What it was measured on.
        report: The measurement.
        perturbation: What was measured.
        count: At most.
        seed: Of the choice.
    """
    before, after = report.clean.embedded, report.attacked.embedded
    if report.clean.retrieval is not None and report.attacked.retrieval is not None:
        rows = sorted(set(before.owner))
        texts, said = before.texts, before.captions
        sides = (report.clean.retrieval.image_to_text.hits(1), report.attacked.retrieval.image_to_text.hits(1))
    else:
        assert report.clean.zeroshot is not None and report.attacked.zeroshot is not None
        rows, said = list(range(len(before.keys))), report.clean.zeroshot.classes
        texts = class_embeddings(partial(embed_texts, model), said, report.clean.zeroshot.prompts)
        sides = (report.clean.zeroshot.correct, report.attacked.zeroshot.correct)
    was, is_still = ((side > 0).tolist() for side in sides)
    understood = [place for place, right in enumerate(was) if right]
    found = []
    for place in half_and_half([not is_still[place] for place in understood], understood, count, seed):
        row = rows[place]
        pixels = as_floats(evaluation_view(model, source[before.rows[row]])[None])
        changed = perturbation.apply(pixels)
        magnified = 0.5 + (changed - pixels) * (SHOWN_LEVELS / max(report.eps, 1e-9))
        was_said, is_said = (said[int((part.images[row] @ texts.T).argmax())] for part in (before, after))
        clean, attacked, change = (to_picture(part[0]) for part in (pixels, changed, magnified))
        found.append(Struck(before.keys[row], clean, attacked, change, was_said, is_said, not is_still[place]))
    return found


def to_picture(pixels: Tensor) -> Image.Image:
    """Return pixels [3, h, w] in [0, 1] as a picture."""
    levels = (pixels.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class StruckCaption:
    """One caption before and after.

    Attributes:
        caption: As it is.
        place: Of the word that is replaced.
        word: That replaces it.
        fooled: Whether the caption found its image before, and does not afterwards.
    """

    caption: str
    place: Span
    word: str
    fooled: bool


def strike_captions(
    report: AttackReport, rewording: Rewording, *, count: int = 8, seed: int = 0
) -> list[StruckCaption]:
    """Return captions that were understood before, half of them no more with the word and half still, as far as there are any.

    Args:
        report: Of the word alone, from `measure_words`.
        rewording: What was measured.
        count: At most.
        seed: Of the choice.
    """
    was, still = (hits_of(part)["text_to_image/recall@1"].right > 0 for part in (report.clean, report.attacked))
    changed = [row for row, place in enumerate(rewording.places) if place is not None and was[row]]
    rows = half_and_half([not still[row] for row in changed], changed, count, seed)
    return [
        StruckCaption(rewording.captions[row], place, rewording.word.word, not still[row])
        for row in rows
        if (place := rewording.places[row]) is not None
    ]


def render_attack(
    reports: Sequence[tuple[str, AttackReport]],
    struck: Sequence[Struck],
    captions: Sequence[StruckCaption] = (),
    *,
    title: str,
    lead: str,
    settings: Sequence[tuple[str, str]] = (),
) -> str:
    """Return a page: a table for each victim, then a card for each picture.

    Args:
        reports: Names of victim and data, and what was measured.
        struck: Pictures.
        captions: Captions, where a word was put into them.
        title: One line.
        lead: A sentence or two.
        settings: Names and values.
    """
    body = [f"<h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p>"]
    for name, report in reports:
        notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes())
        body.append(f"<h2>{words(name)}</h2>{_table(report)}{notes and f'<ul>{notes}</ul>'}")
    if struck:
        body.append(
            "<h2>Pictures</h2><p class='soft'>As the model sees them: clean, changed, and the change itself, magnified around grey. Below, "
            "which of all texts is nearest. All were understood before.</p>"
            f'<div class="gallery">{"".join(map(_card, struck))}</div>'
        )
    if captions:
        rows = "".join(map(_caption_row, captions))
        body.append(
            "<h2>Captions</h2><p class='soft'>The word stands in place of the one that matters most. All found their image before.</p>"
            f"<table>{rows}</table>"
        )
    body.append(f"<h2>Settings</h2>{facts(settings)}")
    return page(title, "".join(body))


def _table(report: AttackReport) -> str:
    clean, noise, attacked = (part.headline() for part in (report.clean, report.noise, report.attacked))
    success, by_noise = report.success(), report.noise_success()
    rows = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(
            f'<td class="number">{"" if value is None else _number(value)}</td>'
            for value in (clean[name], noise[name], attacked[name], by_noise.get(name), success.get(name))
        )
        + "</tr>"
        for name in clean
    )
    head = ("", "clean", report.by_chance, "attacked", f"lost to {report.by_chance}", "lost to the attack")
    titles = "".join(f"<th>{name}</th>" for name in head)
    return f'<div style="overflow-x:auto"><table><tr>{titles}</tr>{rows}</table></div>'


def _number(value: Interval) -> str:
    return f"<strong>{value.value:.3f}</strong> <small>{value.low:.2f} to {value.high:.2f}</small>"


def _card(one: Struck) -> str:
    shown = "".join(
        f"<figure>{thumbnail(image, f'{one.name}, {what}', side=224)}</figure>"
        for image, what in ((one.clean, "clean"), (one.attacked, "changed"), (one.change, "the change"))
    )
    return (
        f'<div class="card"><div class="strip" style="grid-template-columns:repeat(3,1fr)">{shown}</div>'
        f"{_tag(one.fooled)}<br>before: {words(one.before)}<br>after: {words(one.after)}</div>"
    )


def _caption_row(one: StruckCaption) -> str:
    start, end = one.place
    before, replaced, after = map(escape, (one.caption[:start], one.caption[start:end], one.caption[end:]))
    shown = f"{before}<del>{replaced}</del> <strong>{escape(one.word)}</strong>{after}"
    return f"<tr><td>{_tag(one.fooled)}</td><td>{shown}</td></tr>"


def _tag(fooled: bool) -> str:
    return '<span class="tag miss">FOOLED</span>' if fooled else '<span class="tag hit">UNMOVED</span>'
