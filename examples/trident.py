"""Segment scenes by words: a small model learns names of drawn things from captions, then every pixel of larger scenes gets one of them.

Needs `pip install 'diptych[demo]'` for the drawings. Takes about a minute; writes runs/trident.html.
"""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from diptych.data.class_masks import class_map
from diptych.data.images import decode
from diptych.data.loader import Loader, LoaderConfig
from diptych.data.scenes import NOUNS, SceneConfig, scenes
from diptych.data.sources import Listed
from diptych.evaluation.segmentation import Vocabulary, measure_said, segment_source
from diptych.files import atomic_file
from diptych.methods import clip, trident
from diptych.training.loop import fit
from diptych.training.prepare import make_model
from diptych.use.segments import Segmented, render_segments


def main(out: Path = Path("runs/trident")) -> None:
    # Captions name what is there, never where it is. Every sixth picture shows nothing but the ground: "background".
    plain = SceneConfig(nouns=6, things=(1, 2), copies=1, tint_rate=0, rotation_rate=0)
    drawn = scenes("train", count=900, config=plain)
    source = Listed([drawn[row] if row % 6 else drawn.ground(row) for row in range(len(drawn))], drawn.name)
    print(source.texts(13)[0].text)
    recipe = replace(clip.mini(), data=LoaderConfig(batch_size=90), epochs=8, evaluate_every=0)
    model = make_model(recipe.model, source, seed=0)
    loader = Loader(source, model.image_policy, model.tokenizer, recipe.data)
    out.mkdir(parents=True, exist_ok=True)
    fit(clip.Objective(model, recipe.objective), loader, recipe, out, console=Console())

    test = scenes("test", count=8, config=replace(plain, size=192, things=(2, 3)))
    words = Vocabulary(tuple(NOUNS[:6]), background=("background",))
    settings = replace(trident.mini(), least_probability=0.4)
    for name, changes in {
        "segment, then splice": {"splice": "logits", "aggregate": False, "refine": False},
        "splice, gather, then segment": {"refine": False},
        "with outlines": {},
    }.items():
        labeller = trident.Adapter(replace(settings, **changes), words).fit(model)
        said = list(segment_source(labeller, test, words.classes))
        measured = measure_said([one.confusion for one in said], words.classes)
        print(f"{name}: mIoU {measured.miou}")

    pictures = [
        Segmented(
            one.sample.key, decode(one.sample.image), one.labels, class_map(one.sample, words.labels, background=True)
        )
        for one in said
    ]
    page = render_segments(
        pictures, words.classes, title="Segmented scenes", lead="No mask was learnt from.", measured=measured
    )
    with atomic_file(out.with_suffix(".html")) as file:
        file.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
