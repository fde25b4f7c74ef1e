"""Learn one noise that misleads our small model on drawn scenes, beside random noise and the same noise with its pixels shuffled.

Needs `pip install 'diptych[demo]'` for the drawings. Some ten seconds on an idle core; writes runs/noise.png, grey where nothing changes.
"""

from dataclasses import replace
from pathlib import Path

import torch

import diptych
from diptych.data.scenes import scenes
from diptych.evaluation.attack import measure_attack
from diptych.methods import c_pgc


def main(out: Path = Path("runs/noise.png"), *, steps: int = 40, count: int = 200) -> None:
    model, train, test = diptych.load("mini"), scenes("train", count=count), scenes("validation", count=count // 2)
    noise = c_pgc.Attack(replace(c_pgc.mini(), steps=steps)).fit(model, train)
    order = torch.randperm(noise.delta[0].numel(), generator=torch.Generator().manual_seed(0))
    shuffled = replace(noise, delta=noise.delta.flatten(1)[:, order].view_as(noise.delta))
    for name, change in (("learnt", noise), ("shuffled", shuffled)):
        report = measure_attack(model, test, change)
        rates, by_chance = report.success(), report.noise_success()
        for metric in ("image_to_text/recall@1", "text_to_image/recall@1"):
            print(f"{name:9} {metric}: lost {rates[metric]}, to random noise {by_chance[metric]}")
    noise.save(out)


if __name__ == "__main__":
    main()
