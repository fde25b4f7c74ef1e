from collections import Counter

import pytest

from diptych.data.bundles import bundle
from diptych.data.images import decode
from diptych.data.multilingual import SCENES, bilingual_photos, overhead_photos
from diptych.data.sources import open_source
from diptych.errors import DataError


@pytest.mark.data
def test_photos_in_english_and_german(data):
    photos = bilingual_photos("dev")
    assert len(photos) == 95 and "95 of 100 photos have German captions" in photos.notes[-1]
    for sample in photos:
        assert Counter((text.language, text.role) for text in sample.texts) == {
            ("en", "caption"): 5,
            ("de", "translation"): 5,
        }
    assert decode(photos[0].image).size[0] > 100
    everyone = bilingual_photos()
    (rope,) = (sample for sample in everyone if "186890601" in sample.key)
    assert rope.texts[0].text.startswith("A man in a maroon bathing suit")
    assert rope.texts[5].text == "Ein Mann schwingt sich an einem Seil über einen See."


@pytest.mark.data
def test_they_have_names(data):
    assert open_source("bilingual-photos:dev").fingerprint == bilingual_photos("dev").fingerprint
    assert open_source("overhead-photos:train").fingerprint == overhead_photos("train").fingerprint


@pytest.mark.data
def test_weak_captions_are_of_the_same_scene_and_always_the_same(data):
    photos = overhead_photos()
    assert len(photos) == len(bundle("nwpu-resisc12")) and "weak" in photos.notes[-1]
    assert [s.texts for s in photos] == [s.texts for s in overhead_photos()]
    for sample in photos:
        roles = Counter(text.role for text in sample.texts)
        assert roles == {"label": 1, **({"synthetic": 5} if sample.label in SCENES else {})}
    desert = [text.text for s in photos if s.label == "desert" for text in s.texts if text.role == "synthetic"]
    assert sum("desert" in text or "sand" in text or "yellow" in text for text in desert) > 0.8 * len(desert)
    assert len(set(desert)) > 100
    assert {len(s.texts) for s in overhead_photos(sentences=0)} == {1}


def test_without_the_bundles(monkeypatch, tmp_path):
    monkeypatch.setenv("DIPTYCH_DATA", str(tmp_path))
    for source in (bilingual_photos, overhead_photos):
        with pytest.raises(DataError, match="DIPTYCH_DATA must name the folder that holds the bundle"):
            source()
    monkeypatch.delenv("DIPTYCH_DATA")
    with pytest.raises(DataError, match="DIPTYCH_DATA is unset"):
        overhead_photos()
