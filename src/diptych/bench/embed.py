"""Images to embeddings with `lite0-minilm`: ours against a plain loop over the same timm model, one image at a time, in fp32."""

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diptych.bench.data import make_photos
from diptych.bench.process import Anchors
from diptych.bench.record import Bar, Column, Finding, Table
from diptych.bench.turns import ratio, take_turns, timed
from diptych.data.images import decode
from diptych.data.sources import AbstractSource, open_source
from diptych.data.transforms import preprocess
from diptych.errors import DiptychError
from diptych.evaluation.run import measure_retrieval
from diptych.evaluation.stats import paired_difference
from diptych.models.dual import DualEncoder
from diptych.models.embedding import Embedded, embed_images, embed_texts, looking
from diptych.models.precision import choose_precision
from diptych.models.weights import load
from diptych.types import Sample, TowerOutput

CPU = torch.device("cpu")
SOURCE = "flickr8k-1k:dev"
LEAST_COSINE = 0.99
"""Between our embedding of an image and the loop's; bf16 keeps 8 bits of each number."""


@dataclass(frozen=True)
class Setting:
    """Sizes.

    Attributes:
        images: Per step.
        turns: Steps per contender that count.
        evaluated: Images whose retrieval is measured, at most.
    """

    images: int = 256
    turns: int = 5
    evaluated: int = 1000


QUICK = Setting(images=4, turns=2, evaluated=4)


def measure(setting: Setting, anchors: Anchors) -> Finding:
    """Return images per second with and without decoding, cosines, and retrieval."""
    model, precision = load("lite0-minilm", offline=True), choose_precision("auto", CPU)[0]
    naive, transform = naive_loop(model), naive_transform(model)
    with photos(setting, anchors) as source:
        samples = [source[i % len(source)] for i in range(setting.images)]
        pixels = [
            preprocess(decode(encoded(s), background=model.image_policy.background), model.image_policy)
            for s in samples
        ]

        def ours(sides: list[Tensor]) -> Tensor:
            with looking(model, "auto"):
                batches = (torch.stack(sides[start : start + 64]) for start in range(0, len(sides), 64))
                return torch.cat([model.encode_image(batch) for batch in batches]).clone()

        def ours_from_files(given: list[Sample]) -> Tensor:
            return embed_images(model, given, precision="auto")

        def plainly_opened(given: list[Sample]) -> list[Tensor]:
            return [transform(Image.open(BytesIO(encoded(sample))).convert("RGB")) for sample in given]

        opened = plainly_opened(samples)
        pairs: tuple[tuple[str, Callable[[], Tensor], Callable[[], Tensor]], ...] = (
            ("from pixels in memory", lambda: ours(pixels), lambda: naive(opened)),
            ("from JPEG files in memory", lambda: ours_from_files(samples), lambda: naive(plainly_opened(samples))),
        )
        rows: list[dict[str, Any]] = []
        for title, own, other in pairs:
            cosine = float(F.cosine_similarity(own(), other()).min())
            if cosine < LEAST_COSINE:
                raise DiptychError(
                    f"An embedding {title} has a cosine of {cosine:.4f} with the loop's: they do not do the same work."
                )
            seconds = take_turns([timed("own", own), timed("naive", other)], setting.turns, skip=1)
            speed = ratio(seconds["naive"], seconds["own"])
            rates = {name: setting.images / statistics.median(times) for name, times in seconds.items()}
            rows.append({"what": title, **rates, "speed": speed, "cosine": cosine})
        unchanged, agreements = retrieval_rows(model, source, setting.evaluated, naive, plainly_opened, ours_from_files)
    return Finding(
        f"Embeddings of images by `lite0-minilm` (EfficientNet-Lite0). `loop`: the same timm model in fp32, one image at a time, with timm's "
        f"preprocessing. `diptych`: batches of 64, channels last, fused kernels, {precision} where the processor has it.",
        {**vars(setting), "source": source.name, "precision": precision},
        (
            Table(
                f"{setting.turns} turns of {setting.images} images",
                (
                    Column("what", "images"),
                    Column("naive", "loop, images/s", ",.0f"),
                    Column("own", "diptych, images/s", ",.0f"),
                    Column("speed", "speed / loop", ".1f"),
                    Column("cosine", "least cosine", ".4f"),
                ),
                tuple(rows),
            ),
            Table(
                f"Retrieval on {source.name}, difference paired over images with its 95 % interval",
                (
                    Column("what", "recall"),
                    Column("naive", "loop", ".3f"),
                    Column("own", "diptych", ".3f"),
                    Column("difference", "difference", "+.3f"),
                ),
                unchanged,
            ),
        ),
        (
            Bar("speed from pixels / loop", 10, True, rows[0]["speed"].value),
            Bar("speed from JPEG files / loop", 10, True, rows[1]["speed"].value),
            Bar("share of recalls whose difference has 0 in its interval", 1, True, agreements),
        ),
    )


def retrieval_rows(
    model: DualEncoder,
    source: AbstractSource,
    most: int,
    naive: Callable[[list[Tensor]], Tensor],
    opened: Callable[[list[Sample]], list[Tensor]],
    own: Callable[[list[Sample]], Tensor],
) -> tuple[tuple[dict[str, Any], ...], float]:
    """Return recalls with the loop's image embeddings and with ours, and the share of them that are unchanged."""
    samples = [source[i] for i in range(min(most, len(source)))]
    texts = [(text.text, row) for row, sample in enumerate(samples) for text in sample.texts]
    captions, owner = tuple(text for text, _ in texts), tuple(row for _, row in texts)
    nothing = (None,) * len(samples)
    keys, groups = tuple(s.key for s in samples), tuple(s.group for s in samples)
    ours = Embedded(
        tuple(range(len(samples))),
        keys,
        groups,
        own(samples),
        captions,
        owner,
        embed_texts(model, captions),
        nothing,
        nothing,
        (),
    )
    first, second = (measure_retrieval(e) for e in (replace(ours, images=naive(opened(samples))), ours))
    rows = []
    for name in ("image_to_text", "text_to_image"):
        a, b = getattr(first, name), getattr(second, name)
        rows += [
            {
                "what": f"{name.replace('_', ' ')}, at {k}",
                "naive": a.recall[k].value,
                "own": b.recall[k].value,
                "difference": paired_difference(a.hits(k), b.hits(k), cluster=a.cluster),
            }
            for k in a.recall
        ]
    return tuple(rows), sum(r["difference"].low <= 0 <= r["difference"].high for r in rows) / len(rows)


def naive_loop(model: DualEncoder) -> Callable[[list[Tensor]], Tensor]:
    """Return a function that embeds prepared images one by one in fp32, as a first script would."""
    vision: Any = model.vision
    tower = deepcopy(vision.model).eval()

    @torch.no_grad()
    def embed(images: list[Tensor]) -> Tensor:
        found = [model.image_head(TowerOutput(tower(image[None]))) for image in images]
        return F.normalize(torch.cat(found), dim=1)

    return embed


def naive_transform(model: DualEncoder) -> Callable[[Image.Image], Tensor]:
    """Return timm's own preprocessing with the settings of the model."""
    from timm.data.transforms_factory import create_transform

    policy = model.image_policy
    return create_transform(  # type: ignore[no-any-return]
        policy.size, mean=policy.mean, std=policy.std, crop_pct=policy.crop_fraction, interpolation=policy.interpolation
    )


@contextmanager
def photos(setting: Setting, anchors: Anchors) -> Iterator[AbstractSource]:
    """Give photos: those of flickr8k-1k, or made ones, whose recalls say little."""
    if os.environ.get("DIPTYCH_DATA"):
        yield open_source(SOURCE)
        return
    anchors.notes.append("DIPTYCH_DATA is unset, so the photos are drawn, and their recalls say little.")
    with tempfile.TemporaryDirectory() as folder:
        make_photos(Path(folder), min(setting.images, 64))
        yield open_source(f"{folder}/photos/all")


def encoded(sample: Sample) -> bytes:
    """Return the image file of a sample."""
    assert isinstance(sample.image, bytes)
    return sample.image
