"""What tests share and make by hand: embeddings and batches that no tower has made, official numbers, images that look like photos."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from diptych.types import Batch, PairEmbeddings, Tokens


def pairs(group: Sequence[int], *keys: Sequence[int]) -> Batch:
    """Return a batch of these groups with one text column per list of keys; equal keys are equal texts."""
    n = len(group)
    ids, mask = torch.zeros(n, 1, dtype=torch.int64), torch.ones(n, 1, dtype=torch.bool)
    columns = tuple(Tokens(ids, mask, torch.tensor([*key])) for key in keys)
    return Batch(tuple(map(str, range(n))), (), columns, torch.tensor([*group]))


def embeddings(n: int, dim: int = 6) -> PairEmbeddings:
    """Return one random view and text column; equal n, equal embeddings."""
    image, text = normalize(torch.randn(2, n, dim, generator=torch.Generator().manual_seed(n)), dim=-1)
    return PairEmbeddings((image,), (text,))


def doubles(case: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return the numbers of an official case in float64, without its words."""
    return {name: torch.from_numpy(a).double() for name, a in case.items() if a.dtype.kind in "fiu"}


def cloud(seed: int) -> Image.Image:
    """Return a smooth random image, as photos are."""
    rough = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((96, 64), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format_: str = "PNG", **options) -> bytes:
    """Return the content of a file that holds an image."""
    image.save(file := io.BytesIO(), format_, **options)
    return file.getvalue()
