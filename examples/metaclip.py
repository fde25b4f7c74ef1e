"""Balance captions that follow Zipf's law: build a word list, match, keep, see why, and train with balance drawn anew in every epoch.

Needs `pip install 'diptych[demo]'` for the drawings. Takes some seconds; writes runs/metaclip.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diptych.claims.train import train_quietly
from diptych.curate.metadata import build_metadata, words_of, write_metadata
from diptych.curate.reasons import kept_rows
from diptych.data.sources import WithChances
from diptych.data.zipf import zipf_pool
from diptych.methods import clip
from diptych.methods.metaclip import Config, Curator


def main(out: Path = Path("runs/metaclip")) -> None:
    pool = zipf_pool(2000)
    table = pa.table({"key": [f"pair-{i}" for i in range(len(pool))], "caption": list(pool.captions)})

    # The names of all emoji in English, and the few words that a caption has around them.
    metadata = build_metadata({"emoji": words_of("emoji:en"), "words": ["a", "photo", "of", "the", "image", "sale"]})
    write_metadata(metadata, out / "metadata.parquet")
    curator = Curator(metadata, Config(threshold=20))
    found = curator.curate(table)
    pq.write_table(kept_rows(found), out / "kept.parquet")

    for reason, number in Counter(found["reason"].to_pylist()).most_common():
        print(f"{number:5} {reason or 'kept'}")
    for name, rows in (("before", table), ("after", kept_rows(found))):
        held = Counter(pool.names[pool.concepts[int(key.removeprefix("pair-"))]][0] for key in rows["key"].to_pylist())
        print(f"{name}: {len(held)} concepts, the largest {held.most_common(3)}")

    # Or keep everything and draw anew in every epoch: the frequent ones are then other ones each time.
    online = WithChances(pool, found["chance"].to_numpy())
    settings = clip.mini()
    settings = replace(settings, model=replace(settings.model, vocabulary=512), epochs=1)
    _, shown = train_quietly(settings, online, clip, seed=0)
    print(f"an epoch of {len(online):,} pairs shows {shown:,} of them")


if __name__ == "__main__":
    main()
