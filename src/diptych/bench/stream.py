"""What is measured of a stream of image batches; runs in the environments of anchors too, so it takes nothing of ours that needs more than torch."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from typing import Any

from diptych.bench.resident import resident

SIZE, BATCH, SEED, RESUME_AT = 224, 64, 0, 10_000

Open = Callable[[Path, int, int], Iterable[Any]]
"""Opens an endless stream of uint8 batches: folder of photos, worker processes, samples to pass over first."""


def measure_stream(open_stream: Open, folder: str, workers: int, samples: int) -> dict[str, float]:
    """Return speed, waiting times and memory of a stream, in this process and its workers."""
    began = time.perf_counter()
    batches = iter(open_stream(Path(folder), workers, 0))
    next(batches)
    first = time.perf_counter() - began
    began = time.perf_counter()
    seen = sum(len(images) for images in islice(batches, max(1, samples // BATCH)))
    rate = seen / (time.perf_counter() - began)
    peak = resident("VmHWM") + sum(resident("VmHWM", child.pid or "self") for child in active_children())
    del batches
    began = time.perf_counter()
    next(iter(open_stream(Path(folder), workers, RESUME_AT)))
    resumed = time.perf_counter() - began
    return {"images_per_second": rate, "first_batch_s": first, "resume_s": resumed, "mb": peak}


def pixels_of(open_stream: Open, folder: str, count: int) -> dict[str, int]:
    """Return how often each square of the first `count` occurs, by hash; equal for all streams that do the same work."""
    seen: dict[str, int] = {}
    for images in islice(open_stream(Path(folder), 0, 0), count // BATCH):
        for image in images:
            key = hashlib.blake2b(image.numpy().tobytes(), digest_size=8).hexdigest()
            seen[key] = seen.get(key, 0) + 1
    return seen


def square() -> Any:
    """Return torchvision's evaluation transform, to uint8 pixels."""
    from torchvision import transforms as t  # type: ignore[import-untyped]

    resize = t.Resize(SIZE, t.InterpolationMode.BICUBIC, antialias=True)
    return t.Compose([resize, t.CenterCrop(SIZE), t.PILToTensor()])


def order(count: int, start: int) -> list[int]:
    """Return shuffled sample numbers from a position on, enough for any measurement here."""
    import numpy as np

    epochs = [np.random.default_rng([SEED, e]).permutation(count) for e in range(2 + (start + RESUME_AT) // count)]
    return [int(number) for number in np.concatenate(epochs)[start:]]


def loaded(photos: Any, workers: int, start: int) -> Iterator[Any]:
    """Return a DataLoader over a data set that gives pixels by number, shuffled, from a position on."""
    from torch.utils.data import DataLoader

    return iter(DataLoader(photos, BATCH, sampler=order(len(photos), start), num_workers=workers))
