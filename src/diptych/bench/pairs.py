"""The model and the pairs that the benchmarks of training share: a small CLIP, random pixels, captions as long as real ones."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from diptych.data.tokenizer import TextPolicy, Tokenizer, hash_strings
from diptych.data.transforms import ImagePolicy
from diptych.models.build import DualConfig, build
from diptych.models.dual import DualEncoder
from diptych.models.heads import LinearHeadConfig
from diptych.models.huggingface import to_huggingface
from diptych.models.openclip import to_openclip
from diptych.models.text import TextConfig
from diptych.models.vision import VisionConfig
from diptych.types import Batch, Tokens, fill_up

LENGTH = 77
"""Tokens of a padded text, CLIP's."""

MEAN_WORDS, DEVIATION = 12.0, 4.0
"""Words per caption of flickr8k-1k, punctuation counted."""


def captions(count: int) -> tuple[list[str], str]:
    """Return captions and where they come from: flickr8k-1k if `DIPTYCH_DATA` has it, else made ones of the same lengths."""
    file = Path(os.environ.get("DIPTYCH_DATA", "")) / "flickr8k-1k" / "captions.jsonl"
    if os.environ.get("DIPTYCH_DATA") and file.is_file():
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found = [row["captions"][place] for place in range(5) for row in rows]
        return [found[i % len(found)] for i in range(count)], "flickr8k-1k"
    rng = np.random.default_rng(0)
    lengths = np.clip(np.rint(rng.normal(MEAN_WORDS, DEVIATION, count)), 3, 30).astype(int)
    return [" ".join(f"word{rng.integers(2000)}" for _ in range(length)) for length in lengths], "made"


def made_model(size: int, width: int, texts: list[str]) -> DualEncoder:
    """Return a CLIP with random weights, always the same: ViT with patches of 32 and four layers, a text tower of four."""
    tokenizer = Tokenizer.train(texts, vocabulary=4096, length=LENGTH)
    torch.manual_seed(0)
    heads, mlp = width // 64, 4 * width
    return build(
        DualConfig(
            VisionConfig(image_size=size, patch_size=32, width=width, depth=4, heads=heads, mlp_width=mlp),
            TextConfig(vocabulary=tokenizer.size, length=LENGTH, width=width, depth=4, heads=heads, mlp_width=mlp),
            LinearHeadConfig(256),
            LinearHeadConfig(256),
            image_policy=ImagePolicy(size=size),
            text_policy=TextPolicy(length=LENGTH),
        ),
        tokenizer,
    )


def made_batches(model: DualEncoder, texts: list[str], size: int) -> list[Batch]:
    """Return batches of random pixels, each text trimmed to the longest of its batch as our loader gives them."""
    rng = np.random.default_rng(0)
    side = model.image_policy.size
    batches = []
    for start in range(0, len(texts), size):
        keys = tuple(str(start + i) for i in range(size))
        images = torch.from_numpy(rng.integers(256, size=(size, 3, side, side), dtype=np.uint8))
        batches.append(Batch(keys, (images,), (model.tokenizer(texts[start : start + size]),), hash_strings(keys)))
    return batches


def padded(batch: Batch, pad: int) -> Batch:
    """Return a batch with its texts filled up to `LENGTH`, as open_clip's tokenizer and the CLIP example of transformers do."""
    (tokens,) = batch.texts
    ids = torch.full((len(batch), LENGTH), pad)
    ids[:, : tokens.ids.shape[1]] = tokens.ids
    return Batch(batch.keys, batch.images, (Tokens(ids, fill_up(tokens.mask, [LENGTH]), tokens.key),), batch.group)


def export(model: DualEncoder, batches: list[Batch], folder: Path) -> None:
    """Write what anchors need: the weights in their formats, and the batches, normalised and padded, in one file."""
    to_openclip(model, folder / "openclip")
    to_huggingface(model, folder / "huggingface")
    full = [padded(batch, model.config.text_policy.pad) for batch in batches]
    save_file(
        {
            "pixels": torch.cat([model.pixels(_uint8(batch)) for batch in batches]),
            "ids": torch.cat([batch.texts[0].ids for batch in full]),
            "mask": torch.cat([batch.texts[0].mask for batch in full]).long(),
        },
        folder / "pairs.safetensors",
    )


def _uint8(batch: Batch) -> torch.Tensor:
    (images,) = batch.images
    assert isinstance(images, torch.Tensor)
    return images
