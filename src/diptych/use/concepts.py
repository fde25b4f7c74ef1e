"""What the codes of a codebook stand for: the images, words and places that ask most for each, as one page that needs nothing else."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from diptych.data.sources import AbstractSource
from diptych.errors import ConfigError, ImageError
from diptych.models.codebook import CodebookHead
from diptych.models.dual import DualEncoder
from diptych.models.embedding import evaluation_view, inference
from diptych.types import TowerOutput, map_tensors
from diptych.use.page import page, thumbnail, words

BATCH = 64


@dataclass(frozen=True)
class Sighting:
    """One image that asks for a code.

    Attributes:
        row: Of the image, in its source.
        caption: Its first text, or its key.
        score: Of its best patch, q . c / sqrt(d).
        picture: The square that the model sees.
        places: Score of each patch, in its place; None where patches have no grid.
    """

    row: int
    caption: str
    score: float
    picture: Image.Image
    places: Float[np.ndarray, "rows columns"] | None


@dataclass(frozen=True)
class Concept:
    """One code and what asks for it most.

    Attributes:
        code: Row of the codebook.
        image_share: Its mean weight over the images.
        text_share: Its mean weight over the texts; None where the source has none.
        words: Words with their scores, best first.
        sightings: Images, best first.
    """

    code: int
    image_share: float
    text_share: float | None
    words: tuple[tuple[str, float], ...]
    sightings: tuple[Sighting, ...]


@dataclass(frozen=True)
class Extent:
    """How much is looked at and shown.

    Attributes:
        concepts: Codes to show.
        images: Images per code.
        words: Words per code.
        limit: Samples that are looked at, from the first.
    """

    concepts: int = 24
    images: int = 5
    words: int = 8
    limit: int = 1000


def explore(model: DualEncoder, source: AbstractSource, extent: Extent = Extent()) -> str:
    """Return a page on the codes that tell samples apart most, as HTML; see `find_concepts`."""
    return render_concepts(find_concepts(model, source, extent), source.name)


def find_concepts(model: DualEncoder, source: AbstractSource, extent: Extent = Extent()) -> list[Concept]:
    """Return the codes that tell samples apart most, those first whose weights vary most over images and over texts.

    A code that every sample uses alike says nothing, however heavy it is.

    Args:
        model: Has codebook heads.
        source: Images, with or without texts. Words are taken from its texts.
        extent: How much is looked at and returned.

    Raises:
        ConfigError: If the model has no codebook.
        ImageError: If no image can be read.
    """
    image_head, text_head = model.image_head, model.text_head
    if not isinstance(image_head, CodebookHead) or not isinstance(text_head, CodebookHead):
        raise ConfigError(
            "This model has no codebook. Put one on it with diptych.models.codebook.add_codebook, then train it."
        )
    rows, pixels = _readable(model, source, extent.limit)
    texts = [text.text for row in rows for text in source.texts(row) if text.role != "hard_negative"]
    with inference(model):
        seen, image_weights = _activations(image_head, (_look(model, batch) for batch in pixels.split(BATCH)))
        salience, text_shares, said = image_weights.std(0, correction=0), None, None
        vocabulary = common_words(texts)
        if vocabulary:
            said, _ = _activations(text_head, _read(model, vocabulary))
            _, text_weights = _activations(text_head, _read(model, texts))
            salience, text_shares = salience * text_weights.std(0, correction=0), text_weights.mean(0)
        found = []
        for code in salience.topk(min(extent.concepts, len(salience))).indices.tolist():
            best = seen[:, code].topk(min(extent.images, len(rows)))
            sightings = tuple(
                Sighting(
                    rows[place],
                    _caption(source, rows[place]),
                    score,
                    Image.fromarray(pixels[place].permute(1, 2, 0).numpy()),
                    _places(image_head, _look(model, pixels[place : place + 1]), code),
                )
                for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            )
            spoken = [] if said is None else said[:, code].topk(min(extent.words, len(vocabulary)))
            found.append(
                Concept(
                    code,
                    image_weights[:, code].mean().item(),
                    None if text_shares is None else text_shares[code].item(),
                    ()
                    if said is None
                    else tuple((vocabulary[i], s) for s, i in zip(*map(Tensor.tolist, spoken), strict=True)),
                    sightings,
                )
            )
    return found


def common_words(texts: Iterable[str], count: int = 2000) -> list[str]:
    """Return the most frequent words of some texts, case folded, the most frequent first."""
    counted = Counter(word for text in texts for word in re.findall(r"\w+(?:[-'’]\w+)*", text.casefold()))
    return [word for word, _ in counted.most_common(count)]


def spotlight(picture: Image.Image, places: Float[np.ndarray, "rows columns"]) -> Image.Image:
    """Return the picture with its best-scoring places as they are and the others faded to light grey."""
    share = (places - places.min()) / (np.ptp(places) or 1)
    light = Image.fromarray((255 * share).astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
    faded = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, "white"), 0.75)
    return Image.composite(picture, faded, light)


def render_concepts(concepts: Sequence[Concept], name: str) -> str:
    """Return the page: one card per code."""
    lead = (
        "Images and texts are mixtures of the same learnt codes. For each code: the words that ask for it most, and the images, above as the "
        "model sees them and below with the light on the patches that ask for it. Scores are q·c/√d of the best position."
    )
    cards = "".join(map(_card, concepts))
    title = f"Concepts in {name}"
    return page(title, f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p><div class="gallery">{cards}</div>')


def _card(concept: Concept) -> str:
    shares = f"{100 * concept.image_share:.1f} % of what images are made of"
    if concept.text_share is not None:
        shares += f", {100 * concept.text_share:.1f} % of texts"
    spoken = ", ".join(f"{words(word)} <small>{score:.2f}</small>" for word, score in concept.words)
    figures = "".join(
        f"<figure>{thumbnail(s.picture, s.caption)}"
        f"{'' if s.places is None else thumbnail(spotlight(s.picture, s.places), f'where in: {s.caption}')}"
        f"<figcaption>{s.score:.2f} {words(s.caption)}</figcaption></figure>"
        for s in concept.sightings
    )
    return (
        f'<div class="card"><div class="query"><span>Code {concept.code}<br><small>{shares}</small></span></div>'
        f'<p>{spoken}</p><div class="strip">{figures}</div></div>'
    )


def _readable(model: DualEncoder, source: AbstractSource, limit: int) -> tuple[list[int], UInt8[Tensor, "n 3 h w"]]:
    """Return rows and pixels of the images that can be read."""
    rows, pixels = [], []
    for row in range(min(limit, len(source))):
        with suppress(ImageError):
            pixels.append(evaluation_view(model, source[row]))
            rows.append(row)
    if not rows:
        raise ImageError(
            f"None of the first {limit} images of {source.name} can be read, so there is nothing to explore."
        )
    return rows, torch.stack(pixels)


def _look(model: DualEncoder, pixels: UInt8[Tensor, "b 3 h w"]) -> TowerOutput:
    return model.image_output(pixels.to(model.device))


def _read(model: DualEncoder, texts: Sequence[str]) -> Iterable[TowerOutput]:
    for start in range(0, len(texts), 4 * BATCH):
        tokens = model.tokenizer(texts[start : start + 4 * BATCH])
        yield model.text_output(map_tensors(lambda tensor: tensor.to(model.device), tokens))


def _activations(
    head: CodebookHead, outputs: Iterable[TowerOutput]
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Return scores, pooled over positions, and weights, on the CPU."""
    pairs = [(head.pooled(output) * head.config.temperature, head.mix(output).weights) for output in outputs]
    scores, weights = zip(*pairs, strict=True)
    return torch.cat(scores).cpu(), torch.cat(weights).cpu()


def _places(head: CodebookHead, output: TowerOutput, code: int) -> np.ndarray | None:
    if output.grid is None:
        return None
    places: np.ndarray = head.scores(output)[0, :, code].float().unflatten(0, output.grid).cpu().numpy()
    return places


def _caption(source: AbstractSource, row: int) -> str:
    texts = source.texts(row)
    return texts[0].text if texts else source[row].key
