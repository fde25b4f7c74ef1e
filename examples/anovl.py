"""Find planted faults by words: a small model learns what states are called, and both kinds of tokens are asked where the fault is.

Needs `pip install 'diptych[demo]'` for the drawings. Takes half a minute; writes runs/anovl.html.
"""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from diptych.data.images import decode
from diptych.data.loader import Loader, LoaderConfig
from diptych.data.planted import kind_of, planted_defects
from diptych.evaluation.anomaly import class_means, detect, measure_found
from diptych.files import atomic_file
from diptych.methods import anovl, clip
from diptych.training.loop import fit
from diptych.training.prepare import make_model
from diptych.use.anomalies import Suspect, render_anomalies


def main(out: Path = Path("runs/anovl")) -> None:
    # Captions say "a photo of a damaged pear" or "a photo of a flawless pear", never where the damage is.
    source = planted_defects("train", count=720)
    print(source.texts(13)[0].text)
    recipe = replace(clip.mini(), data=LoaderConfig(batch_size=96), epochs=8, evaluate_every=0)
    model = make_model(recipe.model, source, seed=0)
    loader = Loader(source, model.image_policy, model.tokenizer, recipe.data)
    out.mkdir(parents=True, exist_ok=True)
    fit(clip.Objective(model, recipe.objective), loader, recipe, out, console=Console())

    test = planted_defects("test", count=96)
    for tokens in ("ordinary", "local"):
        settings = anovl.Config(tokens=tokens, wordings=("photo",))
        detectors = {
            name: anovl.Adapter(replace(settings, product=name, kind=kind_of(name))).fit(model)
            for name in {sample.domain for sample in test}
        }
        found = detect(lambda sample, known=detectors: known[sample.domain], test, model.image_policy)
        measured = measure_found(found)
        means = ", ".join(f"{name} {value:.2f}" for name, value in class_means(measured).items())
        print(f"{tokens} tokens: {means}")

    suspects = [
        Suspect(
            test[row].key,
            decode(test[row].image),
            found.maps[row].numpy(),
            found.scores[row].item(),
            found.masks[row].numpy(),
            test[row].label,
        )
        for row in found.scores.argsort(descending=True)[:24].tolist()
    ]
    page = render_anomalies(
        suspects, title="Planted faults", lead="The 24 most abnormal of 96 drawings.", measured=measured
    )
    with atomic_file(out.with_suffix(".html")) as file:
        file.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
