"""Text that stands in a picture, read by a machine (extra `ocr`)."""

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from diptych.errors import require

Reader = Callable[[Image.Image], str]
"""Returns the text in a picture; an empty string where it finds none."""


def read_text(image: Image.Image) -> str:
    """Return what RapidOCR reads in a picture, line after line; its models are part of its package.

    Lines are looked for first. In a crop of one line there may be none to be found, and then the whole crop is read as one.

    Raises:
        MissingExtraError: If RapidOCR is not installed.
    """
    pixels = np.asarray(image.convert("RGB"))[:, :, ::-1]  # it reads images as OpenCV does: blue first
    lines = _engine()(pixels).txts or _engine()(pixels, use_det=False, use_cls=False).txts or ()
    return " ".join(lines).strip()


def read_line(image: Image.Image) -> str:
    """Return what RapidOCR reads in a crop of one line; several times faster than looking for lines first.

    Raises:
        MissingExtraError: If RapidOCR is not installed.
    """
    pixels = np.asarray(image.convert("RGB"))[:, :, ::-1]
    return " ".join(_engine()(pixels, use_det=False, use_cls=False).txts or ()).strip()


@lru_cache(maxsize=1)
def _engine() -> Any:
    found = require("rapidocr", "ocr").RapidOCR()
    logging.getLogger("RapidOCR").setLevel(logging.WARNING)
    return found
