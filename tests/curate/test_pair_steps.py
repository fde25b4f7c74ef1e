"""The steps that look at pairs, one behind the other in the pipeline."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from by_hand import cloud, encoded
from diptych.curate.balance import row_uniforms
from diptych.curate.decontaminate import SAME_IMAGE, DecontaminationConfig
from diptych.curate.duplicates import SIMILAR_IMAGE, SIMILAR_TEXT, ImageDuplicatesConfig, TextDuplicatesConfig
from diptych.curate.entries import BalanceConfig, MatchConfig
from diptych.curate.language import LanguageConfig
from diptych.curate.pictures import NO_IMAGE, UNREADABLE
from diptych.curate.pipeline import CurateConfig, curate_source
from diptych.curate.scores import LOW_SCORE, ScoreConfig


@pytest.fixture(scope="module")
def pairs() -> pa.Table:
    """Return 20 images with two captions each, a copy of one image and one of a caption, a missing image and a damaged one."""
    rng = np.random.default_rng(0)

    def caption() -> str:
        return " ".join("".join(map(chr, rng.integers(97, 123, 5))) for _ in range(10))

    rows = [(f"k{seed}", encoded(cloud(seed)), [caption(), caption()]) for seed in range(20)]
    rows += [
        ("copied image", encoded(cloud(8), "JPEG", quality=40), [caption()]),
        ("copied caption", encoded(cloud(77)), [rows[9][2][0].upper()]),
        ("missing", None, [caption()]),
        ("damaged", rows[5][1][:50], [caption()]),
    ]
    keys, images, captions = zip(*rows, strict=True)
    return pa.table({"key": keys, "image": pa.array(images, pa.binary()), "caption": captions})


@pytest.mark.slow
def test_every_pair_has_its_reason_however_the_source_is_cut(pairs, tmp_path):
    (tmp_path / "held-out").mkdir()
    for seed in range(3):
        (tmp_path / "held-out" / f"{seed}.png").write_bytes(encoded(cloud(seed)))
        (tmp_path / "held-out" / f"{seed}.txt").write_text(f"picture {seed}")
    config = CurateConfig(
        language=LanguageConfig(on=False),
        match=MatchConfig(on=False),
        balance=BalanceConfig(on=False),
        text_duplicates=TextDuplicatesConfig(on=True),
        image_duplicates=ImageDuplicatesConfig(on=True),
        score=ScoreConfig(on=True, model="mini", fraction=0.9),
        decontaminate=DecontaminationConfig(on=True, sources=(str(tmp_path / "held-out"),)),
    )

    def run(name: str, parts: list[pa.Table]) -> dict[str, tuple[str | None, str | None, str | None]]:
        for number, part in enumerate(parts):
            (tmp_path / name).mkdir(exist_ok=True)
            pq.write_table(part, tmp_path / name / f"{number}.parquet")
        curate_source(str(tmp_path / name), tmp_path / f"{name} out", config)
        rows = [
            row for path in (tmp_path / f"{name} out" / "reasons").iterdir() for row in pq.read_table(path).to_pylist()
        ]
        found = {row["key"]: (row["reason"], row["duplicate_of"], row["leak"]) for row in rows}
        assert len(found) == len(rows) == 44  # nothing lost, nothing twice
        return found

    found = run("whole", [pairs])
    order = pa.array(np.random.default_rng(1).permutation(pairs.num_rows))
    shuffled = pairs.take(order)
    assert run("cut", [shuffled.slice(0, 3), shuffled.slice(3, 14), shuffled.slice(17)]) == found

    counts = Counter(reason for reason, _, _ in found.values())
    assert counts[SIMILAR_TEXT] == 1 and counts[SIMILAR_IMAGE] in (1, 2)
    assert counts[NO_IMAGE] == counts[UNREADABLE] == 1
    assert counts[LOW_SCORE] == (44 - 3 - counts[SIMILAR_IMAGE]) // 10  # what is left but the best 0.9, rounded up
    first = min(("k8", "copied image"), key=lambda key: row_uniforms(pa.array([key]), 0)[0])
    assert {of for reason, of, _ in found.values() if reason == SIMILAR_IMAGE} == {first}
    leaks = {key: leak for key, (reason, _, leak) in found.items() if reason == SAME_IMAGE}
    assert leaks == {key: f"held-out: {key[1]}.png" for key in leaks}
    gone = {key for key, (reason, _, _) in found.items() if reason == LOW_SCORE}
    assert {key for key in found if key.split("#")[0] in ("k0", "k1", "k2")} == leaks.keys() | (
        gone & {"k0", "k0#2", "k1", "k1#2", "k2", "k2#2"}
    )
