"""Names printed on a line each, worn, and read by RapidOCR: the mistakes are those of a reader that is in use.

A register holds each name as it is, beside a fresh print. Worn lines ask it whose name they bear; some bear a name that is not in it.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version

import numpy as np
from jaxtyping import Float, Int64, UInt8
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from diptych.claims.claim import Trial
from diptych.claims.names import FACES, LATIN, PARTS, RECORDS, entities, typeface
from diptych.data.ocr import read_line
from diptych.data.sources import Listed
from diptych.errors import require
from diptych.evaluation.linkage import link_scores, tune_threshold
from diptych.files import cache_folder, write_text
from diptych.types import Sample, Text

LEGIBLE, WORN = 0.8, 1.1
"""How worn lines are of which RapidOCR 3.10 misreads 5 and 27 letters of a hundred (240 training names of seed 3)."""

ABSENT = {"validation": 0, "test": 1}
"""Which of every five distractors is not in the register, but asks it; another one in each split."""


@dataclass(frozen=True)
class Lists:
    """Lines that ask, and the register that they are linked to. The group is the entity.

    Attributes:
        queries: Worn lines with what the reader made of them; without a text where it read nothing.
        references: Fresh prints with the true names, one per entity.
    """

    queries: Listed
    references: Listed


@lru_cache(maxsize=16)
def linked_lists(split: str, wear: float, *, seed: int = 0) -> Lists:
    """Return the lines of the entities of a split and their register; beside `train`, distractors are in both.

    Args:
        split: `train`, `validation` or `test`; see `diptych.claims.names.PARTS`.
        wear: Of the queries; see `print_line`.
        seed: Of names, typefaces and wear.
    """
    named = {number: names[0] for number, names in entities(split, seed=seed, languages=LATIN).items()}
    asking = [number for number in named for _ in range(RECORDS)]
    listed = dict(named)
    if split in ABSENT:
        for number, names in entities("distractors", seed=seed, languages=LATIN).items():
            if number % 5 == ABSENT[split]:
                asking.append(number)
                named[number] = names[0]
            else:
                listed[number] = names[0]
    rng = np.random.default_rng([seed, list(PARTS).index(split), 2])
    lines = [print_line(named[number], FACES[rng.integers(len(FACES))], wear, rng) for number in asking]
    queries = [
        Sample(f"{number}-{row}", line, (Text(read),) if read else (), f"entity {number}")
        for row, (number, line, read) in enumerate(zip(asking, lines, read_once(lines), strict=True))
    ]
    references = [
        Sample(f"{number}", print_line(name, FACES[0], 0.0, rng), (Text(name),), f"entity {number}")
        for number, name in listed.items()
    ]
    return Lists(Listed(queries, f"lines:{split}"), Listed(references, f"register:{split}"))


def linked_f1(
    trial: Trial, wear: float, nearest_of: Callable[[Lists], tuple[Float[Tensor, " q"], Int64[Tensor, " q"]]]
) -> float:
    """Return F1 of the links of a split, above the score that was best for those of `validation`; precision, recall and top-1 are noted.

    Args:
        trial: Gives seed and split.
        wear: Of the queries.
        nearest_of: Returns score and row of the reference that is nearest to each query.
    """

    def judged(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lists = linked_lists(split, wear, seed=trial.seed)
        score, rows = (part.numpy() for part in nearest_of(lists))
        queries, references = (np.array([s.group for s in part.samples]) for part in (lists.queries, lists.references))
        return score, references[rows] == queries, np.isin(queries, references)

    chosen = judged("validation")
    threshold, _ = tune_threshold(*chosen)
    scores = link_scores(*(chosen if trial.split == "validation" else judged(trial.split)), threshold)
    for name in ("precision", "recall", "top1"):
        trial.note(name, getattr(scores, name).value)
    return scores.f1.value


def print_line(name: str, face: str, wear: float, rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    """Return a name on one line in small letters, 11 to 16 pixels high.

    Args:
        name: Of letters that the typeface has.
        face: One of `FACES`.
        wear: 0 is a fresh print. Blur, lost ink, specks and grain grow with it in proportion; at 1 the blur has a radius of 0.5 to 1.5 pixels,
            6 % of the ink is lost, 3 % of the paper is specks, and grain has a standard deviation of 12 levels of 255.
        rng: Of all that varies.
    """
    font = typeface(face, int(rng.integers(11, 17)))
    left, top, right, bottom = font.getbbox(name)
    paper, ink = int(rng.integers(215, 256)), int(rng.integers(0, 60))
    canvas = Image.new("L", (int(right - left) + 8, int(bottom - top) + 8), paper)
    ImageDraw.Draw(canvas).text((4 - left, 4 - top), name, ink, font)
    pixels = np.asarray(canvas.filter(ImageFilter.GaussianBlur(wear * rng.uniform(0.5, 1.5))), np.float64)
    chance = rng.random(pixels.shape)
    pixels = np.where(chance < 0.06 * wear, paper, np.where(chance > 1 - 0.03 * wear, ink, pixels))
    pixels += rng.normal(0, 12, pixels.shape) * wear
    return np.repeat(pixels.clip(0, 255).astype(np.uint8)[:, :, None], 3, 2)


def read_once(lines: Sequence[UInt8[np.ndarray, "_h _w 3"]]) -> tuple[str, ...]:
    """Return what RapidOCR reads on each line, in small letters; empty where it reads nothing.

    Readings are kept in the cache folder (`DIPTYCH_CACHE`, or ~/.cache/diptych) under a hash of the pictures and the reader's version, so that
    nothing is read twice.

    Raises:
        MissingExtraError: If RapidOCR is not installed.
    """
    require("rapidocr", "ocr")
    digest = hashlib.blake2b(version("rapidocr").encode(), digest_size=16)
    for line in lines:
        digest.update(str(line.shape).encode())
        digest.update(line.tobytes())
    kept = cache_folder() / f"readings-{digest.hexdigest()}.json"
    if not kept.exists():
        write_text(kept, json.dumps([read_line(Image.fromarray(line)).lower() for line in lines], ensure_ascii=False))
    return tuple(json.loads(kept.read_text(encoding="utf-8")))
