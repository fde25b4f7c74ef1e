"""Let the small model of emoji learn two new looks of them in turn, plainly and with ZSCL, and see what is left of the old one.

Needs `pip install 'diptych[demo]'` for the drawings. Takes about a minute; writes runs/looks. A second call reads what the first one found.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console

import diptych
from diptych.claims.measures import mean_recall
from diptych.data.loader import LoaderConfig
from diptych.data.sources import AbstractSource, Listed
from diptych.evaluation.continual import Trace
from diptych.methods import zscl
from diptych.models.dual import DualEncoder
from diptych.training.recipe import ModelConfig
from diptych.training.stream import Stage, fitted, run_stream

LOOKS = {"negative": lambda pixels: 255 - pixels, "upside down": lambda pixels: np.ascontiguousarray(pixels[::-1])}


def seen_as(look: str, split: str, count: int) -> AbstractSource:
    """Return the first emoji of a split as they look, with their English names."""
    source = diptych.open_source(f"openmoji:{split}")
    samples = [source[index] for index in range(count)]
    return Listed([replace(s, image=LOOKS[look](s.image), texts=s.texts[:1]) for s in samples], f"{look} emoji")


def main(out: Path = Path("runs/looks"), count: int = 400) -> None:
    exams = [seen_as(look, "test", 200) for look in LOOKS]
    before = Listed([diptych.open_source("openmoji:test")[index] for index in range(200)], "emoji")

    def measure(model: DualEncoder) -> list[float]:
        return [mean_recall(model, exam) for exam in (*exams, before)]

    recipe = replace(
        zscl.recipe(),
        model=ModelConfig(start="mini"),
        data=LoaderConfig(batch_size=50),
        optimizer=replace(zscl.recipe().optimizer, lr=5e-4, mean_every=4),
        epochs=4,
    )
    kept = zscl.Config(teacher="mini", reference="openmoji:train", reference_count=500, l2_weight=0.01)
    plain = zscl.Config(image_weight=0, text_weight=0, l2_weight=0)
    for name, objective in {"fine-tuning": plain, "ZSCL": kept}.items():
        settings = replace(recipe, objective=objective)
        stages = [Stage(look, seen_as(look, "train", count), settings) for look in LOOKS]
        train = fitted(zscl.Objective, console=Console(quiet=True))
        scores = run_stream(diptych.load("mini"), stages, train, measure, out / name)
        trace = Trace("R@1", tuple(LOOKS), (*LOOKS, "as before"), scores)
        trace.save(out / name / "trace.json")
        print(f"{name}\n{trace.table()}{trace.summary['retention/as before']:.0%} is left of what it could.\n")


if __name__ == "__main__":
    main()
