"""From JPEG files to batches of 224-pixel squares: our loader, torchvision's ImageFolder, webdataset and Hugging Face datasets in a DataLoader."""

import statistics
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from PIL import Image
from torch import Tensor

from diptych.bench.process import Anchors, fresh
from diptych.bench.record import Column, Finding, Table
from diptych.bench.stream import BATCH, SEED, SIZE, loaded, measure_stream, pixels_of, square
from diptych.bench.turns import ratio
from diptych.data.loader import Loader, LoaderConfig, Position
from diptych.data.sources import open_source
from diptych.data.tokenizer import Tokenizer
from diptych.data.transforms import Augment, ImagePolicy
from diptych.errors import DiptychError

OWN = ("diptych", "diptych, scaled decoding", "torchvision ImageFolder")
ANCHORS = ("webdataset", "datasets")
REFERENCE = OWN[2]


@dataclass(frozen=True)
class Setting:
    """Sizes.

    Attributes:
        photos: JPEG files of 640 x 480 pixels.
        samples: Read per measurement of the speed.
        workers: Numbers of worker processes.
        repeats: Measurements per contender and number of workers, each in a fresh process.
    """

    photos: int = 640
    samples: int = 640
    workers: tuple[int, ...] = (0, 1, 2)
    repeats: int = 3


QUICK = Setting(photos=64, samples=64, workers=(0,), repeats=1)


def measure(setting: Setting, anchors: Anchors) -> Finding:
    """Return speed, time to the first batch, time to resume, and memory."""
    with tempfile.TemporaryDirectory() as folder, patch.dict("os.environ", DIPTYCH_CACHE=f"{folder}/cache"):
        make_photos(Path(folder), setting.photos)
        check_pixels(folder, setting.photos, anchors)
        runs: dict[tuple[str, int], list[dict[str, float]]] = {}
        for repeat in range(setting.repeats):
            for workers in setting.workers:
                for name in [*OWN, *ANCHORS][:: -1 if repeat % 2 else 1]:
                    if found := ask(name, anchors, folder, workers, setting.samples):
                        runs.setdefault((name, workers), []).append(found)
    rows = []
    for (name, workers), own in sorted(runs.items(), key=lambda item: item[0][1]):
        theirs = runs[REFERENCE, workers]
        speeds = [[run["images_per_second"] for run in side] for side in (own, theirs[: len(own)])]
        middle = {key: statistics.median(run[key] for run in own) for key in own[0]}
        rows.append({"name": name, "workers": workers, **middle, "speed": ratio(*speeds)})
    return Finding(
        f"{setting.photos:,} JPEG photos (640 x 480), shuffled, decoded, cut to {SIZE} pixels, in batches of {BATCH}. All contenders make the "
        "same pixels; that is checked first. Every measurement is a process of its own; contenders take turns.",
        setting,
        (
            Table(
                f"Medians of {setting.repeats}",
                (
                    Column("name", "loader"),
                    Column("workers", "workers", "d"),
                    Column("images_per_second", "images/s", ",.0f"),
                    Column("speed", "speed / ImageFolder"),
                    Column("first_batch_s", "first batch, s"),
                    Column("resume_s", "resume, s"),
                    Column("mb", "MB", ",.0f"),
                ),
                tuple(rows),
            ),
        ),
        notes=(
            "Resume is the time to the first batch after 10,000 samples. Ours starts at its saved position. ImageFolder and datasets have none in a "
            "plain DataLoader; they get the best case, a sampler that starts there. webdataset reads and drops the samples before it, undecoded.",
            "Scaled decoding makes random crops from a JPEG decoded near their size: an approximation that is off by default.",
            "Memory is the peak of the process and of its workers, added up; what they share is counted in each.",
        ),
    )


def check_pixels(folder: str, count: int, anchors: Anchors) -> None:
    """Raise if contenders make other pixels than ours.

    Raises:
        DiptychError: With the name of the contender.
    """
    ours = pixels_of(OPEN["diptych"], folder, count)
    others = {REFERENCE: pixels_of(OPEN[REFERENCE], folder, count)}
    for name in ANCHORS:
        if (found := anchors.ask(name, name, f"data-{name}", folder=folder, pixels=count)) is not None:
            others[name] = found
    for name, found in others.items():
        # webdataset draws shards with replacement and shuffles in a buffer: only what its squares look like can be compared.
        if not set(found) <= set(ours) or (name != "webdataset" and found != ours):
            raise DiptychError(f"{name} makes other pixels than our loader from the same photos.")


def ask(name: str, anchors: Anchors, folder: str, workers: int, samples: int) -> Any:
    """Return one measurement in a fresh process; None where the anchor is missing."""
    if name in OWN:
        return fresh(measure_own, name, folder, workers, samples)
    return anchors.ask(name, name, f"data-{name}", folder=folder, workers=workers, samples=samples)


def measure_own(name: str, folder: str, workers: int, samples: int) -> dict[str, float]:
    """Return the measurement of a contender that needs only our own dependencies; right in a fresh process only."""
    return measure_stream(OPEN[name], folder, workers, samples)


def make_photos(folder: Path, count: int) -> None:
    """Write noisy JPEG photos of 640 x 480 pixels as a folder and as a tar shard."""
    inside = folder / "photos" / "all"
    inside.mkdir(parents=True)
    grounds = [Image.effect_mandelbrot((640, 480), (-2.0 + i / 10, -1.2, 0.8, 1.2), 40) for i in range(7)]
    for number in range(count):
        ground = grounds[number % 7]
        photo = Image.merge("RGB", (ground, ground.rotate(number % 360), Image.effect_noise((640, 480), 30)))
        photo.save(inside / f"{number:06}.jpg", quality=90)
        (inside / f"{number:06}.txt").write_text(f"photo number {number}")
    with tarfile.open(folder / "photos.tar", "w") as tar:
        for path in sorted(inside.iterdir()):
            tar.add(path, path.name)


def open_ours(folder: Path, workers: int, start: int, *, scaled: bool = False) -> Iterator[Tensor]:
    """Return images of our loader."""
    view = Augment(crop_scale=(0.6, 1.0)) if scaled else Augment()
    config = LoaderConfig(BATCH, workers, views=(view,), decode="scaled" if scaled else "exact")
    tokenizer = Tokenizer.train(["photo number 1"], vocabulary=300)
    loader = Loader(open_source(str(folder / "photos.tar")), ImagePolicy(SIZE), tokenizer, config, seed=SEED)
    loader.position = Position(*divmod(start // BATCH, loader.batches_per_epoch))
    return (image for batch in loader if isinstance(image := batch.images[0], Tensor))


def open_imagefolder(folder: Path, workers: int, start: int) -> Iterator[Tensor]:
    """Return images of torchvision's ImageFolder in a DataLoader."""
    from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]

    return (images for images, _ in loaded(ImageFolder(str(folder / "photos"), square()), workers, start))


_OPENERS: tuple[Callable[[Path, int, int], Iterator[Tensor]], ...] = (
    open_ours,
    partial(open_ours, scaled=True),
    open_imagefolder,
)
OPEN = dict(zip(OWN, _OPENERS, strict=True))
