"""From JPEG files to batches of 224-pixel squares: ours, torchvision's ImageFolder, webdataset and Hugging Face datasets in a DataLoader.

The same photos for all, shuffled, decoded in full, and cut to the same pixels: that is checked before anything is timed. Every measurement is
a process of its own, so that memory is its own, and contenders take turns, so that a busy machine slows all of them alike. webdataset
goes to an environment beside this one. Writes benchmarks/results/data.json and data.md.

    python benchmarks/data.py [--images 2000] [--samples 2000] [--repeats 3] [--workers 0 1 2]
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import venv
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ANCHORS = Path(__file__).parents[1] / "runs" / "bench-data"
SIZE, BATCH, SEED, RESUME_AT = 224, 64, 0, 10_000
CONTENDERS = ("diptych", "diptych scaled", "torchvision", "webdataset", "datasets")
NOTES = (
    "Resume: time until the first batch after 10,000 samples. diptych starts at its saved position. ImageFolder and datasets have none in a plain "
    "DataLoader; they are given the best case, a sampler that starts there. webdataset reads and drops the samples before it, undecoded.",
    "`diptych scaled` decodes random crops near their size, an approximation that is off by default; the others decode in full.",
    "Memory is the peak of the main process, plus the largest worker; pages of the package itself are in it.",
)


def make_photos(folder: Path, count: int) -> None:
    """Write noise-textured JPEG photos of 640 x 480 pixels as a folder, a tar shard and a saved data set."""
    import datasets
    from PIL import Image

    inside = folder / "photos" / "all"
    inside.mkdir(parents=True)
    for number in range(count):
        ground = Image.effect_mandelbrot((640, 480), (-2.0 + number % 7 / 10, -1.2, 0.8, 1.2), 40)
        photo = Image.merge("RGB", (ground, ground.rotate(number % 360), Image.effect_noise((640, 480), 30)))
        photo.save(inside / f"{number:06}.jpg", quality=90)
        (inside / f"{number:06}.txt").write_text(f"photo number {number}")
    with tarfile.open(folder / "photos.tar", "w") as tar:
        for path in sorted(inside.iterdir()):
            tar.add(path, path.name)
    paths = [str(path) for path in sorted(inside.glob("*.jpg"))]
    images = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths]
    saved = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    saved.save_to_disk(str(folder / "saved"))


def square() -> Any:
    """Return torchvision's evaluation transform, to uint8 pixels."""
    from torchvision import transforms as t

    resize = t.Resize(SIZE, t.InterpolationMode.BICUBIC, antialias=True)
    return t.Compose([resize, t.CenterCrop(SIZE), t.PILToTensor()])


def order(count: int, start: int) -> list[int]:
    """Return shuffled sample numbers from a position on, enough for any measurement."""
    import numpy as np

    epochs = [np.random.default_rng([SEED, e]).permutation(count) for e in range(2 + (start + RESUME_AT) // count)]
    return [int(number) for number in np.concatenate(epochs)[start:]]


def open_ours(folder: Path, workers: int, start: int, *, scaled: bool) -> Iterator[Any]:
    """Yield images of our loader."""
    from diptych.data.loader import Loader, LoaderConfig, Position
    from diptych.data.sources import open_source
    from diptych.data.tokenizer import Tokenizer
    from diptych.data.transforms import Augment, ImagePolicy

    view = Augment(crop_scale=(0.6, 1.0)) if scaled else Augment()
    config = LoaderConfig(BATCH, workers, views=(view,), decode="scaled" if scaled else "exact")
    tokenizer = Tokenizer.train(["photo number 1"], vocabulary=300)
    loader = Loader(open_source(folder / "photos.tar"), ImagePolicy(SIZE), tokenizer, config, seed=SEED)
    loader.position = Position(*divmod(start // BATCH, loader.batches_per_epoch))
    return (batch.images[0] for batch in loader)


def open_torchvision(folder: Path, workers: int, start: int) -> Iterator[Any]:
    """Yield images of ImageFolder."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    photos = ImageFolder(str(folder / "photos"), square())
    loader = DataLoader(photos, BATCH, sampler=order(len(photos), start), num_workers=workers)
    return (images for images, _ in loader)


def open_datasets(folder: Path, workers: int, start: int) -> Iterator[Any]:
    """Yield images of a saved data set."""
    import datasets
    from torch.utils.data import DataLoader

    transform = square()
    photos = datasets.load_from_disk(str(folder / "saved"))
    photos = photos.with_transform(
        lambda rows: {"pixels": [transform(image.convert("RGB")) for image in rows["image"]]}
    )
    loader = DataLoader(photos, BATCH, sampler=order(len(photos), start), num_workers=workers)
    return (batch["pixels"] for batch in loader)


def open_webdataset(folder: Path, workers: int, start: int) -> Iterator[Any]:
    """Yield images of a tar shard, shuffled in a buffer; each worker reads all of it, since there is one shard."""
    import webdataset as wds
    from torch.utils.data import DataLoader

    transform = square()
    photos = wds.WebDataset(str(folder / "photos.tar"), shardshuffle=False, resampled=True)  # without end
    photos = photos.compose(lambda samples: islice(samples, start // max(1, workers), None))
    photos = photos.shuffle(500).decode("pil").to_tuple("jpg").map_tuple(transform)
    return (images for (images,) in DataLoader(photos, BATCH, num_workers=workers))


OPEN = {
    "diptych": lambda *given: open_ours(*given, scaled=False),
    "diptych scaled": lambda *given: open_ours(*given, scaled=True),
    "torchvision": open_torchvision,
    "datasets": open_datasets,
    "webdataset": open_webdataset,
}


def measure(contender: str, folder: Path, workers: int, samples: int) -> dict[str, float]:
    """Return what one contender does, in this process."""
    import torch

    began = time.perf_counter()
    batches = OPEN[contender](folder, workers, 0)
    next(batches)
    first = time.perf_counter() - began
    began = time.perf_counter()
    seen = sum(len(images) for images in islice(batches, max(1, samples // BATCH)))
    rate = seen / (time.perf_counter() - began)
    del batches
    began = time.perf_counter()
    next(OPEN[contender](folder, workers, RESUME_AT))
    resumed = time.perf_counter() - began
    peak = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "images_per_second": rate,
        "first_batch_s": first,
        "resume_s": resumed,
        "rss_mb": sum(peak),
        "threads": torch.get_num_threads(),
    }


def pixels_of_all(contender: str, folder: Path, count: int) -> dict[str, int]:
    """Return how often each square of one pass occurs, by hash; equal for all contenders that do the same work."""
    import hashlib

    seen: dict[str, int] = {}
    for images in islice(OPEN[contender](folder, 0, 0), count // BATCH):
        for image in images:
            key = hashlib.blake2b(image.numpy().tobytes(), digest_size=8).hexdigest()
            seen[key] = seen.get(key, 0) + 1
    return seen


def anchors() -> Path:
    """Return a Python with webdataset: this environment's packages and, in a place of its own, that one."""
    python = ANCHORS / "bin" / "python"
    if not (ANCHORS / ".done").exists():
        venv.create(ANCHORS, with_pip=True, clear=True)
        site = subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        subprocess.check_call([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "webdataset"])
        Path(site.strip(), "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (ANCHORS / ".done").touch()
    return python


def child(python: Path | str, *arguments: object) -> Any:
    """Return the JSON that this program prints when started with these arguments."""
    command = [str(python), __file__, *map(str, arguments)]
    found = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "DIPTYCH_CACHE": str(ANCHORS / "cache")}
    )
    if found.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{found.stderr[-2000:]}")
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    """Measure everything, or (`--one`) one contender for the process that asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=4, metavar=("CONTENDER", "FOLDER", "WORKERS", "SAMPLES"))
    parser.add_argument("--pixels", nargs=3, metavar=("CONTENDER", "FOLDER", "IMAGES"))
    given = parser.parse_args()
    if given.one:
        name, folder, workers, samples = given.one
        print(json.dumps(measure(name, Path(folder), int(workers), int(samples))))
        return
    if given.pixels:
        name, folder, count = given.pixels
        print(json.dumps(pixels_of_all(name, Path(folder), int(count))))
        return
    pythons = dict.fromkeys(CONTENDERS, sys.executable) | {"webdataset": str(anchors())}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        count = max(BATCH, given.images // BATCH * BATCH)
        make_photos(folder, count)
        exact = [name for name in CONTENDERS if name not in ("diptych scaled", "webdataset")]
        passes = {name: child(pythons[name], "--pixels", name, folder, count) for name in exact}
        assert all(passes[name] == passes["diptych"] for name in exact), "the contenders do not make the same pixels"
        # webdataset shuffles in a buffer and has no end here, so only what its squares look like can be compared.
        assert set(child(pythons["webdataset"], "--pixels", "webdataset", folder, count)) <= set(passes["diptych"])
        runs: dict[tuple[str, int], list[dict[str, float]]] = {}
        for _ in range(given.repeats):
            for workers in given.workers:
                for name in CONTENDERS:
                    runs.setdefault((name, workers), []).append(
                        child(pythons[name], "--one", name, folder, workers, given.samples)
                    )
    write(runs, count, given)


def write(runs: dict[tuple[str, int], list[dict[str, float]]], count: int, given: argparse.Namespace) -> None:
    """Write medians as JSON and as a table; ratios are medians over the turns, each against ImageFolder's run of the same turn."""
    rows = []
    for (name, workers), own in runs.items():
        ratios = [
            one["images_per_second"] / other["images_per_second"]
            for one, other in zip(own, runs["torchvision", workers], strict=True)
        ]
        middle = {key: round(statistics.median(run[key] for run in own), 3) for key in own[0]}
        rows.append(
            {
                "contender": name,
                "workers": workers,
                **middle,
                "ratio_to_torchvision": round(statistics.median(ratios), 3),
            }
        )
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    packages = {name: version(name) for name in ("diptych", "torch", "torchvision", "datasets", "pillow")}
    setting = {"images": count, "samples": given.samples, "repeats": given.repeats, "batch": BATCH, "size": SIZE}
    given.out.mkdir(parents=True, exist_ok=True)
    record = {"setting": setting, "machine": machine, "packages": packages, "rows": rows, "notes": NOTES}
    (given.out / "data.json").write_text(json.dumps(record, indent=2) + "\n")
    lines = [
        f"{count:,} JPEG photos of 640 x 480 to {SIZE} pixels, batches of {BATCH}, {machine['cores']} cores, median of {given.repeats}.",
        "",
        "| | workers | images/s | x ImageFolder | first batch, s | resume, s | memory, MB |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {r['contender']} | {r['workers']} | {r['images_per_second']:.0f} | {r['ratio_to_torchvision']:.2f} | "
            f"{r['first_batch_s']:.2f} | {r['resume_s']:.2f} | {r['rss_mb']:.0f} |"
            for r in rows
        ),
        "",
        *NOTES,
    ]
    (given.out / "data.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
