"""Teach the small model of emoji to name the colours of drawn shapes and then their forms, plainly and with VR-LwF, and see what it forgets.

Needs no extra. Takes half a minute; writes runs/names. A second call reads what the first one found.
"""

from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

import diptych
from diptych.claims.measures import mean_recall
from diptych.data.loader import LoaderConfig
from diptych.data.shapes import COLOURS, SHAPES, shapes
from diptych.data.sources import AbstractSource, Listed
from diptych.evaluation.continual import Trace
from diptych.methods import vr_lwf
from diptych.models.dual import DualEncoder
from diptych.training.recipe import ModelConfig
from diptych.training.stream import Stage, fitted, run_stream
from diptych.types import Text

CLASSES = {"colour": tuple(f"something {colour}" for colour in COLOURS), "form": tuple(f"a {form}" for form in SHAPES)}


def named_by(task: str) -> AbstractSource:
    """Return the drawings, each with the name of its class in place of its caption."""
    samples = []
    for sample in shapes():
        colour, form = sample.key.split("-")
        name = f"something {colour}" if task == "colour" else f"a {form}"
        samples.append(replace(sample, texts=(Text(name),)))
    return Listed(samples, f"shapes by {task}")


def accuracy(model: DualEncoder, source: AbstractSource, classes: tuple[str, ...]) -> float:
    """Return the share of samples whose own class is the nearest."""
    nearest = (diptych.embed_images(model, source) @ diptych.embed_texts(model, classes).T).argmax(1)
    right = torch.tensor([classes.index(source.texts(row)[0].text) for row in range(len(source))])
    return float((nearest == right).float().mean())


def main(out: Path = Path("runs/names"), epochs: int = 10) -> None:
    captioned = shapes()

    def measure(model: DualEncoder) -> list[float]:
        named = [accuracy(model, named_by(task), classes) for task, classes in CLASSES.items()]
        return [*named, mean_recall(model, captioned)]

    recipe = replace(
        vr_lwf.recipe(),
        model=ModelConfig(start="mini"),
        data=LoaderConfig(batch_size=20),
        optimizer=replace(vr_lwf.recipe().optimizer, lr=2e-4),
        epochs=epochs,
    )
    for name, weight in {"fine-tuning": 0.0, "VR-LwF": 1.0}.items():
        stages = []
        for seed, (task, classes) in enumerate(CLASSES.items()):
            objective = vr_lwf.Config(classes=classes, count=256, image_weight=weight, text_weight=weight, seed=seed)
            stages.append(Stage(task, named_by(task), replace(recipe, objective=objective)))
        train = fitted(vr_lwf.Objective, console=Console(quiet=True))
        scores = run_stream(diptych.load("mini"), stages, train, measure, out / name)
        trace = Trace("top-1", tuple(CLASSES), (*CLASSES, "captions (R@1)"), scores)
        trace.save(out / name / "trace.json")
        print(f"{name}\n{trace.table()}{trace.scores[-1][0]:.0%} of the colours are still named rightly.\n")


if __name__ == "__main__":
    main()
