"""OpenMoji: about 3,940 drawn emoji with names in thirteen languages, from two pip packages and no download.

Drawings: OpenMoji (CC BY-SA 4.0). Names: the `emoji` package (Unicode CLDR).
"""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from diptych.data.sources import AbstractSource, Subset
from diptych.errors import require
from diptych.types import Sample, Text

LANGUAGES = ("en", "es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar")
FULLY_QUALIFIED = 2
"""The `emoji` package's status of an emoji that carries all its variation selectors."""
HELD_OUT = 500
