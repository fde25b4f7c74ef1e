"""Train on scenes half of whose captions are wrong, with synthetic captions beside them, and see which captions the weights doubt.

Needs `pip install 'diptych[demo]'` for the drawings. Takes some seconds; writes runs/alip.
"""

from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

import diptych
from diptych.claims.measures import auroc, drawn_scenes
from diptych.curate.captions import RegionCaptioner, add_captions
from diptych.data.loader import Loader
from diptych.data.texts import ShuffledTexts
from diptych.methods import alip
from diptych.training.loop import fit
from diptych.training.prepare import make_model


def main(out: Path = Path("runs/alip")) -> None:
    # Detailed captions, 40 % of them of other images, and coarse ones that are right: what a captioner would say.
    source = ShuffledTexts(add_captions(drawn_scenes("train", 400), RegionCaptioner()), 0.4)
    print(f"{source.texts(1)[0].text!r} came with the image, {source.texts(1)[1].text!r} is synthetic")

    # Our small model of drawings, its towers as they are: what some hundred scenes can pay for.
    recipe = alip.recipe()
    recipe = replace(
        recipe,
        model=replace(recipe.model, start="mini"),
        data=replace(recipe.data, views=alip.mini().data.views),
        epochs=6,
    )
    objective = alip.Objective(make_model(recipe.model, source, seed=0), recipe.objective)
    loader = Loader(source, objective.model.image_policy, objective.model.tokenizer, recipe.data)
    out.mkdir(parents=True, exist_ok=True)
    fit(objective, loader, recipe, out, console=Console())

    texts = ([source.texts(index)[column].text for index in range(len(source))] for column in (0, 1))
    captions, synthetic = (diptych.embed_texts(objective.model, some) for some in texts)
    similarity = alip.similarities(diptych.embed_images(objective.model, source), captions, synthetic)
    weights = alip.gate_weights(similarity, objective.gate.history, recipe.objective)
    wrong, weight = torch.tensor(source.moved), weights.sample * weights.text
    print(f"mean weight of wrong captions {weight[wrong].mean():.2f}, of right ones {weight[~wrong].mean():.2f}")
    print(f"AUROC of the weights for wrong captions: {auroc(-weight, wrong):.2f} (0.5 by guessing)")


if __name__ == "__main__":
    main()
