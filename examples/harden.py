"""Train a small model on emoji, harden it against changes of its images, and audit it before and after, beside as much plain fine-tuning.

    python examples/harden.py                  # on emoji held out of training
    python examples/harden.py --split test

Needs `pip install 'diptych[demo]'` for the drawings. Writes an audit card of each model to runs/harden.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from diptych.claims.train import train_quietly
from diptych.data.openmoji import openmoji
from diptych.data.sources import Subset
from diptych.evaluation.robustness import RobustnessConfig, audit
from diptych.methods import clip
from diptych.models.pgd import PGDConfig
from diptych.training.prepare import hold_out
from diptych.use.audit import audit_page

METRIC = "text_to_image/recall@1"


@dataclass(frozen=True)
class Settings:
    """What is trained and how long.

    Attributes:
        split: Where the audits look. Settings are chosen on `validation`, drawings held out of the training split.
        samples: Of the training split; all when absent.
        epochs: Of training from scratch.
        tuning_epochs: Of fine-tuning, plain and hardened alike.
        eps: Of hardening, in levels of 255.
        images: Audited.
        seed: Of everything.
    """

    split: Literal["validation", "test"] = "validation"
    samples: int | None = None
    epochs: int = 16
    tuning_epochs: int = 4
    eps: float = 4.0
    images: int = 200
    seed: int = 0


def main(settings: Settings = Settings(), *, out: Path = Path("runs/harden")) -> None:
    training, held = hold_out(openmoji("train"), 0.15, seed=0)
    if settings.split == "test":
        training, held = openmoji("train"), openmoji("test")
    if settings.samples is not None:
        training = Subset(training, range(settings.samples), training.name)
    out.mkdir(parents=True, exist_ok=True)

    recipe = replace(clip.mini(), epochs=settings.epochs)
    model, _ = train_quietly(recipe, training, clip, seed=settings.seed)
    slower = replace(recipe.optimizer, lr=5e-4, ema_decay=None)
    tuning = replace(recipe, epochs=settings.tuning_epochs, optimizer=slower)
    hardening = replace(tuning, harden=PGDConfig(eps=settings.eps, steps=3, step_size=0.5))

    checks = RobustnessConfig(eps=(2.0, 4.0, 8.0), images=settings.images, seed=settings.seed)
    columns = []
    for name, further in (("as trained", None), ("fine-tuned", tuning), ("hardened", hardening)):
        tuned = model
        if further is not None:
            tuned, _ = train_quietly(further, training, clip, seed=settings.seed + 1, model=copy.deepcopy(model))
        found = audit(tuned, held, checks, name=name)
        (out / f"{name.replace(' ', '-')}.html").write_text(audit_page(found), encoding="utf-8")
        columns.append([f"{name:22}", *(f"{row.scores[METRIC].value!s:22}" for row in found.summary())])
    names = ["", *(row.name for row in found.summary())]
    print(f"{METRIC} on {settings.images} drawings, hardened with eps {settings.eps:g} of 255 levels")
    for name, *cells in zip(names, *columns, strict=True):
        print(f"{name:18}", *cells)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
