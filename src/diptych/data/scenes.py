"""Scenes: emoji composed on backgrounds, with captions, boxes, masks, attributes, relations, styles and minimal-change twins.

A scene is drawn in two steps. A `Plan`, made of plain values, says what is where; `render` turns it into pixels. Both follow from
(seed, split, index) alone, so any scene can be made at any time in any process. A twin is the same plan with one thing changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFilter, ImageOps

from diptych.data.openmoji import glyphs
from diptych.data.sources import AbstractSource
from diptych.errors import ConfigError, nearest
from diptych.types import Region, Sample, Text

NOUNS = (
    "cat dog horse cow pig rabbit mouse bear panda tiger lion monkey chicken penguin bird eagle duck owl frog turtle snake whale dolphin "
    "fish octopus snail butterfly ant spider rose tulip sunflower cactus mushroom bus taxi bicycle motorcycle train airplane rocket "
    "helicopter sailboat ship house castle tent umbrella key bell guitar violin drum trumpet camera candle chair bed door ladder hammer "
    "pencil crown ring dress pear banana lemon strawberry watermelon peach pineapple carrot bread pizza hamburger cookie egg star sun "
    "cloud tractor fire anchor balloon kite"
).split()
"""Emoji whose whole name is one common word and whose drawings are not all black, so that a tint shows."""

TINTS = {
    "red": (214, 40, 40),
    "green": (46, 139, 62),
    "blue": (44, 92, 206),
    "yellow": (235, 190, 20),
    "purple": (128, 60, 170),
    "orange": (240, 120, 20),
}
NUMBERS = ("zero", "one", "two", "three", "four")
SIZES = {"small": 0.62, "": 0.9, "large": 1.15}
ANGLES = {"": 0, "tilted": 40, "upside-down": 180}
STYLES = ("colour", "sketch", "silhouette", "faded")
SPLITS = ("train", "validation", "test")
MOST_PLACES = 9
"""Of a scene's grid, three by three."""
_TRIES = 10_000
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class SceneConfig:
    """What scenes are made of.

    Attributes:
        size: Side of the image, pixels.
        things: Least and most kinds of object in a scene.
        copies: Most copies of one kind.
        nouns: How many of `NOUNS` are used, from the first.
        tint_rate: Probability that a kind has a colour of its own.
        size_rate: Probability that it is small or large.
        rotation_rate: Probability that it is tilted or upside-down.
        backgrounds: Drawn from these.
        styles: Drawn from these; the sample's domain. Only `colour` and `faded` show tints.
        held_out: Share of noun pairs that never meet in `train` and always do in `test`; 0 for none.
        hard_negatives: Add the twin's caption as a text with that role.
    """

    size: int = 64
    things: tuple[int, int] = (1, 3)
    copies: int = 2
    nouns: int = 24
    tint_rate: float = 0.5
    size_rate: float = 0.25
    rotation_rate: float = 0.15
    backgrounds: tuple[Literal["plain", "gradient", "noise", "stripes"], ...] = (
        "plain",
        "gradient",
        "noise",
        "stripes",
    )
    styles: tuple[Literal["colour", "sketch", "silhouette", "faded"], ...] = ("colour",)
    held_out: float = 0.0
    hard_negatives: bool = False

    def __post_init__(self) -> None:
        least, most = self.things
        rates = {name: getattr(self, name) for name in ("tint_rate", "size_rate", "rotation_rate", "held_out")}
        wrong = [f"{name} must be in [0, 1], not {rate}" for name, rate in rates.items() if not 0 <= rate <= 1]
        if self.size < 16:
            wrong.append(f"size must be at least 16 pixels, not {self.size}")
        if not 1 <= least <= most:
            wrong.append(f"things must be two numbers with 1 <= least <= most, not {self.things}")
        if not 1 <= self.copies < len(NUMBERS):
            wrong.append(f"copies must be from 1 to {len(NUMBERS) - 1}, not {self.copies}")
        if most * self.copies > MOST_PLACES:
            wrong.append(f"{most} things of {self.copies} copies do not fit: a scene has {MOST_PLACES} places")
        if not most < self.nouns <= len(NOUNS):
            wrong.append(f"nouns must be more than things and at most {len(NOUNS)}, not {self.nouns}")
        wrong += [f"{name} must name at least one" for name in ("backgrounds", "styles") if not getattr(self, name)]
        if wrong:
            raise ConfigError(f"Scenes cannot be drawn: {'; '.join(wrong)}.")


@dataclass(frozen=True)
class Thing:
    """One kind of object, in one or more copies.

    Attributes:
        noun: What it is.
        tint: Key of `TINTS`, or empty.
        size: Key of `SIZES`.
        rotation: Key of `ANGLES`.
        centres: Where each copy is, as shares of the side, (x, y).
    """

    noun: str
    tint: str
    size: str
    rotation: str
    centres: tuple[tuple[float, float], ...]

    def phrase(self, *, tinted: bool = True, short: bool = False) -> str:
        """Return words such as `two small red cats`."""
        adjectives = [] if short else [self.rotation, self.size, self.tint if tinted else ""]
        noun = self.noun if len(self.centres) == 1 else plural(self.noun)
        described = " ".join(word for word in (*adjectives, noun) if word)
        if len(self.centres) > 1:
            return f"{NUMBERS[len(self.centres)]} {described}"
        return f"{'an' if described[0] in 'aeiou' else 'a'} {described}"


@dataclass(frozen=True)
class Plan:
    """A whole scene in words and numbers.

    Attributes:
        things: In drawing order; later ones lie on top.
        background: Kind of background.
        shade: Its RGB colour.
        style: How everything is drawn.
        noise: Seed of the background's texture.
        cell: Room for one copy, as a share of the side.
    """

    things: tuple[Thing, ...]
    background: str
    shade: tuple[int, int, int]
    style: str
    noise: int
    cell: float

    @property
    def tinted(self) -> bool:
        """Return whether the style shows colours."""
        return self.style in ("colour", "faded")

    def captions(self) -> tuple[str, ...]:
        """Return a full caption (with the relation, if there is one), a plain list, and a short list."""
        phrases = [thing.phrase(tinted=self.tinted) for thing in self.things]
        plain = join(phrases)
        found = relation(self)
        full = plain if found is None else join([f"{phrases[0]} {found} {phrases[1]}", *phrases[2:]])
        return full, plain, join([thing.phrase(short=True) for thing in self.things])


class Scenes(AbstractSource):
    """Scenes made on demand."""

    def __init__(self, split: str, count: int, seed: int, config: SceneConfig) -> None:
        self.name = f"scenes:{split}"
        self.notes = ("Scenes composed from OpenMoji drawings (CC BY-SA 4.0).",)
        self.split, self.count, self.seed, self.config = split, count, seed, config

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return self._sample(
            self.plan(index), f"{self.split}-{self.seed}-{index}", f"twin-{self.split}-{self.seed}-{index}", index
        )

    def texts(self, index: int) -> tuple[Text, ...]:
        """Return the captions, the full one first."""
        return self._texts(self.plan(index), index)

    def twin(self, index: int) -> Sample:
        """Return the scene that differs from scene `index` in exactly one factor."""
        plan, _ = self.twin_plan(index)
        return self._sample(plan, f"twin-{self.split}-{self.seed}-{index}", f"{self.split}-{self.seed}-{index}", None)

    def ground(self, index: int) -> Sample:
        """Return scene `index` without its things; all of these are called `background`."""
        plan = replace(self.plan(index), things=())
        pixels, mask = render(plan, self.config.size)
        key = f"ground-{self.split}-{self.seed}-{index}"
        return Sample(
            key, pixels, (Text("background", "caption", "en"),), group="background", domain=plan.style, mask=mask
        )

    def plan(self, index: int) -> Plan:
        """Return what scene `index` shows."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        return draw_plan(self._rng(index, 0), self.config, self.split)

    def twin_plan(self, index: int) -> tuple[Plan, str]:
        """Return the changed plan and the factor that was changed: noun, tint, count, or relation."""
        return change_one(self.plan(index), self._rng(index, 1), self.config)

    def _rng(self, index: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(self.split), index, stream])

    def _texts(self, plan: Plan, index: int | None) -> tuple[Text, ...]:
        texts = tuple(Text(caption, "caption", "en") for caption in dict.fromkeys(plan.captions()))
        if index is None or not self.config.hard_negatives:
            return texts
        return (*texts, Text(self.twin_plan(index)[0].captions()[0], "hard_negative", "en"))

    def _sample(self, plan: Plan, key: str, twin: str, index: int | None) -> Sample:
        pixels, mask = render(plan, self.config.size)
        copies = [thing for thing in plan.things for _ in thing.centres]
        regions = tuple(
            Region(
                box_of(mask == number),
                replace(thing, centres=thing.centres[:1]).phrase(tinted=plan.tinted),
                attributes(thing),
            )
            for number, thing in enumerate(copies, 1)
        )
        found = relation(plan)
        return Sample(
            key,
            pixels,
            self._texts(plan, index),
            group=key,
            domain=plan.style,
            regions=regions,
            mask=mask,
            relations=() if found is None else ((0, found, 1), (1, _OPPOSITE[found], 0)),
            twin=twin,
        )


def scenes(split: str = "train", *, count: int = 2000, seed: int = 0, config: SceneConfig = SceneConfig()) -> Scenes:
    """Return scenes of a split; scenes of different splits are drawn from different random streams.

    Args:
        split: train, validation or test.
        count: How many.
        seed: Another seed gives other scenes.
        config: What they are made of.
    """
    if split not in SPLITS:
        raise ConfigError(f"Scenes have no split {split!r}. {nearest(split, SPLITS)}")
    return Scenes(split, count, seed, config)


@lru_cache(maxsize=8192)
def held_out_pair(first: str, second: str, share: float) -> bool:
    """Return whether two nouns are kept apart in training; the same in every process."""
    if share == 0:
        return False
    a, b = sorted((NOUNS.index(first), NOUNS.index(second)))
    return bool(np.random.default_rng([a, b]).random() < share)


def shows_held_out(nouns: Sequence[str], share: float) -> bool:
    """Return whether any two of the nouns are kept apart in training."""
    return any(held_out_pair(a, b, share) for i, a in enumerate(nouns) for b in nouns[:i])


def draw_plan(rng: np.random.Generator, config: SceneConfig, split: str) -> Plan:
    """Return a random plan; with `held_out`, train never shows a held-out pair of nouns and test always does.

    Raises:
        ConfigError: If `held_out` leaves no such plan to draw.
    """
    for _ in range(_TRIES):
        kinds = int(rng.integers(config.things[0], config.things[1] + 1))
        if split == "test" and config.held_out > 0:
            kinds = max(2, kinds)
        nouns = [NOUNS[i] for i in rng.choice(config.nouns, size=kinds, replace=False)]
        if config.held_out == 0 or shows_held_out(nouns, config.held_out) == (split == "test"):
            break
    else:
        raise ConfigError(
            f"No scene for {split} was found in {_TRIES:,} draws: held_out {config.held_out} of the pairs of {config.nouns} nouns leaves too few. "
            "Change held_out, or raise nouns."
        )
    copies = [1 + int(rng.integers(config.copies)) if rng.random() < 0.3 else 1 for _ in nouns]
    centres = draw_centres(rng, sum(copies))
    things = []
    for noun, number in zip(nouns, copies, strict=True):
        things.append(
            Thing(
                noun,
                tint=str(rng.choice(list(TINTS))) if rng.random() < config.tint_rate else "",
                size=str(rng.choice(["small", "large"])) if rng.random() < config.size_rate else "",
                rotation=str(rng.choice(["tilted", "upside-down"])) if rng.random() < config.rotation_rate else "",
                centres=tuple(centres[:number]),
            )
        )
        centres = centres[number:]
    shade = rng.integers(190, 256, size=3)
    return Plan(
        tuple(things),
        background=str(rng.choice(list(config.backgrounds))),
        shade=(int(shade[0]), int(shade[1]), int(shade[2])),
        style=str(rng.choice(list(config.styles))),
        noise=int(rng.integers(2**31)),
        cell=1 / grid_side(sum(copies)),
    )


def grid_side(copies: int) -> int:
    """Return how many cells the grid of places has along a side."""
    return 2 if copies <= 3 else 3


def draw_centres(rng: np.random.Generator, count: int) -> list[tuple[float, float]]:
    """Return places on a jittered 2 x 2 or 3 x 3 grid, so that no copy hides much of another."""
    side = grid_side(count)
    cells = rng.choice(side * side, size=count, replace=False)
    shift = rng.uniform(-0.06, 0.06, size=(count, 2))
    return [
        ((cell % side + 0.5) / side + float(dx), (cell // side + 0.5) / side + float(dy))
        for cell, (dx, dy) in zip(cells.tolist(), shift, strict=True)
    ]


def relation(plan: Plan) -> str | None:
    """Return how the first thing lies to the second, if both are single and clearly apart along one axis."""
    if len(plan.things) < 2 or any(len(thing.centres) > 1 for thing in plan.things[:2]):
        return None
    (x0, y0), (x1, y1) = plan.things[0].centres[0], plan.things[1].centres[0]
    dx, dy = x0 - x1, y0 - y1
    if abs(abs(dx) - abs(dy)) < 0.15:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def change_one(plan: Plan, rng: np.random.Generator, config: SceneConfig) -> tuple[Plan, str]:
    """Return the plan with one factor of one thing changed, and the factor's name.

    A new noun neither brings a held-out pair into a scene without one nor takes the only one away.
    """
    others = [other_nouns(plan, i, config) for i in range(len(plan.things))]
    changeable = [i for i, nouns in enumerate(others) if nouns]
    factors = ["noun"] if changeable else []
    if plan.tinted:
        factors.append("tint")
    if relation(plan) is not None:
        factors.append("relation")
    multiple = [i for i, thing in enumerate(plan.things) if len(thing.centres) > 1]
    if multiple:
        factors.append("count")
    factor, things = str(rng.choice(factors)), list(plan.things)
    places = {"count": multiple[:1], "noun": changeable}.get(factor, range(len(things)))
    place = places[int(rng.integers(len(places)))]
    thing = things[place]
    if factor == "noun":
        things[place] = replace(thing, noun=str(rng.choice(others[place])))
    elif factor == "tint":
        things[place] = replace(thing, tint=str(rng.choice([tint for tint in TINTS if tint != thing.tint])))
    elif factor == "count":
        things[place] = replace(thing, centres=thing.centres[:-1])
    else:
        first, second = things[:2]
        things[:2] = [replace(first, centres=second.centres), replace(second, centres=first.centres)]
    return replace(plan, things=tuple(things)), factor


def other_nouns(plan: Plan, place: int, config: SceneConfig) -> list[str]:
    """Return the nouns that the thing at `place` could have instead, the scene staying one of its split."""
    nouns = [thing.noun for thing in plan.things]
    rest, held = nouns[:place] + nouns[place + 1 :], shows_held_out(nouns, config.held_out)
    return [
        noun
        for noun in NOUNS[: config.nouns]
        if noun not in nouns and shows_held_out([*rest, noun], config.held_out) == held
    ]


def render(plan: Plan, size: int) -> tuple[UInt8[np.ndarray, "size size 3"], UInt8[np.ndarray, "size size"]]:
    """Return pixels and instance ids (0 background, i + 1 for copy i in drawing order)."""
    canvas = Image.fromarray(draw_background(plan, size))
    mask = np.zeros((size, size), dtype=np.uint8)
    number = 0
    for thing in plan.things:
        sprite = draw_thing(
            thing.noun,
            thing.tint,
            max(6, round(size * plan.cell * SIZES[thing.size])),
            ANGLES[thing.rotation],
            plan.style,
        )
        for x, y in thing.centres:
            number += 1
            left = min(max(0, round(x * size - sprite.width / 2)), size - sprite.width)
            top = min(max(0, round(y * size - sprite.height / 2)), size - sprite.height)
            canvas.paste(sprite, (left, top), sprite)
            alpha = np.asarray(sprite)[..., 3]
            visible = alpha >= min(128, alpha.max())  # thin lines drawn very small are nowhere opaque
            mask[top : top + sprite.height, left : left + sprite.width][visible] = number
    return np.asarray(canvas), mask


def draw_background(plan: Plan, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Return the background's pixels."""
    shade = np.array(plan.shade, dtype=np.float64)
    if plan.style in ("sketch", "silhouette"):
        shade[:] = 245
    field: np.ndarray = np.zeros((size, size))
    rng = np.random.default_rng(plan.noise)
    if plan.background == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        rows, columns = np.mgrid[0:size, 0:size] / size - 0.5
        field = (np.cos(angle) * columns + np.sin(angle) * rows) * 60
    elif plan.background == "noise":
        field = rng.normal(0, 10, (size, size))
    elif plan.background == "stripes":
        width = int(rng.integers(3, 8))
        field = np.where((np.arange(size) // width) % 2, 8, -8)[:, None] * np.ones((1, size))
    return np.asarray(np.clip(shade + field[..., None], 0, 255), dtype=np.uint8)


@lru_cache(maxsize=8192)
def draw_thing(noun: str, tint: str, side: int, angle: int, style: str) -> Image.Image:
    """Return one object with transparency, drawn in a style."""
    image = Image.fromarray(np.ascontiguousarray(glyphs(64).pixels[_rows()[noun]]))
    image = image.crop(image.getbbox()).rotate(angle, Image.Resampling.BICUBIC, expand=True)
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    if image.width < side and image.height < side:
        image = ImageOps.contain(image, (side, side), Image.Resampling.BICUBIC)
    alpha, gray = image.getchannel("A"), ImageOps.grayscale(image.convert("RGB"))
    if style == "silhouette":
        colour = Image.new("RGB", image.size, (25, 25, 25))
    elif style == "sketch":
        over = Image.new("L", image.size, 255)
        over.paste(gray, mask=alpha)
        colour = ImageOps.invert(over.filter(ImageFilter.FIND_EDGES)).convert("RGB")
    elif tint:
        colour = ImageOps.colorize(gray, (0, 0, 0), (255, 255, 255), mid=TINTS[tint])
    else:
        colour = image.convert("RGB")
    if style == "faded":
        colour = Image.blend(colour, Image.new("RGB", image.size, (200, 200, 200)), 0.5)
    colour.putalpha(alpha)
    return colour


@lru_cache(maxsize=1)
def _rows() -> dict[str, int]:
    """Return the row of each noun among the glyphs."""
    return {names["en"].lower(): row for row, names in enumerate(glyphs(64).names)}


def box_of(visible: np.ndarray) -> tuple[float, float, float, float]:
    """Return the tight box around True pixels."""
    ys, xs = np.nonzero(visible)
    return float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)


def attributes(thing: Thing) -> dict[str, str | int | float]:
    """Return what a region records about its thing."""
    named = {"noun": thing.noun, "tint": thing.tint, "size": thing.size, "rotation": thing.rotation}
    return {**{name: value for name, value in named.items() if value}, "count": len(thing.centres)}


def join(phrases: Sequence[str]) -> str:
    """Return phrases joined as English does: a, b and c."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def plural(noun: str) -> str:
    """Return the plural of one of `NOUNS`."""
    irregular = {
        "mouse": "mice",
        "fish": "fish",
        "butterfly": "butterflies",
        "strawberry": "strawberries",
        "cherry": "cherries",
    }
    if noun in irregular:
        return irregular[noun]
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"
