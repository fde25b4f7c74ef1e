"""Captions that mostly repeat what is written in the image: from such pairs a model learns to read and not to see.

share = pieces of the caption that also stand in what was read / pieces of the caption, in [0, 1]

A piece is a run of three letters or digits; case, spaces and punctuation do not count, so words that the reader joined or cut, the order of lines and
scripts without spaces do no harm. One misread letter costs three pieces. Three letters are also shared by chance, the more the longer the text in the
image is.

Relative: Lin et al. 2024, "Parrot Captions Teach CLIP to Spot Text", section 3, counts whole words.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

from diptych.curate.minhash import folded_words
from diptych.curate.pictures import images_of_rows, look, with_faults
from diptych.curate.reasons import kept, with_column, with_reason
from diptych.data.ocr import Reader, read_lines
from diptych.errors import ConfigError
from diptych.verbs import AbstractCurator

WRITTEN = "caption is written in the image"
"""The reason. The column `written` says what was read; it is null where nothing was looked at."""

_PIECE = 3


@dataclass(frozen=True)
class TextInImageConfig:
    """Which captions repeat what is written.

    Attributes:
        on: Whether the step is taken; reading takes longer than all other steps together.
        share: Least share that drops a pair, in (0, 1].
    """

    on: bool = False
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"share lies in (0, 1], not at {self.share}.")


class TextInImage(AbstractCurator):
    """Drops pairs whose caption is mostly written in the image. An image with several captions is read once."""

    reads_images = True

    def __init__(self, config: TextInImageConfig = TextInImageConfig(), *, reader: Reader | None = None) -> None:
        """Make the curator.

        Args:
            config: Which captions.
            reader: Reads images; RapidOCR (extra `ocr`: Chinese and Latin script) unless given.
        """
        self.config, self.reader = config, reader or read_with_rapidocr

    def curate(self, table: pa.Table) -> pa.Table:
        """Return the table with what was read, and reasons.

        Raises:
            MissingExtraError: If RapidOCR is needed and not installed.
        """
        alive = kept(table)
        rows, which = images_of_rows(table, alive)
        found = [look(table, row, self.reader) for row in rows.tolist()]
        table = with_faults(table, alive, which, [fault for _, fault in found])
        written: list[str | None] = [None] * table.num_rows
        for row, image in zip(np.flatnonzero(alive).tolist(), which.tolist(), strict=True):
            written[row] = found[image][0]
        pairs = zip(table["caption"].to_pylist(), written, strict=True)
        repeats = np.array(
            [repeated_share(one or "", other or "") >= self.config.share for one, other in pairs], np.bool_
        )
        return with_column(with_reason(table, repeats, WRITTEN), "written", pa.array(written, pa.string()))


def repeated_share(caption: str, written: str) -> float:
    """Return which share of the pieces of a caption stands in what is written; 0 for a caption without letters."""
    one, other = (pieces("".join(folded_words(text))) for text in (caption, written))
    return len(one & other) / len(one) if one else 0.0


def pieces(text: str) -> set[str]:
    """Return all runs of three characters; of a shorter text the whole, of an empty one nothing."""
    return {text[i : i + _PIECE] for i in range(max(1, len(text) - _PIECE + 1))} - {""}


def read_with_rapidocr(image: Image.Image) -> str:
    """Return what RapidOCR reads in an image, one line per box.

    Raises:
        MissingExtraError: If it is not installed.
    """
    return "\n".join(read_lines(image))
