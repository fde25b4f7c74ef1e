"""Products drawn from emoji and from simple textures, half of them with one planted fault whose mask is known to the pixel.

A sample follows from (seed, split, index) alone. The twin of a faulty one is the same product without the fault.
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from diptych.data.defects import GOOD, region
from diptych.data.scenes import SPLITS, Plan, Thing, render
from diptych.data.sources import AbstractSource
from diptych.errors import ConfigError, nearest
from diptych.types import Sample, Text

OBJECTS = ("cookie", "pear", "drum", "bell", "camera", "umbrella", "house", "peach")
TEXTURES = ("carpet", "grid", "tile", "wood")
PRODUCTS = (*OBJECTS, *TEXTURES)
FAULTS = ("scratch", "hole", "blob", "swap", "stain")
AREA = (0.01, 0.04)
"""Range of the share of the image that a fault covers; a little less where it sticks out of the product."""
NORMAL_WORDS = ("normal {}", "flawless {}", "perfect {}", "{} without flaw", "{} without defect", "{} without damage")
FAULTY_WORDS = ("abnormal {}", "damaged {}", "imperfect {}", "{} with flaw", "{} with defect", "{} with damage")
_TRIES = 12


class Planted(AbstractSource):
    """Products made on demand: sample i shows product i % 12, and is faulty where i // 12 is odd."""

    def __init__(self, split: str, count: int, seed: int, size: int) -> None:
        self.name = f"planted-defects:{split}"
        self.notes = ("Products and faults drawn here, some from OpenMoji drawings (CC BY-SA 4.0).",)
        self.split, self.count, self.seed, self.size = split, count, seed, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return self._sample(index, faulty=self.fault(index) is not None)

    def twin(self, index: int) -> Sample:
        """Return the product of a sample without its fault."""
        return self._sample(index, faulty=False)

    def fault(self, index: int) -> str | None:
        """Return the name of the fault of a sample, None for a good one."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        return str(self._rng(index, 1).choice(FAULTS)) if index // len(PRODUCTS) % 2 else None

    def texts(self, index: int) -> tuple[Text, ...]:
        """Return one caption that tells product and state, not where the fault is."""
        return self._texts(index, self.fault(index))

    def _texts(self, index: int, fault: str | None) -> tuple[Text, ...]:
        states = NORMAL_WORDS if fault is None else (*FAULTY_WORDS, f"{{}} with a {fault}")
        words = str(self._rng(index, 2).choice(states)).format(PRODUCTS[index % len(PRODUCTS)])
        return (Text(f"a photo of {'an' if words[0] in 'aeiou' else 'a'} {words}", "caption", "en"),)

    def _rng(self, index: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(self.split), index, stream])

    def _sample(self, index: int, *, faulty: bool) -> Sample:
        product, fault = PRODUCTS[index % len(PRODUCTS)], self.fault(index)
        pixels, places = draw_product(product, self._rng(index, 0), self.size)
        mask, label, key = np.zeros(places.shape, dtype=np.uint8), GOOD, f"{self.split}-{self.seed}-{index}"
        if faulty and fault is not None:
            pixels, marked = plant(pixels, places, fault, self._rng(index, 3))
            mask[marked], label = 1, fault
        else:
            key = f"twin-{key}" if fault is not None else key
        other = f"twin-{self.split}-{self.seed}-{index}" if label != GOOD else f"{self.split}-{self.seed}-{index}"
        return Sample(
            key,
            pixels,
            self._texts(index, None if label == GOOD else fault),
            group=key,
            label=label,
            domain=product,
            regions=(region(mask > 0, label),) if mask.any() else (),
            mask=mask,
            twin=other if other != key else None,
        )


def planted_defects(split: str = "test", *, count: int = 480, seed: int = 0, size: int = 64) -> Planted:
    """Return drawn products; half of each block of 24 samples is faulty.

    Args:
        split: train, validation or test, drawn from different random streams.
        count: How many.
        seed: Another seed gives other drawings.
        size: Side of the image, pixels.

    Raises:
        ConfigError: If there is no such split.
    """
    if split not in SPLITS:
        raise ConfigError(f"Planted defects have no split {split!r}. {nearest(split, SPLITS)}")
    return Planted(split, count, seed, size)


def kind_of(product: str) -> Literal["object", "texture"]:
    """Return whether a product is an object in front of something or fills the image."""
    return "texture" if product in TEXTURES else "object"


def draw_product(product: str, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels uint8 [h, w, 3] and where the product is, bool [h, w]."""
    shade = tuple(int(level) for level in rng.integers(190, 256, 3))
    if product in OBJECTS:
        x, y = rng.uniform(0.46, 0.54, 2).tolist()
        turned = str(rng.choice(["", "", "tilted"]))
        thing = Thing(product, "", "", turned, ((x, y),))
        background = str(rng.choice(["plain", "gradient", "noise"]))
        plan = Plan((thing,), background, shade, "colour", int(rng.integers(2**31)), cell=rng.uniform(0.8, 0.95))  # type: ignore[arg-type]
        pixels, mask = render(plan, size)
        return pixels, mask > 0
    rows, columns = np.mgrid[0:size, 0:size] / size
    period, phase = rng.uniform(0.1, 0.16), rng.uniform(0, 1, 2)
    waves = [np.sin(2 * np.pi * (axis / period + shift)) for axis, shift in zip((rows, columns), phase, strict=True)]
    fields: dict[str, Callable[[], np.ndarray]] = {
        "carpet": lambda: _blurred(rng.normal(0, 1, (size, size)), size / 64) * 55,
        "grid": lambda: np.where(np.maximum(*waves) > 0.8, -90.0, 0.0),
        "tile": lambda: 35 * np.sign(waves[0] * waves[1]),
        "wood": lambda: 40 * np.sin(2 * np.pi * (rows / period + phase[0] + 0.12 * waves[1])),
    }
    tone = {"carpet": (150, 110, 90), "grid": (200, 200, 205), "tile": (150, 165, 175), "wood": (180, 130, 80)}[product]
    pixels = np.array(tone) + rng.uniform(-15, 15, 3) + fields[product]()[..., None] + rng.normal(0, 4, (size, size, 1))
    return pixels.clip(0, 255).astype(np.uint8), np.ones((size, size), dtype=bool)


def _blurred(field: np.ndarray, radius: float) -> np.ndarray:
    image = Image.fromarray(((field - field.min()) / np.ptp(field) * 255).astype(np.uint8))
    found = np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float64)
    return np.asarray((found - found.mean()) / found.std())


def plant(
    pixels: np.ndarray, places: np.ndarray, fault: str, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return an image with one fault on it, and where that is, bool [h, w].

    Args:
        pixels: uint8 [h, w, 3], of a product or of any scene.
        places: Where faults may be, bool [h, w].
        fault: One of `FAULTS`.
        rng: Draws place, size and look.
    """
    shapes = [_shape(places, fault, rng) for _ in range(_TRIES)]
    marked = max(shapes, key=lambda shape: int((shape & places).sum()) / int(shape.sum())) & places
    changed = pixels.astype(np.float64)
    if fault == "swap":
        moved = [np.roll(changed, shift, (0, 1)) for shift in rng.integers(8, min(places.shape), (_TRIES, 2)).tolist()]
        changed[marked] = max(moved, key=lambda other: float(np.abs(other - changed)[marked].sum()))[marked]
    else:
        colours = {"scratch": (235, 235, 230), "hole": (15, 12, 10), "blob": (70, 70, 80)}
        colour = np.array(colours.get(fault, rng.permutation([200.0, 60.0, 40.0])))
        share = {"stain": 0.55, "blob": 0.85}.get(fault, 1.0)
        changed[marked] = (1 - share) * changed[marked] + share * colour
    return changed.round().astype(np.uint8), marked


def _shape(places: np.ndarray, fault: str, rng: np.random.Generator) -> np.ndarray:
    """Return one shape of a fault, of a size in `AREA`, around a random place."""
    height, width = places.shape
    area, ys, xs = rng.uniform(*AREA) * places.size, *np.nonzero(places)
    chosen, angle = int(rng.integers(len(ys))), rng.uniform(0, np.pi)
    y, x, canvas = int(ys[chosen]), int(xs[chosen]), Image.new("1", (width, height))
    draw = ImageDraw.Draw(canvas)
    if fault == "scratch":
        thick = max(2, round(min(places.shape) / 40))
        dx, dy = (area / thick / 2 * part for part in (math.cos(angle), math.sin(angle)))
        draw.line((x - dx, y - dy, x + dx, y + dy), fill=1, width=thick)
    elif fault == "swap":
        half = math.sqrt(area) / 2
        draw.rectangle((x - half, y - half, x + half, y + half), fill=1)
    else:
        stretch = rng.uniform(0.7, 1.4)
        a, b = (math.sqrt(area / math.pi) * part for part in (stretch, 1 / stretch))
        draw.ellipse((x - a, y - b, x + a, y + b), fill=1)
    drawn = np.asarray(canvas).copy()
    drawn[y, x] = True
    return drawn
