"""Spoil real photo captions as a crawl would, curate them, and train on what was there before and after.

Needs `DIPTYCH_DATA` with flickr8k-1k and `pip install 'diptych[curate,pretrained]'`. Takes some minutes; writes runs/curate.
"""

import io
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import diptych
from diptych.curate.decontaminate import DecontaminationConfig
from diptych.curate.duplicates import ImageDuplicatesConfig
from diptych.curate.entries import BalanceConfig
from diptych.curate.pipeline import CurateConfig, curate_source
from diptych.curate.summary import markdown
from diptych.data.images import decode
from diptych.data.sources import AbstractSource, Subset
from diptych.methods import clip
from diptych.use.curation import curation_page

TRAIN, TEST, LEAKED = "flickr8k-1k:train", "flickr8k-1k:dev", 20
JUNK = ("IMG_{:04}.jpg", "click here to enlarge image {}", "<br>{}<br>", "12/11/2009 - {}")


def spoil(source: AbstractSource, test: AbstractSource) -> pa.Table:
    """Return photos with their captions, and as many rows again of what a crawl brings along."""
    rng, samples = random.Random(0), list(source)
    rows = [row(sample.image, [text.text for text in sample.texts]) for sample in samples]
    for sample in samples[:300]:
        rows.append(row(sample.image, [rng.choice(JUNK).format(rng.randrange(10_000))]))
    for sample in samples[:25]:  # some photos are everywhere
        again = decode(sample.image).resize((200, 200))
        for quality in range(40, 90, 5):
            again.save(file := io.BytesIO(), "JPEG", quality=quality)
            rows.append(row(file.getvalue(), [rng.choice(sample.texts).text]))
    rows += [row(test[index].image, [test.texts(index)[0].text]) for index in range(LEAKED)]
    rows += [row(None, ["a photo that was lost"])] * 30
    rng.shuffle(rows)
    return pa.Table.from_pylist([{"key": f"{number:06}", **one} for number, one in enumerate(rows)])


def row(image: Any, captions: list[str]) -> dict[str, Any]:
    return {"image": image, "caption": captions}


def recall(source: str, out: Path, *, shown: int) -> str:
    """Train on a source for as many samples as asked for; return recall on photos of the test part that did not leak."""
    epochs = round(shown / len(diptych.open_source(source)))
    recipe = replace(clip.recipe(), epochs=epochs, evaluate_every=0)
    run = diptych.train(source, recipe=recipe, out=out, overwrite=True, check=False)
    test = diptych.open_source(TEST)
    found = diptych.evaluate_model(run.model, Subset(test, range(LEAKED, len(test)), "photos that did not leak"))
    return str(found.headline()["image_to_text/recall@1"])


def main(out: Path = Path("runs/curate")) -> None:
    out.mkdir(parents=True, exist_ok=True)
    raw = spoil(diptych.open_source(TRAIN), diptych.open_source(TEST))
    pq.write_table(raw, out / "raw.parquet", row_group_size=100)
    config = CurateConfig(
        balance=BalanceConfig(on=False),  # every photo that is left will be seen often anyway
        image_duplicates=ImageDuplicatesConfig(on=True),
        decontaminate=DecontaminationConfig(on=True, sources=(TEST,)),
    )
    summary = curate_source(str(out / "raw.parquet"), out / "curated", config)
    (out / "report.md").write_text(markdown(summary), encoding="utf-8")
    (out / "report.html").write_text(curation_page(summary), encoding="utf-8")
    for reason, count in Counter({one.reason: one.count for one in summary.reasons}).most_common():
        print(f"{count:6} {reason}")
    for name, source in (("raw", out / "raw.parquet"), ("curated", out / "curated" / "pairs")):
        print(f"{name}: recall at 1, image to text, {recall(str(source), out / name, shown=10 * raw.num_rows)}")


if __name__ == "__main__":
    main()
