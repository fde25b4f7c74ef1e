"""Text that stands in a picture, read by RapidOCR (extra `ocr`); its models are part of its package."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from diptych.errors import require

Reader: TypeAlias = Callable[[Image.Image], str]
"""Returns the text in a picture; an empty string where it finds none."""

_STRIP = 4


def read_lines(image: Image.Image) -> tuple[str, ...]:
    """Return the lines of text that are found in a picture; none where there are none.

    Raises:
        MissingExtraError: If RapidOCR is not installed.
    """
    return tuple(_engine()(_pixels(_padded(image))).txts or ())


def read_line(image: Image.Image) -> str:
    """Return what a crop of one line says; several times faster than looking for lines first.

    Raises:
        MissingExtraError: If RapidOCR is not installed.
    """
    return " ".join(_engine()(_pixels(image), use_det=False, use_cls=False).txts or ()).strip()


def read_text(image: Image.Image) -> str:
    """Return what a picture says, line after line. In a crop of one line there may be none to be found; then all of it is read as one.

    Raises:
        MissingExtraError: If RapidOCR is not installed.
    """
    return " ".join(read_lines(image)).strip() or read_line(image)


def _pixels(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Return the pixels as OpenCV has them: blue first."""
    return np.asarray(image.convert("RGB"))[:, :, ::-1]


def _padded(image: Image.Image) -> Image.Image:
    """Return an image whose long side is at most four times the short one, white where there was nothing.

    RapidOCR scales the short side to 736 pixels, which a strip of 3 x 900 would need gigabytes for.
    """
    least = -(-max(image.size) // _STRIP)
    if min(image.size) >= least:
        return image
    canvas = Image.new("RGB", (max(image.width, least), max(image.height, least)), "white")
    canvas.paste(image)
    return canvas


@lru_cache(maxsize=1)
def _engine() -> Any:
    quiet = {"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": 1}  # one process per core
    return require("rapidocr", "ocr").RapidOCR(params=quiet)
