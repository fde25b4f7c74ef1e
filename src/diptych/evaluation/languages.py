"""Retrieval language by language: the images are embedded once, their texts once per language."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from diptych.data.sources import AbstractSource
from diptych.errors import EvaluationError, nearest
from diptych.evaluation.retrieval import Direction, Retrieval, retrieval
from diptych.evaluation.run import measure_retrieval
from diptych.evaluation.stats import bootstrap
from diptych.models.dual import DualEncoder
from diptych.models.embedding import ProgressBar, describes, embed_source, embed_texts, folded
from diptych.models.memory import TowerMemory
from diptych.models.precision import Precision
from diptych.types import Interval


@dataclass(frozen=True)
class LanguageTable:
    """Recall in every language.

    Attributes:
        retrieval: Recall at k both ways, by language.
        mean_recall: Mean of the six recalls (1, 5, 10, both ways), by language; remote sensing calls it mR.
        chance: Of the mean recall, by language.
        mean: Mean over languages of the mean recall; intervals resample images, each with its texts in all languages.
    """

    retrieval: Mapping[str, Retrieval]
    mean_recall: Mapping[str, Interval]
    chance: Mapping[str, float]
    mean: Interval

    @property
    def lowest(self) -> str:
        """Return the language with the lowest mean recall."""
        return min(self.mean_recall, key=lambda language: self.mean_recall[language].value)

    def lines(self) -> list[str]:
        """Return the table as Markdown, best language first."""
        order = sorted(self.mean_recall, key=lambda language: -self.mean_recall[language].value)
        rows = [
            f"| {language} | {found.image_to_text.recall[1]} | {found.text_to_image.recall[1]} | {self.mean_recall[language]} "
            f"| {self.chance[language]:.3f} |"
            for language in order
            for found in (self.retrieval[language],)
        ]
        return [
            "| language | image to text, recall@1 | text to image, recall@1 | mean recall | chance |",
            "|---|---|---|---|---|",
            *rows,
            f"| mean | | | {self.mean} | |",
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the numbers for a file."""
        return {
            "mean": self.mean.to_json(),
            "lowest": self.lowest,
            "languages": {
                language: {
                    "mean_recall": self.mean_recall[language].to_json(),
                    "chance": self.chance[language],
                    **{
                        name: {f"recall@{k}": value.to_json() for k, value in direction.recall.items()}
                        for name, direction in zip(("image_to_text", "text_to_image"), _directions(found), strict=True)
                    },
                }
                for language, found in self.retrieval.items()
            },
        }


def languages_of(source: AbstractSource) -> tuple[str, ...]:
    """Return the languages of a source's captions and translations, in the order in which they are met."""
    found = (text.language for index in range(len(source)) for text in source.texts(index) if text.role in _ROLES)
    return tuple(dict.fromkeys(language for language in found if language is not None))


def evaluate_languages(
    model: DualEncoder,
    source: AbstractSource,
    languages: Sequence[str] | None = None,
    *,
    batch_size: int = 64,
    seed: int = 0,
    progress: ProgressBar | None = None,
    memory: TowerMemory | None = None,
    precision: Precision = "auto",
) -> LanguageTable:
    """Return retrieval between the images of a source and their texts in each language.

    Args:
        model: Any dual encoder.
        source: Samples with captions or translations whose languages are known.
        languages: ISO 639-1 codes; None for all there are. An image without a text in a language takes no part in it.
        batch_size: Images per forward pass.
        seed: Of the bootstrap.
        progress: Shows progress.
        memory: Of the model and the source, where they are evaluated several times; changes no number.
        precision: Of the towers: `auto` takes bf16 where the processor has it.

    Raises:
        EvaluationError: If no text has a language, or none is in a language asked for.
    """
    chosen = _known(source, languages)
    embedded = embed_source(
        model,
        source,
        language=chosen[0],
        batch_size=batch_size,
        progress=progress,
        memory=memory,
        precision=precision,
    )
    found: dict[str, Retrieval] = {}
    images: dict[str, list[str]] = {}
    for language in chosen:
        pairs = [
            (row, text.text)
            for row, index in enumerate(embedded.rows)
            for text in source.texts(index)
            if describes(text, language)
        ]
        captions, owner = tuple(text for _, text in pairs), tuple(row for row, _ in pairs)
        texts = embed_texts(model, captions, memory=memory, precision=precision)
        here = replace(embedded, captions=captions, owner=owner, texts=texts)
        found[language] = measure_retrieval(here, seed=seed)
        images[language] = list(dict.fromkeys(embedded.groups[row] for row in sorted(set(owner))))
    return LanguageTable(
        found,
        {language: _mean_recall([one], [images[language]], seed) for language, one in found.items()},
        {
            language: float(np.mean([d.chance[k] for d in _directions(one) for k in d.recall]))
            for language, one in found.items()
        },
        _mean_recall(list(found.values()), list(images.values()), seed),
    )


def evaluate_translations(
    model: DualEncoder, source: AbstractSource, language: str, *, pivot: str = "en", seed: int = 0
) -> Retrieval:
    """Return retrieval between texts and their translations; no image is read, so samples may have none.

    `image_to_text` is from the pivot language to the other, `text_to_image` the way back. The first text of each is taken.

    Args:
        model: Its text tower and head are measured.
        source: Samples with a text in both languages; others are left out.
        language: ISO 639-1 code.
        pivot: The language on the other side.
        seed: Of the bootstrap.

    Raises:
        EvaluationError: If no sample has texts in both languages.
    """
    pairs = []
    for index in range(len(source)):
        first = {text.language: text.text for text in reversed(source.texts(index)) if text.role in _ROLES}
        if pivot in first and language in first:
            pairs.append((first[pivot], first[language]))
    if not pairs:
        raise EvaluationError(
            f"No sample of {source.name} has texts in both {pivot} and {language}. It has: {', '.join(languages_of(source)) or 'none'}."
        )
    ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    return retrieval(
        embed_texts(model, ours),
        embed_texts(model, theirs),
        torch.arange(len(pairs)),
        image_group=_same(ours),
        text_group=_same(theirs),
        seed=seed,
    )


_ROLES = ("caption", "translation")


def _known(source: AbstractSource, languages: Sequence[str] | None) -> Sequence[str]:
    known = languages_of(source)
    if not known:
        raise EvaluationError(
            f"No text of {source.name} has a language. Name columns caption_de, caption_fr, ..., or say columns.language."
        )
    for language in languages or ():
        if language not in known:
            raise EvaluationError(f"{source.name} has no texts in {language!r}. {nearest(language, known)}")
    return languages or known


def _mean_recall(found: Sequence[Retrieval], images: Sequence[Sequence[str]], seed: int) -> Interval:
    """Return the mean over languages of the six recalls. Scores are scaled so that their plain mean is that mean of means."""
    directions = [direction for one in found for direction in _directions(one)]
    names = [np.array(one)[d.cluster] for one, r in zip(images, found, strict=True) for d in _directions(r)]
    scores = [np.mean([d.hits(k) for k in d.recall], axis=0) for d in directions]
    total = sum(map(len, scores))
    scaled = [part * (total / (len(scores) * len(part))) for part in scores]
    return bootstrap(np.concatenate(scaled), cluster=np.concatenate(names), seed=seed)


def _directions(found: Retrieval) -> tuple[Direction, Direction]:
    return found.image_to_text, found.text_to_image


def _same(texts: Sequence[str]) -> torch.Tensor:
    """Return one number per text, equal for texts that differ in case and white space only."""
    place: dict[str, int] = {}
    return torch.tensor([place.setdefault(folded(text), len(place)) for text in texts])
