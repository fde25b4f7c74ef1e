"""Link pictures of worn labels to a clean list: `diptych link` reads a table of pictures that has no texts by itself.

Needs `pip install 'diptych[demo,plot,ocr]'`. Takes some ten seconds; writes runs/link_scans. From a shell the last step is
`diptych link scans.csv register.csv --ocr line --out links.csv --html links.html`.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from diptych import commands
from diptych.claims.lines import LEGIBLE, print_line
from diptych.claims.names import FACES, LATIN, entities


def main(out: Path = Path("runs/link_scans"), model: str = "auto", count: int = 60) -> None:
    # Each name is on one worn label; every fifth of them is not in the register. Both tables say in `group` which name it is, so that half of
    # the labels choose threshold and image weight, and the other half says how well that links. Leave `group` out where nobody knows.
    named = list(entities("test", seed=0, languages=LATIN).items())[:count]
    rng = np.random.default_rng(0)
    (out / "scans").mkdir(parents=True, exist_ok=True)
    scans = []
    for number, (name, _) in named:
        picture = f"scans/{number}.png"
        Image.fromarray(print_line(name, FACES[rng.integers(len(FACES))], LEGIBLE, rng)).save(out / picture)
        scans.append((picture, f"name {number}"))
    write(out / "scans.csv", ("image", "group"), scans)
    register = [(number, name, f"name {number}") for number, (name, _) in named if number % 5]
    write(out / "register.csv", ("key", "text", "group"), register)

    linked = commands.link(
        str(out / "scans.csv"),
        str(out / "register.csv"),
        model=model,
        ocr="line",
        out=out / "links.csv",
        html=out / "links.html",
    )
    assert linked.scores is not None
    print(f"F1 of links {linked.scores.f1}")


def write(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


if __name__ == "__main__":
    main()
