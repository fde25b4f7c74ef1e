"""Names in many languages, printed in many typefaces and read with a machine's mistakes: records whose truth is known.

One class is one entity. Its records are pictures of its name, each in another typeface and with other ink, beside the name as a machine read it:
letters are taken for others that look alike, lost, or doubled. Half of the entities are also known by another name, so that no picture
says all.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from diptych.data.openmoji import emoji_names
from diptych.data.sources import Listed
from diptych.errors import require
from diptych.types import Sample, Text

LANGUAGES = ("en", "es", "pt", "it", "fr", "de", "id", "tr", "ru")
"""Those whose letters the typefaces have."""

LATIN = ("en", "es", "pt", "it", "fr", "de", "id")
"""Those that the character reader of the extra `ocr` knows."""

FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
)
"""They come with matplotlib (extra `plot`)."""

SIDE, RECORDS = 64, 6
PARTS = {"train": 240, "validation": 60, "test": 100, "distractors": 500}
"""Entities of each part; no two parts share one. Distractors have one record."""

LOOK_ALIKES = (
    "oceaöóòô0",
    "il1jtíìı",
    "nmrhuñ",
    "uvyüúù",
    "bdpqgğ",
    "szşß5",
    "еосаэ",
    "ишщцнпл",
    "ктгжх",
    "fktř7",
    "wvu",
    "çcce",
)


@dataclass(frozen=True)
class Part:
    """Records of some entities.

    Attributes:
        records: Pictures with what a machine read; the group is the entity.
        names: True name of each record.
    """

    records: Listed
    names: tuple[str, ...]


@lru_cache(maxsize=16)
def name_records(part: str, noise: float, *, seed: int = 0, languages: tuple[str, ...] = LANGUAGES) -> Part:
    """Return the records of a part.

    Args:
        part: See `PARTS`.
        noise: Chance that a letter is misread: 0.05 is clean, 0.25 noisy.
        seed: Of entities, typefaces, ink and mistakes.
        languages: That names are drawn from.
    """
    ink, mistakes = (np.random.default_rng([seed, list(PARTS).index(part), what]) for what in range(2))
    samples, true = [], []
    for entity, known_by in entities(part, seed=seed, languages=languages).items():
        for record in range(1 if part == "distractors" else RECORDS):
            # The other name is that of every third record of every second entity.
            name = known_by[1] if entity % 2 and record % 3 == 2 else known_by[0]
            picture = print_name(name, FACES[ink.integers(len(FACES))], ink)  # the same for any noise
            read = misread(name, noise, mistakes) or name[:1]
            samples.append(Sample(f"{entity}-{record}", picture, (Text(read),), f"entity {entity}"))
            true.append(name)
    return Part(Listed(samples, f"names:{part}"), tuple(true))


def entities(part: str, *, seed: int, languages: tuple[str, ...] = LANGUAGES) -> dict[int, tuple[str, str]]:
    """Return the two names of each entity of a part, by its number."""
    first = sum(PARTS[other] for other in itertools.takewhile(lambda other: other != part, PARTS))
    return dict(enumerate(_entities(seed, languages)[first : first + PARTS[part]], start=first))


def misread(name: str, chance: float, rng: np.random.Generator) -> str:
    """Return a name with mistakes: of the letters so many are misread, six in ten as one that looks alike, two lost, two doubled."""
    found = []
    for letter in name:
        kind = rng.random() / chance if chance else 1.0
        if kind >= 1 or letter == " ":
            found.append(letter)
        elif kind < 0.6:
            alike = next((letters for letters in LOOK_ALIKES if letter in letters), "eaionrst").replace(letter, "")
            found.append(alike[rng.integers(len(alike))])
        elif kind < 0.8:
            found.append(letter * 2)
    return "".join(found).strip()


def print_name(name: str, face: str, rng: np.random.Generator) -> UInt8[np.ndarray, "side side 3"]:
    """Return a name as black ink on paper: one word a line, as large as fits, lines from the top or turned by a quarter, blurred, with specks."""
    size = 20
    lines = "\n".join(name.split(" "))
    canvas = Image.new("L", (SIDE, SIDE), int(rng.integers(215, 256)))
    draw = ImageDraw.Draw(canvas)
    while size > 6 and max(draw.multiline_textbbox((0, 0), lines, typeface(face, size), spacing=1)[2:]) > SIDE - 4:
        size -= 1
    draw.multiline_text((2, 2 + int(rng.integers(6))), lines, int(rng.integers(0, 60)), typeface(face, size), spacing=1)
    turned = canvas.rotate(90) if rng.random() < 0.25 else canvas
    pixels = np.asarray(turned.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.7))), np.float64)
    pixels = np.where(rng.random(pixels.shape) < 0.01, 60, pixels) + rng.normal(0, 6, pixels.shape)
    return np.repeat(pixels.clip(0, 255).astype(np.uint8)[:, :, None], 3, 2)


def edit_similarity(query: str, others: Sequence[str]) -> Float64[np.ndarray, " n"]:
    """Return 1 - Levenshtein distance / length of the longer, of a string and each of some others; 1 for equal ones, 0 for nothing in common.

    Source: Levenshtein 1966; Wagner and Fischer 1974.
    """
    width = max(map(len, others))
    letters = np.array([[ord(c) for c in other.ljust(width, "\0")] for other in others])
    row = np.tile(np.arange(width + 1), (len(others), 1))
    for number, letter in enumerate(query, start=1):
        replaced = row[:, :-1] + (letters != ord(letter))
        above, row = row, np.empty_like(row)
        row[:, 0] = number
        for column in range(1, width + 1):
            row[:, column] = np.minimum(np.minimum(above[:, column], row[:, column - 1]) + 1, replaced[:, column - 1])
    length = np.array([len(other) for other in others])
    return 1 - row[np.arange(len(others)), length] / np.maximum(length, max(1, len(query)))  # type: ignore[no-any-return]


def shuffled_entities(records: Listed, seed: int) -> Listed:
    """Return the records with the entities of others; each entity keeps its number of records."""
    groups = [sample.group for sample in records.samples]
    drawn = np.random.default_rng(seed).permutation(len(groups)).tolist()
    return Listed([replace(s, group=groups[row]) for s, row in zip(records.samples, drawn, strict=True)], records.name)


@lru_cache(maxsize=4)
def _entities(seed: int, languages: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return the two names of each entity, of one emoji in two languages; no name twice."""
    rng, taken, found = np.random.default_rng(seed), set[str](), []
    everything = list(emoji_names().values())
    for place in rng.permutation(len(everything)).tolist():
        names = {everything[place][one].lower() for one in languages if one in everything[place]}
        usable = sorted(
            name for name in names - taken if 4 <= len(name) <= 24 and len(name.split(" ")) <= 3 and _plain(name)
        )
        if len(usable) >= 2:
            first, second = rng.choice(len(usable), 2, replace=False)
            found.append((usable[first], usable[second]))
            taken |= {usable[first], usable[second]}
    assert len(found) >= sum(PARTS.values()), len(found)
    return tuple(found)


def _plain(name: str) -> bool:
    return all(letter.isalpha() or letter == " " for letter in name)


@lru_cache(maxsize=256)
def typeface(face: str, size: int) -> ImageFont.FreeTypeFont:
    """Return one of `FACES` at a size in pixels.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    folder = Path(require("matplotlib", "plot").get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"{face}.ttf"), size)
