"""What the recipe of CLIP-rocket does to one pair, and a short run with SiamLIP's term on top of it.

Needs the extra `demo`. Two passes over 256 scenes, seconds on two cores: enough to see it run, not to see it work.
"""

from dataclasses import replace

import numpy as np

import diptych
from diptych.claims.train import train_quietly
from diptych.data.scenes import scenes
from diptych.data.text_changes import change_text

method = diptych.load_method("improved_baselines")
recipe = method.mini()
source = scenes("train", count=256)

caption, rng = source.texts(0)[0].text, np.random.default_rng(0)
print("caption:", caption)
for name, column in zip(("weak", "strong", "strong"), recipe.data.texts, strict=True):
    print(f"{name:>7}:", change_text(caption, column.change, rng))

recipe = replace(recipe, objective=replace(recipe.objective, extra="siam"), epochs=2)
model, shown = train_quietly(recipe, source, method, seed=0)
found = diptych.evaluate_model(model, scenes("test", count=100))
print(f"{shown} samples shown, each as {len(recipe.data.views)} views and {len(recipe.data.texts)} texts")
print("image to text:", found.headline()["image_to_text/recall@10"])
