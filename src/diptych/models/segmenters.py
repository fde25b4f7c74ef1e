"""What a promptable segmenter knows of an image, behind one call, and one of our own that needs no weights: colours and places.

A segmenter is a function from an image to `Looked`. `models/sam.py` makes one of SAM.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from diptych.data.components import connected_components


@dataclass(frozen=True)
class SelfAttention:
    """How the places of a whole image attend to each other.

    Attributes:
        rows: Returns the probabilities of places `start` to `stop`, in row order; a block at a time, since all of them are heads n^2 numbers.
        value: What is attended to.
        grid: (rows, columns) of the n places.
    """

    rows: Callable[[int, int], Float[Tensor, "heads r n"]]
    value: Float[Tensor, "heads n c"]
    grid: tuple[int, int]


@dataclass(frozen=True)
class Prompts:
    """Where things may be. x, y in pixels of the image, both ends of a box inside it.

    Attributes:
        points: One in each thing.
        boxes: (x0, y0, x1, y1) around each.
        mask: Of all of them together, positive where they may be; the image in the top left corner of a square that its longer side fills.
    """

    points: Float[Tensor, "r 2"]
    boxes: Float[Tensor, "r 4"]
    mask: Float[Tensor, "side side"]


@dataclass(frozen=True)
class Masks:
    """What a segmenter answers.

    Attributes:
        logits: Of each thing, positive inside it.
        quality: What intersection over union with the truth it expects of each, in [0, 1].
    """

    logits: Float[Tensor, "r h w"]
    quality: Float[Tensor, " r"]


@dataclass(frozen=True)
class Looked:
    """An image that was looked at once.

    Attributes:
        attention: Over the whole image.
        answer: Returns masks in the image's size.
        mask_side: Side of the mask that prompts must have.
    """

    attention: SelfAttention
    answer: Callable[[Prompts], Masks]
    mask_side: int


Segmenter = Callable[[UInt8[Tensor, "3 h w"]], Looked]
"""Looks at one image in its own size."""


def inside_square(height: int, width: int, side: int) -> tuple[int, int]:
    """Return height and width of an image whose longer side is resized to `side`."""
    return max(1, int(height * side / max(height, width) + 0.5)), max(1, int(width * side / max(height, width) + 0.5))


def into_square(maps: Float[Tensor, "m h w"], side: int) -> Float[Tensor, "m side side"]:
    """Return maps resized (bilinear) to the top left corner of a square that their longer side fills, zeros elsewhere."""
    height, width = inside_square(maps.shape[1], maps.shape[2], side)
    resized = F.interpolate(maps[None], (height, width), mode="bilinear")[0]
    return F.pad(resized, (0, side - width, 0, side - height))


def out_of_square(maps: Float[Tensor, "m side side"], size: tuple[int, int]) -> Float[Tensor, "m h w"]:
    """Return what `into_square` would have made these maps of, in this size."""
    height, width = inside_square(*size, maps.shape[-1])
    return F.interpolate(maps[None, :, :height, :width], size, mode="bilinear")[0]


@dataclass(frozen=True)
class Region:
    """Pixels that hang together.

    Attributes:
        mask: True at them.
        point: (x, y) of the most probable one.
        box: (x0, y0, x1, y1) around it, both ends in it.
    """

    mask: Bool[Tensor, "h w"]
    point: tuple[int, int]
    box: tuple[int, int, int, int]


def regions_of(mask: Bool[Tensor, "h w"], probability: Float[Tensor, "h w"], *, least_area: int) -> list[Region]:
    """Return the connected parts of a mask (diagonal neighbours count) that are large enough, in the order of their first pixels."""
    component = torch.from_numpy(connected_components(mask.cpu().numpy())).to(mask.device)
    sizes = component.flatten().bincount()
    numbers = [number for number in component[mask].unique().tolist() if sizes[number] >= least_area]
    found = []
    for number in sorted(numbers, key=lambda number: int((component == number).flatten().nonzero()[0])):
        part = component == number
        ys, xs = part.nonzero(as_tuple=True)
        y, x = divmod(int(probability.masked_fill(~part, -1).argmax()), part.shape[1])
        found.append(Region(part, (x, y), (int(xs.min()), int(ys.min()), int(xs.max()), int(ys.max()))))
    return found


@dataclass(frozen=True)
class ColourSegmenter:
    """Stands in for SAM where there are no weights: things are places of like colour.

    Places attend to those of like colour nearby, A_ij = softmax_j(-|colour_i - colour_j|^2 / colour_width^2 - |xy_i - xy_j|^2 / reach^2);
    their values are their colours less the image's mean. Masks compare the histogram of colours where the prompt's mask is positive inside
    the box with that of everything else, keep the box and what hangs together with the point, and are trusted as far as they stay
    the same when the boundary moves by `stability`, as SAM's stability score has it.

    Attributes:
        cells: Along the longer side; SAM has 64.
        colour_width: In units of the whole range of a channel.
        reach: In units of the longer side.
        bins: Of each channel of the histograms.
        stability: Of the logits, in nats.
    """

    cells: int = 64
    colour_width: float = 0.1
    reach: float = 0.15
    bins: int = 8
    stability: float = 0.5

    def __call__(self, image: UInt8[Tensor, "3 h w"]) -> Looked:
        """Return how places of the image attend to each other, and masks for prompts."""
        return Looked(self._attention(image), partial(self._answer, image), 256)

    def _attention(self, image: Tensor) -> SelfAttention:
        grid = inside_square(image.shape[1], image.shape[2], self.cells)
        small = F.interpolate(image[None].float() / 255, grid, mode="bilinear", antialias=True)[0]
        colours = small.flatten(1).T / self.colour_width
        ys, xs = torch.meshgrid(*(torch.arange(length, device=image.device) for length in grid), indexing="ij")
        places = torch.stack([ys, xs], -1).flatten(0, 1) / max(grid) / self.reach
        points = torch.cat([colours, places], 1)

        def rows(start: int, stop: int) -> Tensor:
            return (-(torch.cdist(points[start:stop], points)[None] ** 2)).softmax(-1)

        return SelfAttention(rows, (colours - colours.mean(0))[None], grid)

    def _answer(self, image: Tensor, prompts: Prompts) -> Masks:
        where = out_of_square(prompts.mask[None], tuple(image.shape[1:]))[0] > 0  # type: ignore[arg-type]
        levels = (image.long() * self.bins) // 256
        colour = (levels[0] * self.bins + levels[1]) * self.bins + levels[2]
        answers = [
            self._mask(colour, where, point.tolist(), box.tolist())
            for point, box in zip(prompts.points.round().int(), prompts.boxes.round().int(), strict=True)
        ]
        logits, quality = zip(*answers, strict=True)
        return Masks(torch.stack(logits), torch.tensor(quality, device=image.device))

    def _mask(self, colour: Tensor, where: Tensor, point: list[int], box: list[int]) -> tuple[Tensor, float]:
        (x, y), (x0, y0, x1, y1) = point, box
        inside = torch.zeros_like(where)
        inside[y0 : y1 + 1, x0 : x1 + 1] = True
        seed = where & inside
        count = self.bins**3
        own, other = (torch.bincount(colour[part], minlength=count) + 0.5 for part in (seed, ~seed))
        ratio = (own / own.sum()).log() - (other / other.sum()).log()
        logits = ratio[colour].masked_fill(~inside, -10.0)
        logits[y, x] = logits[y, x].clamp(min=1.0)  # the point itself belongs to the thing
        tight, plain, wide = (_around(logits > level, y, x) for level in (self.stability, 0.0, -self.stability))
        return torch.where(plain, logits, logits.clamp(max=-1.0)), float(tight.sum() / wide.sum())


def _around(mask: Tensor, y: int, x: int) -> Tensor:
    """Return what of a mask hangs together with a place of it."""
    component = torch.from_numpy(connected_components(mask.cpu().numpy())).to(mask.device)
    return component == component[y, x]
