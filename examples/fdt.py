"""Put a codebook on a model that exists, train it for some seconds, and look at what its codes have come to mean.

Needs `pip install 'diptych[demo]'` for the drawings. Writes runs/concepts/concepts.html.
"""

from pathlib import Path

import diptych
from diptych.config import override
from diptych.methods import fdt
from diptych.models.codebook import suggest_temperature
from diptych.use.concepts import Extent, explore


def main(out: Path = Path("runs/concepts")) -> None:
    # 64 patches per image; a third of the codes in use at the start, as in the paper's setting.
    heads = {"codes": 256, "dim": 128, "temperature": suggest_temperature(256, 64, target_support=0.3)}
    recipe = override(
        fdt.recipe(),
        {
            "objective": {"heads": heads},
            "model": {"start": "mini"},  # our small model; its towers stay as they are
            "data": {"views": [{}]},  # no augmentation, so the towers look at each image once
            "optimizer": {"lr": 3e-3},
            "epochs": 4,
            "evaluate_every": 0,
        },
    )
    run = diptych.train("scenes:train", recipe=recipe, out=out, overwrite=True, check=False)
    page = out / "concepts.html"
    page.write_text(explore(run.model, diptych.open_source("scenes:validation"), Extent(limit=400)), encoding="utf-8")
    print(f"Open {page}: for each code the words, images and patches that ask for it most.")


if __name__ == "__main__":
    main()
