"""Learn one noise and one word that mislead our small model on drawn scenes, beside random ones and the same noise with its pixels shuffled.

Needs `pip install 'diptych[demo]'` for the drawings. Some fifteen seconds on an idle core; writes runs/pair.safetensors.
"""

from dataclasses import replace
from pathlib import Path

import torch

import diptych
from diptych.data.scenes import scenes
from diptych.evaluation.attack import measure_attack, measure_words, reword
from diptych.methods import c_pgc


def main(out: Path = Path("runs/pair.safetensors"), *, steps: int = 40, count: int = 200) -> None:
    model, train, test = diptych.load("mini"), scenes("train", count=count), scenes("validation", count=count // 2)
    noise = c_pgc.Attack(replace(c_pgc.mini(), steps=steps, word=True)).fit(model, train)
    assert noise.word is not None
    order = torch.randperm(noise.delta[0].numel(), generator=torch.Generator().manual_seed(0))
    shuffled = replace(noise, delta=noise.delta.flatten(1)[:, order].view_as(noise.delta))
    reports = {name: measure_attack(model, test, change) for name, change in (("noise", noise), ("shuffled", shuffled))}
    captions = reword(model, reports["noise"].clean.embedded.captions, noise.word)
    reports |= measure_words(model, reports["noise"], captions)
    print(f"The word is {noise.word.word!r}, the random one {captions.by_chance.word!r}.")
    for name, report in reports.items():
        rates, by_chance = report.success(), report.noise_success()
        for metric in ("image_to_text/recall@1", "text_to_image/recall@1"):
            print(f"{name:14} {metric}: lost {rates[metric]}, to {report.by_chance} {by_chance[metric]}")
    noise.save(out)


if __name__ == "__main__":
    main()
