"""Retrieval as pictures: a query, the five best candidates, and which of them are right."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from diptych.data.images import decode
from diptych.data.sources import AbstractSource
from diptych.models.embedding import Embedded, folded
from diptych.use.page import thumbnail, words


@dataclass(frozen=True)
class Candidate:
    """One answer.

    Attributes:
        score: Cosine.
        text: Words to show.
        image: Picture to show, if it is an image.
        right: Whether it belongs to the query; None when nobody knows.
    """

    score: float
    text: str
    image: Image.Image | None = None
    right: bool | None = None


@dataclass(frozen=True)
class Card:
    """A query and its answers, best first.

    Attributes:
        text: Words of the query, or a name for its image.
        image: Picture of the query, if it is an image.
        candidates: Answers.
        right: Whether the card counts as a hit; None where its first candidate says so.
    """

    text: str
    image: Image.Image | None
    candidates: tuple[Candidate, ...]
    right: bool | None = None


def render(cards: Sequence[Card]) -> str:
    """Return the cards as HTML."""
    return f'<div class="gallery">{"".join(map(_card, cards))}</div>'


def _card(card: Card) -> str:
    picture = _picture(card.image, card.text)
    known = card.right is not None or any(candidate.right is not None for candidate in card.candidates)
    hit = card.right if card.right is not None else bool(card.candidates) and bool(card.candidates[0].right)
    tag = f'<span class="tag {"hit" if hit else "miss"}">{"HIT" if hit else "MISS"}</span>' if known else ""
    pictured = any(candidate.image is not None for candidate in card.candidates)
    answers = _strip(card.candidates) if pictured else _list(card.candidates)
    look = "query wide" if _is_wide(card.image) else "query"
    return (
        f'<div class="card"><div class="{look}">{picture}<span>{words(card.text)}<br>{tag}</span></div>{answers}</div>'
    )


def _list(candidates: Sequence[Candidate]) -> str:
    rows = (
        f'<li class="{"right" if c.right else ""}">{words(c.text)} <span class="score">{c.score:.2f}</span></li>'
        for c in candidates
    )
    return f"<ol>{''.join(rows)}</ol>"


def _strip(candidates: Sequence[Candidate]) -> str:
    figures = (
        f'<figure class="{"right" if c.right else ""}">{_picture(c.image, c.text)}'
        f"<figcaption>{c.score:.2f} {words(c.text)}</figcaption></figure>"
        for c in candidates
    )
    look = "strip wide" if any(_is_wide(c.image) for c in candidates) else "strip"
    return f'<div class="{look}">{"".join(figures)}</div>'


def _picture(image: Image.Image | None, text: str) -> str:
    return "" if image is None else thumbnail(image, text, side=240 if _is_wide(image) else 96)


def _is_wide(image: Image.Image | None) -> bool:
    """Return whether a picture is like a line of text, which cannot be read in a small square."""
    return image is not None and image.width > 3 * image.height


def retrieval_cards(
    embedded: Embedded, source: AbstractSource, *, count: int = 6, seed: int = 0
) -> tuple[list[Card], list[Card]]:
    """Return cards for image-to-text and for text-to-image: about half hits and half misses where there are both.

    Args:
        embedded: What was measured on `source`.
        source: Gives the pictures.
        count: Cards in each direction.
        seed: Of the choice.
    """
    scores = embedded.images @ embedded.texts.T
    spoken = [folded(text) for text in embedded.captions]
    told = {(embedded.groups[row], text) for row, text in zip(embedded.owner, spoken, strict=True)}

    def picture(row: int) -> Image.Image:
        image = source[embedded.rows[row]].image
        assert image is not None
        return decode(image)

    def caption(row: int) -> str:
        return next(
            (text for text, o in zip(embedded.captions, embedded.owner, strict=True) if o == row), embedded.keys[row]
        )

    def right(row: int, j: int) -> bool:
        """Return whether text j belongs to an image, as it counts in the numbers."""
        return (embedded.groups[row], spoken[j]) in told

    rows = sorted(set(embedded.owner))
    nearest_text, nearest_image = scores.argmax(1).tolist(), scores.argmax(0).tolist()
    forward = [
        Card(
            caption(row),
            picture(row),
            tuple(
                Candidate(scores[row, j].item(), embedded.captions[j], right=right(row, j))
                for j in scores[row].topk(min(5, len(spoken))).indices.tolist()
            ),
        )
        for row in half_and_half([right(row, nearest_text[row]) for row in rows], rows, count, seed)
    ]
    backward = [
        Card(
            embedded.captions[j],
            None,
            tuple(
                Candidate(scores[i, j].item(), caption(i), picture(i), right=right(i, j))
                for i in scores[:, j].topk(min(5, len(scores))).indices.tolist()
            ),
        )
        for j in half_and_half([right(i, j) for j, i in enumerate(nearest_image)], range(len(spoken)), count, seed + 1)
    ]
    return forward, backward


def half_and_half(hit: Sequence[bool], rows: Sequence[int], count: int, seed: int) -> list[int]:
    """Return about `count` rows, half of them hits and half misses, as far as there are any; hits first."""
    rng = np.random.default_rng(seed)
    hits = [row for row, good in zip(rows, hit, strict=True) if good]
    misses = [row for row, good in zip(rows, hit, strict=True) if not good]
    half = count // 2
    few_hits, few_misses = len(hits) < half, len(misses) < half
    take = count - len(misses) if few_misses else half, count - len(hits) if few_hits else count - half
    return [
        row
        for group, number in zip((hits, misses), take, strict=True)
        for row in (rng.permutation(group)[:number].tolist() if group else [])
    ]
