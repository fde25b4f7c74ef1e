"""Retrieval as pictures: a query, the five best candidates, and which of them are right."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diptych.data.images import decode
from diptych.data.sources import AbstractSource
from diptych.models.embedding import Embedded
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
    """

    text: str
    image: Image.Image | None
    candidates: tuple[Candidate, ...]


def render(cards: Sequence[Card]) -> str:
    """Return the cards as HTML."""
    return f'<div class="gallery">{"".join(map(_card, cards))}</div>'


def _card(card: Card) -> str:
    picture = thumbnail(card.image, card.text) if card.image is not None else ""
    known = any(candidate.right is not None for candidate in card.candidates)
    hit = bool(card.candidates) and bool(card.candidates[0].right)
    tag = f'<span class="tag {"hit" if hit else "miss"}">{"HIT" if hit else "MISS"}</span>' if known else ""
    pictured = any(candidate.image is not None for candidate in card.candidates)
    answers = _strip(card.candidates) if pictured else _list(card.candidates)
    return (
        f'<div class="card"><div class="query">{picture}<span>{words(card.text)}<br>{tag}</span></div>{answers}</div>'
    )


def _list(candidates: Sequence[Candidate]) -> str:
    rows = (
        f'<li class="{"right" if c.right else ""}">{words(c.text)} <span class="score">{c.score:.2f}</span></li>'
        for c in candidates
    )
    return f"<ol>{''.join(rows)}</ol>"


def _strip(candidates: Sequence[Candidate]) -> str:
    figures = (
        f'<figure class="{"right" if c.right else ""}">{thumbnail(c.image, c.text) if c.image is not None else ""}'
        f"<figcaption>{c.score:.2f} {words(c.text)}</figcaption></figure>"
        for c in candidates
    )
    return f'<div class="strip">{"".join(figures)}</div>'


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
    owner = torch.tensor(embedded.owner)
    place = {source[index].key: index for index in range(len(source))}

    def picture(row: int) -> Image.Image:
        image = source[place[embedded.keys[row]]].image
        assert image is not None
        return decode(image)

    def caption(row: int) -> str:
        return next(
            (text for text, o in zip(embedded.captions, embedded.owner, strict=True) if o == row), embedded.keys[row]
        )

    rows = sorted(set(embedded.owner))
    first_right = owner[scores.argmax(1)] == torch.arange(len(scores))
    forward = [
        Card(
            caption(row),
            picture(row),
            tuple(
                Candidate(scores[row, j].item(), embedded.captions[j], right=embedded.owner[j] == row)
                for j in scores[row].topk(min(5, len(owner))).indices.tolist()
            ),
        )
        for row in _choose(torch.tensor([bool(first_right[row]) for row in rows]), rows, count, seed)
    ]
    right_image = scores.argmax(0) == owner
    backward = [
        Card(
            embedded.captions[j],
            None,
            tuple(
                Candidate(scores[i, j].item(), caption(i), picture(i), right=embedded.owner[j] == i)
                for i in scores[:, j].topk(min(5, len(scores))).indices.tolist()
            ),
        )
        for j in _choose(right_image, list(range(len(owner))), count, seed + 1)
    ]
    return forward, backward


def _choose(hit: Tensor, rows: Sequence[int], count: int, seed: int) -> list[int]:
    """Return about `count` rows, half of them hits and half misses, as far as there are any; hits first."""
    rng = np.random.default_rng(seed)
    hits = [row for row, good in zip(rows, hit.tolist(), strict=True) if good]
    misses = [row for row, good in zip(rows, hit.tolist(), strict=True) if not good]
    half = count // 2
    few_hits, few_misses = len(hits) < half, len(misses) < half
    take = count - len(misses) if few_misses else half, count - len(hits) if few_hits else count - half
    return [
        row
        for group, number in zip((hits, misses), take, strict=True)
        for row in (rng.permutation(group)[:number].tolist() if group else [])
    ]
