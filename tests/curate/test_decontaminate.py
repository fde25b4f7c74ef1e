import numpy as np
import pyarrow as pa
import pytest

from by_hand import cloud, encoded
from diptych.curate import decontaminate
from diptych.curate.decontaminate import (
    NEAR_IMAGE,
    SAME_IMAGE,
    SAME_WORDS,
    Decontamination,
    DecontaminationConfig,
)
from diptych.curate.pictures import NO_IMAGE, UNREADABLE
from diptych.data.sources import open_source
from diptych.errors import ConfigError, DataError

HELD_OUT = "Two brown dogs are running along the wet beach at dawn"


@pytest.fixture
def held_out(tmp_path):
    """Return a folder with five images and their captions."""
    for seed in range(5):
        (tmp_path / f"{seed}.png").write_bytes(encoded(cloud(seed)))
        (tmp_path / f"{seed}.txt").write_text(f"{HELD_OUT} {seed}")
    return tmp_path


def curate(table: pa.Table, *sources, **settings) -> list[tuple[str | None, str | None]]:
    config = DecontaminationConfig(True, tuple(map(str, sources)), **settings)
    found = Decontamination(config).curate(table)
    return list(zip(found["reason"].to_pylist(), found["leak"].to_pylist(), strict=True))


def pairs(*rows: tuple[bytes | None, str | None]) -> pa.Table:
    images, captions = zip(*rows, strict=True)
    return pa.table(
        {"key": [f"k{i}" for i in range(len(rows))], "image": pa.array(images, pa.binary()), "caption": captions}
    )


def test_planted_leaks_are_found_and_nothing_else(held_out):
    clean = [(encoded(cloud(seed)), f"something else altogether, number {seed}") for seed in range(100, 160)]
    leaks = [(encoded(cloud(seed), "BMP"), "x") for seed in range(5)]
    leaks += [(encoded(cloud(seed), "JPEG", quality=40), "x") for seed in range(5)]
    leaks += [(encoded(cloud(seed).resize((150, 100))), "x") for seed in range(5)]
    leaks += [(encoded(cloud(200 + seed)), f"Photo: {HELD_OUT.upper()}!") for seed in range(5)]
    found = curate(pairs(*clean, *leaks), held_out)
    assert found[:60] == [(None, None)] * 60  # precision 1
    assert [reason for reason, _ in found[60:]] == [SAME_IMAGE] * 5 + [NEAR_IMAGE] * 10 + [SAME_WORDS] * 5  # recall 1
    for place in range(15):
        assert found[60 + place][1].startswith(f"{held_out.name}: ") and f"{place % 5}" in found[60 + place][1][-6:]


def test_runs_of_words_as_by_looking_for_each(held_out):
    rng, words = np.random.default_rng(0), HELD_OUT.split()
    captions = []
    for _ in range(300):
        start, length = rng.integers(0, len(words)), rng.integers(1, len(words) + 1)
        captions.append(" ".join(["see", *words[start : start + length], "there"]))
    folded = f" {HELD_OUT.lower()} "
    for length in (1, 3, 8):
        found = curate(pairs(*((None, caption) for caption in captions)), held_out, images=False, words=length)
        for caption, (reason, _) in zip(captions, found, strict=True):
            own = caption.lower().split()
            runs = [" ".join(own[i : i + length]) for i in range(len(own) - length + 1)]
            assert (reason == SAME_WORDS) == any(f" {run} " in folded for run in runs)


def test_short_captions_prove_nothing(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(cloud(0)))
    (tmp_path / "a.txt").write_text("a dog")
    assert curate(pairs((None, "a dog")), tmp_path, images=False) == [(None, None)]


def test_images_with_faults_and_rows_that_are_gone(held_out):
    table = pairs((None, "x"), (encoded(cloud(0))[:80], "x"), (encoded(cloud(0)), "x"), (None, HELD_OUT))
    table = table.append_column("reason", pa.array([None, None, "too long", None], pa.string()))
    found = curate(table, held_out)
    assert [reason for reason, _ in found] == [NO_IMAGE, UNREADABLE, "too long", NO_IMAGE]
    assert [leak for _, leak in found] == [None] * 4


def test_all_captions_go_with_an_image_and_only_one_with_its_words(held_out):
    table = pairs(
        (encoded(cloud(0)), "x"), (encoded(cloud(0)), "y"), (encoded(cloud(9)), HELD_OUT), (encoded(cloud(9)), "y")
    )
    table = table.append_column("group", pa.array(["a", "a", "b", "b"]))
    assert [reason for reason, _ in curate(table, held_out)] == [SAME_IMAGE, SAME_IMAGE, SAME_WORDS, None]


def test_evaluation_images_that_cannot_be_read_are_said(held_out):
    (held_out / "3.png").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="1 of 5 images"):
        found = curate(pairs((encoded(cloud(3)), "x"), (encoded(cloud(4)), "x")), held_out)
    assert [reason for reason, _ in found] == [None, SAME_IMAGE]


def test_evaluation_sets_are_opened_once(held_out, monkeypatch):
    opened = []
    monkeypatch.setattr(decontaminate, "open_source", lambda spec: opened.append(spec) or open_source(spec))
    step = Decontamination(DecontaminationConfig(True, (str(held_out),)))
    assert not opened  # not before the first table
    for _ in range(3):
        step.curate(pairs((None, "x")))
    assert opened == [str(held_out)]


def test_settings_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="Name them with `sources`"):
        DecontaminationConfig(on=True)
    with pytest.raises(ConfigError, match="bits lies in 0 to 16"):
        DecontaminationConfig(bits=20)
    with pytest.raises(DataError):
        curate(pairs((None, "x")), tmp_path / "absent")


@pytest.mark.data
def test_a_bundle_against_its_own_other_half():
    """Images and captions of the part held out leak, those of the other do not."""
    held, other = open_source("flickr8k-1k:dev"), open_source("flickr8k-1k:train")
    rows = [(source[i].image, source[i].texts[0].text) for source in (held, other) for i in range(20)]
    assert curate(pairs(*rows), "flickr8k-1k:dev", words=None)[:20] == [
        (SAME_IMAGE, f"flickr8k-1k:dev: {held[i].key}") for i in range(20)
    ]
    assert [reason for reason, _ in curate(pairs(*rows), "flickr8k-1k:dev")[20:]] == [None] * 20
