"""Learn prompts that work on emoji as they are and fail on grey ones, and measure both beside prompts without protection.

Needs `pip install 'diptych[demo]'` for the drawings. Takes about a minute; writes runs/fence.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

import diptych
from diptych.data.sources import Listed
from diptych.evaluation.protection import measure_domains
from diptych.methods import ip_clip
from diptych.types import Sample

THINGS = (
    "dog face",
    "cat face",
    "red apple",
    "banana",
    "rocket",
    "airplane",
    "umbrella",
    "guitar",
    "hammer",
    "bicycle",
)


def renderings(count: int, seed: int) -> Listed:
    """Return every thing `count` times, turned, shifted and scaled at random, in colour and in grey."""
    rng, source, samples = np.random.default_rng(seed), diptych.open_source("openmoji:train"), list[Sample]()
    names = {source.texts(row)[0].text: row for row in range(len(source))}
    for thing in (thing for thing in THINGS if thing in names):
        drawing = Image.fromarray(source[names[thing]].image)
        for number in range(count):
            side = int(rng.integers(44, 64))
            turned = drawing.resize((side, side)).rotate(rng.uniform(-30, 30), fillcolor="white")
            canvas = Image.new("RGB", (64, 64), "white")
            canvas.paste(turned, tuple(rng.integers(0, 65 - side, 2).tolist()))
            for domain, look in (("colour", canvas), ("grey", canvas.convert("L").convert("RGB"))):
                samples.append(
                    Sample(f"{thing} {number} {domain}", np.asarray(look), (), thing, label=thing, domain=domain)
                )
    return Listed(samples, "emoji in two looks")


def main(out: Path = Path("runs/fence")) -> None:
    model, train, test = diptych.load("mini"), renderings(12, seed=0), renderings(12, seed=1)
    config = replace(ip_clip.mini(), authorised="colour", batch_size=8, epochs=12)
    plain = ip_clip.Adapter(replace(config, weights=ip_clip.SUPERVISED)).fit(model, train)
    fenced = ip_clip.Adapter(config).fit(model, train)
    for name, interval in measure_domains(plain, fenced, test, "colour").metrics.items():
        print(f"{name:22} {interval}")

    fenced.save(out)  # some hundred kB: without the towers
    again = ip_clip.read_predictor(out, diptych.load("mini"))
    print(f"{len(again.classes)} classes, read again from {out}")


if __name__ == "__main__":
    main()
