"""Images of a tar shard through webdataset, shuffled in a buffer; each worker reads all of it, since there is one shard."""

from itertools import islice
from pathlib import Path

import webdataset as wds
from torch.utils.data import DataLoader

from diptych.bench.serve import serve
from diptych.bench.stream import BATCH, measure_stream, pixels_of, square


def open_stream(folder: Path, workers: int, start: int):
    photos = wds.WebDataset(str(folder / "photos.tar"), shardshuffle=False, resampled=True)  # without end
    photos = photos.compose(lambda samples: islice(samples, start // max(1, workers), None))
    photos = photos.shuffle(500).decode("pil").to_tuple("jpg").map_tuple(square())
    return (images for (images,) in DataLoader(photos, BATCH, num_workers=workers))


def make(folder: str, workers: int = 0, samples: int = 0, pixels: int = 0):
    if pixels:
        return lambda: pixels_of(open_stream, folder, pixels)
    return lambda: measure_stream(open_stream, folder, workers, samples)


if __name__ == "__main__":
    serve(make, ("webdataset", "torch", "pillow"))
