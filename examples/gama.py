"""Learn a network that changes drawn scenes until our small model loses them, and try it on eps that it was not trained with.

Needs `pip install 'diptych[demo]'` for the drawings. Some ten seconds on an idle core; writes runs/network.safetensors.
"""

from dataclasses import replace
from pathlib import Path

import diptych
from diptych.data.scenes import scenes
from diptych.evaluation.attack import measure_attack
from diptych.methods import gama


def main(out: Path = Path("runs/network.safetensors"), *, steps: int = 60, count: int = 200) -> None:
    model, train, test = diptych.load("mini"), scenes("train", count=count), scenes("validation", count=count // 2)
    gama.Attack(replace(gama.mini(), steps=steps)).fit(model, train).save(out)
    for eps in (2, 5, 10):
        report = measure_attack(model, test, gama.read(out, eps=eps))
        rates, by_chance = report.success(), report.noise_success()
        for metric in ("image_to_text/recall@1", "text_to_image/recall@1"):
            print(f"eps {eps:2} {metric}: lost {rates[metric]}, to random noise {by_chance[metric]}")


if __name__ == "__main__":
    main()
