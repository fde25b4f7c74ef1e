"""Let the small model of emoji go on with drawn shapes, a slice at a time, plainly and with Mod-X, and see how many emoji it still finds.

Needs `pip install 'diptych[demo]'` for the emoji. Takes half a minute; writes runs/slices. A second call reads what the first one found.
"""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

import diptych
from diptych.claims.measures import mean_recall
from diptych.data.loader import LoaderConfig
from diptych.data.parts import slices
from diptych.data.shapes import shapes
from diptych.data.sources import Subset
from diptych.evaluation.continual import Trace
from diptych.methods import mod_x
from diptych.models.dual import DualEncoder
from diptych.training.recipe import ModelConfig
from diptych.training.stream import Stage, fitted, run_stream


def main(out: Path = Path("runs/slices"), epochs: int = 10) -> None:
    parts = slices(shapes(), 4)  # two or three colours a slice
    emoji = Subset(diptych.open_source("openmoji:test"), range(200), "emoji")

    def measure(model: DualEncoder) -> list[float]:
        return [mean_recall(model, exam) for exam in (*parts, emoji)]

    recipe = replace(
        mod_x.recipe(),
        model=ModelConfig(start="mini"),
        data=LoaderConfig(batch_size=20),
        optimizer=replace(mod_x.recipe().optimizer, lr=2e-4),
        epochs=epochs,
    )
    # What is right in a batch of 20 pairs is less than in one of 280, so alpha is as many times larger.
    for name, alpha in {"plain": 0.0, "Mod-X": 20.0 * 280 / 20}.items():
        settings = replace(recipe, objective=mod_x.Config(alpha=alpha))
        stages = [Stage(f"slice {number}", part, settings) for number, part in enumerate(parts, 1)]
        train = fitted(mod_x.Objective, console=Console(quiet=True))
        scores = run_stream(diptych.load("mini"), stages, train, measure, out / name)
        trace = Trace(
            "R@1", tuple(stage.name for stage in stages), (*(stage.name for stage in stages), "emoji"), scores
        )
        trace.save(out / name / "trace.json")
        print(
            f"{name}\n{trace.table()}{trace.summary['retention/emoji']:.0%} of the emoji that it found are still found.\n"
        )


if __name__ == "__main__":
    main()
