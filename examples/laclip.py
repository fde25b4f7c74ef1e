"""Rewrite the captions of scenes by rule, see what was kept and why, and train on originals and rewrites together.

Needs `pip install 'diptych[demo]'` for the drawings. Takes some seconds; writes runs/laclip. With `pip install 'diptych[llm]'` a language
model can rewrite instead: leave out `model=None`, and take the styles `reworded` and `short`.
"""

from dataclasses import replace
from pathlib import Path

import diptych
from diptych.config import override
from diptych.curate.rewrite import RewriteConfig, rewrite_source
from diptych.data.scenes import scenes
from diptych.methods import laclip


def main(out: Path = Path("runs/laclip")) -> None:
    table = rewrite_source(
        scenes("train", count=300),
        out / "rewritten.parquet",
        config=RewriteConfig(styles=("framed", "reordered", "both")),
        model=None,
    )
    for row in table.slice(0, 4).to_pylist():
        print(f"{row['caption'][0]}\n  rewrites: {row['rewrite']}\n  {row['verdict']}")

    # Our small model of drawings, its towers as they are; without augmentation they look at every text and image once.
    recipe = override(laclip.recipe(), {"model": {"start": "mini"}, "data": {"views": [{}]}, "evaluate_every": 0})
    source = str(out / "rewritten.parquet")
    diptych.train(source, recipe=replace(recipe, epochs=6), out=out / "run", overwrite=True, check=False)


if __name__ == "__main__":
    main()
