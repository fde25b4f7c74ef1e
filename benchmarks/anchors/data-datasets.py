"""Images of a saved Hugging Face data set in a DataLoader."""

from pathlib import Path

import datasets

from diptych.bench.serve import serve
from diptych.bench.stream import loaded, measure_stream, pixels_of, square


def saved(folder: Path) -> str:
    """Return where the photos are as a data set, which is made first where it is not there."""
    place = folder / "saved"
    if not place.is_dir():
        paths = sorted((folder / "photos" / "all").glob("*.jpg"))
        images = [{"bytes": path.read_bytes(), "path": None} for path in paths]
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": images}, features=features).save_to_disk(str(place))
    return str(place)


def open_stream(folder: Path, workers: int, start: int):
    transform = square()
    photos = datasets.load_from_disk(saved(folder)).with_transform(
        lambda rows: {"pixels": [transform(image.convert("RGB")) for image in rows["image"]]}
    )
    return (batch["pixels"] for batch in loaded(photos, workers, start))


def make(folder: str, workers: int = 0, samples: int = 0, pixels: int = 0):
    saved(Path(folder))
    if pixels:
        return lambda: pixels_of(open_stream, folder, pixels)
    return lambda: measure_stream(open_stream, folder, workers, samples)


if __name__ == "__main__":
    serve(make, ("datasets", "torch", "pillow"))
