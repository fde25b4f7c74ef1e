"""A dual encoder that learns drawings by their names in fourteen languages, with self-distillation; recall language by language.

Needs the extra `demo`. Two short passes over 640 drawings, seconds on two cores: enough to see it run, not to see it work.
"""

from dataclasses import replace

import diptych
from diptych.claims.train import train_quietly
from diptych.data.openmoji import openmoji
from diptych.data.sources import Subset
from diptych.evaluation.languages import evaluate_languages

method = diptych.load_method("rs_m_clip")
recipe = replace(method.mini(), epochs=2)
drawings = Subset(openmoji("train"), range(640), "640 drawings")
unseen = Subset(openmoji("test"), range(100), "100 unseen drawings")

model, shown = train_quietly(recipe, drawings, method, seed=0)
print(f"{shown} samples shown, each as {len(recipe.data.views)} views and under a name in a random language")

table = evaluate_languages(model, unseen, ["en", "de", "ja", "ar"])
print("\n".join(table.lines()))
