"""Photos with texts in several languages, or of several origins, joined from bundles in the folder that `DIPTYCH_DATA` names.

Each bundle keeps its own licence: research use only.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diptych.data.bundles import bundle, bundle_file
from diptych.data.sources import AbstractSource, Listed
from diptych.types import Text

SCENES = {
    "beach": ("beach",),
    "commercial_area": ("commercial",),
    "desert": ("desert",),
    "farmland": ("farmland",),
    "forest": ("forest",),
    "industrial_area": ("industrial",),
    "mountain": ("mountain",),
    "residential": ("denseresidential", "mediumresidential", "sparseresidential"),
    "river": ("river",),
}
"""Classes of the photos (nwpu-resisc12) and the scenes of the sentences (RSICD) that mean the same. Islands, lakes and wetlands have none."""


def bilingual_photos(split: str | None = None) -> AbstractSource:
    """Return everyday photos with human captions in English and in German, five each, written independently.

    Photos and English captions are those of the bundle flickr8k-1k; German ones come from Multi30k (bundle raw-captions), which describes
    most of the same photos. Photos without German captions are left out.

    Args:
        split: Of flickr8k-1k: train or dev; None for all.

    Raises:
        DataError: If a bundle is missing.
    """
    photos = bundle("flickr8k-1k", split)
    files = bundle_file("raw-captions", "multi30k_train.jsonl.gz").parent.glob("multi30k_*.jsonl.gz")
    german = {Path(row["image_name"]).stem: row["de"] for file in sorted(files) for row in _rows(file)}
    samples = []
    for sample in photos:
        if captions := german.get(_flickr_number(sample.key)):
            english = (replace(text, language="en") for text in sample.texts)
            samples.append(
                replace(sample, texts=(*english, *(Text(caption, "translation", "de") for caption in captions)))
            )
    found = Listed(samples, f"{photos.name} in English and German")
    found.notes = (*photos.notes, f"{len(samples)} of {len(photos)} photos have German captions in Multi30k.")
    return found


def overhead_photos(split: str | None = None, *, sentences: int = 5) -> AbstractSource:
    """Return photos from above (nwpu-resisc12) with their class names and weak captions.

    A weak caption is a sentence that a human wrote about ANOTHER photo of the same scene (RSICD): it has role `synthetic`, since it may say
    what this photo does not show. Photos of a class share them, so expect equal captions in a batch.

    Args:
        split: Of nwpu-resisc12; None for all.
        sentences: Weak captions per photo, drawn once for all; 0 for class names alone.

    Raises:
        DataError: If a bundle is missing.
    """
    photos, pools = bundle("nwpu-resisc12", split), _sentences() if sentences else {}
    samples = []
    for index, sample in enumerate(photos):
        pool = [sentence for scene in SCENES.get(str(sample.label), ()) for sentence in pools.get(scene, ())]
        drawn = np.random.default_rng(index).permutation(len(pool))[:sentences]
        weak = (Text(pool[place], "synthetic", "en") for place in drawn)
        samples.append(replace(sample, texts=(*sample.texts, *weak)))
    found = Listed(samples, f"{photos.name} with weak captions")
    found.notes = (*photos.notes, "Captions are weak: written about other photos of the same scene (RSICD).")
    return found


def _sentences() -> dict[str, list[str]]:
    """Return the distinct sentences of RSICD by scene, in the order of the file."""
    found: dict[str, dict[str, None]] = {}
    for row in _rows(bundle_file("rsicd-captions", "rsicd_captions.jsonl")):
        found.setdefault(row["scene"], {}).update(dict.fromkeys(row["captions"]))
    return {scene: list(sentences) for scene, sentences in found.items()}


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    opener: Any = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _flickr_number(key: str) -> str:
    """Return the number of a photo at Flickr, which both data sets have in their file names."""
    return Path(key).stem.partition("_")[0]
