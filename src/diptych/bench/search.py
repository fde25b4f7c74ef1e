"""Finding the nearest of many embeddings, one query at a time: ours, exact and approximate, against usearch and faiss."""

import statistics
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from diptych.bench.process import Anchors
from diptych.bench.record import Bar, Column, Finding, Table
from diptych.bench.turns import Contender, Turn, best, ratio, take_turns
from diptych.errors import DiptychError
from diptych.use.search import Finder, approximate_finder, exact_finder

COUNT = 10
NEAR = 1e-5
"""Two candidates whose scores differ by less than this may stand for each other: sums of products in another order."""

ANCHORS = (
    ("faiss", "faiss, flat", "exact"),
    ("usearch", "usearch, exact", "exact"),
    ("faiss", "faiss, HNSW", "approximate"),
    ("usearch", "usearch, HNSW", "approximate"),
)


@dataclass(frozen=True)
class Setting:
    """Sizes.

    Attributes:
        images: Embeddings to search in.
        d: Numbers per embedding.
        queries: That go round; a step answers all of them, one by one.
        turns: Steps per contender.
    """

    images: int = 50_000
    d: int = 384
    queries: int = 50
    turns: int = 9


QUICK = Setting(images=500, d=16, queries=5, turns=2)


def measure(setting: Setting, anchors: Anchors) -> Finding:
    """Return milliseconds per query, share of the true neighbours found, and seconds to build."""
    images, queries = made_embeddings(setting)
    truth = (queries @ images.T).topk(COUNT, dim=1)
    contenders, built = [], dict[str, float]()
    for kind, make in (("exact", exact_finder), ("approximate", approximate_finder)):
        if kind == "approximate" and find_spec("usearch") is None:
            anchors.notes.append("diptych, approximate is left out: it needs the extra `search`.")
            continue
        began = time.perf_counter()
        finder = make(images)
        built[f"diptych, {kind}"] = time.perf_counter() - began
        contenders.append(own(f"diptych, {kind}", finder, queries))
    with tempfile.TemporaryDirectory() as folder:
        save_file({"images": images, "queries": queries}, Path(folder) / "embeddings.safetensors")
        for anchor, name, kind in ANCHORS:
            contenders += anchors.start(anchor, name, f"search-{anchor}", folder=folder, kind=kind, count=COUNT)
        found = {contender.name: contender.step().value for contender in contenders}
        seconds = take_turns(contenders, setting.turns)
    rows = []
    for name, times in seconds.items():
        exact = not any(word in name for word in ("approximate", "HNSW"))
        share = recall(found[name]["rows"], images, queries, truth.values)
        if exact and share < 1:
            raise DiptychError(f"{name} is exact and finds only {share:.4f} of the nearest {COUNT}.")
        rows.append(
            {
                "name": name,
                "ms": statistics.median(times) / setting.queries * 1000,
                "over": ratio(times, seconds["diptych, exact"]),
                "share": share,
                "build_s": found[name].get("build_s", built.get(name)),
            }
        )
    flat = best(seconds, [name for _, name, kind in ANCHORS if kind == "exact" and name in seconds])
    return Finding(
        f"The {COUNT} nearest of {setting.images:,} embeddings of {setting.d} numbers, one query at a time.",
        setting,
        (
            Table(
                f"{setting.turns} turns of {setting.queries} queries",
                (
                    Column("name", "search"),
                    Column("ms", "ms per query", ".3f"),
                    Column("over", "ratio to our exact one"),
                    Column("share", "of the true neighbours", ".1%"),
                    Column("build_s", "s to build", ".1f"),
                ),
                tuple(rows),
            ),
        ),
        (
            Bar(
                f"fastest exact anchor ({flat}) / our exact",
                1.0,
                True,
                ratio(seconds[flat], seconds["diptych, exact"]).value if flat else None,
            ),
        ),
        (
            "Exact searches must find every true neighbour, checked before anything is timed; candidates with equal scores stand for each other.",
            "Our approximate search is usearch's graph with its defaults; faiss' graph has 32 links per node and its defaults.",
        ),
    )


def own(name: str, finder: Finder, queries: Tensor) -> Contender:
    """Return a contender that answers all queries with one of our finders."""

    def step() -> Turn:
        began = time.perf_counter()
        found = [finder(query, COUNT)[1] for query in queries]
        return Turn(time.perf_counter() - began, {"rows": found})

    return Contender(name, step)


def recall(found: Any, images: Tensor, queries: Tensor, best_scores: Tensor) -> float:
    """Return the share of found rows that score as well as the last true neighbour."""
    scores = torch.stack([images[list(rows)] @ query for rows, query in zip(found, queries, strict=True)])
    return float((scores >= best_scores[:, -1:] - NEAR).float().mean())


def made_embeddings(setting: Setting) -> tuple[Tensor, Tensor]:
    """Return embeddings in loose clusters, as photos have, and queries near some of them."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(max(1, setting.images // 100), setting.d, generator=generator)
    around = centres[torch.randint(len(centres), (setting.images + setting.queries,), generator=generator)]
    points = F.normalize(around + torch.randn(around.shape, generator=generator), dim=1)
    return points[: setting.images].contiguous(), points[setting.images :].contiguous()
