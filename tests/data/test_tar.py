import io
import json
import tarfile
from pathlib import Path

import pytest

from diptych import files
from diptych.data import tar
from diptych.data.sources import open_source
from diptych.data.tar import read_tars
from diptych.errors import DataError, ImageError
from diptych.types import Text


def shard(path: Path, members: dict[str, bytes], **header) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for field, value in header.items():
                setattr(member, field, value)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_members_of_a_key_belong_together(tmp_path):
    fields = {
        "caption_de": "ein Hund",
        "caption": "overridden by the text file",
        "width": 10,
        "synthetic": ["s1", "s2"],
    }
    path = shard(
        tmp_path / "a.tar",
        {
            "d/1.jpg": b"first",
            "d/1.json": json.dumps(fields).encode(),
            "d/1.txt": "a dog 🐕\nכלב\n".encode(),
            "d/1.seg.png": b"a mask",
            "d/._1.jpg": b"litter",
            "2.txt": b"no image",
            "3.PNG": b"third",
            "3.cls": b"cat\n",
        },
    )
    source = open_source(path)
    assert [source[0].key, source[1].key] == ["d/1", "3"]
    assert [source[0].image, source[1].image] == [b"first", b"third"]
    assert source[0].texts == (
        Text("a dog 🐕"),
        Text("כלב"),
        Text("ein Hund", "translation", "de"),
        Text("s1", "synthetic"),
        Text("s2", "synthetic"),
    )
    assert source[1].texts == (Text("cat", "label"),)
    assert source[1].label == "cat"


def test_shards_of_a_folder_and_of_a_pattern(tmp_path):
    for number in range(3):
        shard(tmp_path / f"{number}.tar", {"x.jpg": b"%d" % number, "x.txt": b"text %d" % number})
    (tmp_path / "0.parquet").write_bytes(b"img2dataset puts tables beside its shards")
    folder, pattern = open_source(tmp_path), open_source(str(tmp_path / "[01].tar"))
    assert [folder[i].image for i in range(3)] == [b"0", b"1", b"2"]
    assert [folder[i].key for i in range(3)] == ["x", "x#2", "x#3"]
    assert [pattern[i].texts[0].text for i in range(len(pattern))] == ["text 0", "text 1"]
    assert "3 files, from 0.tar to 2.tar." in folder.notes


def test_a_shard_is_scanned_once_until_it_changes(tmp_path, monkeypatch):
    scanned, index = [], tar._index
    monkeypatch.setattr(files, "feature_folder", lambda: tmp_path / "kept")
    monkeypatch.setattr(tar, "_index", lambda archive, path: (scanned.append(path.name), index(archive, path))[1])
    members = {"x.jpg": b"first", "x.json": json.dumps({"caption": ["é", "\ud83d\ude00"], "n": 3}).encode()}
    one, two = (shard(tmp_path / name, members) for name in ("1.tar", "2.tar"))
    first = read_tars([one, two])
    assert scanned == ["1.tar", "2.tar"]
    assert read_tars([one, two]).equals(first) and len(scanned) == 2
    monkeypatch.setattr(tarfile, "open", lambda *args: pytest.fail("the shard was scanned"))
    assert [sample.image for sample in open_source(str(tmp_path / "[12].tar"))] == [b"first"] * 2
    monkeypatch.undo()
    monkeypatch.setattr(files, "feature_folder", lambda: tmp_path / "kept")
    changed = shard(one, {"y.jpg": b"other", "x.json": members["x.json"]})
    assert open_source(changed)[0].key == "y"
    for kept in (tmp_path / "kept" / "tar").iterdir():
        kept.write_text(kept.read_text()[:-9])  # damaged: scanned again
    assert read_tars([two])["image"][0].as_py() == first["image"][1].as_py()
    monkeypatch.setattr(files, "feature_folder", lambda: one / "no folder")  # nowhere to keep it
    assert open_source(one)[0].image == b"other"


def test_long_names(tmp_path):
    name = "folder/" * 40 + "é" * 60
    source = open_source(shard(tmp_path / "a.tar", {f"{name}.jpg": b"x"}))
    assert (source[0].key, source[0].image) == (name, b"x")


@pytest.mark.parametrize("name", ["../x.jpg", "/x.jpg", "a/../../x.jpg"])
def test_path_escape(tmp_path, name):
    with pytest.raises(DataError, match=r"points outside of it"):
        read_tars([shard(tmp_path / "a.tar", {name: b"x"})])


def test_links_are_not_followed(tmp_path):
    path = shard(tmp_path / "a.tar", {"x.jpg": b""}, type=tarfile.SYMTYPE, linkname="/etc/hostname")
    with pytest.raises(DataError, match=r"hold no images"):
        read_tars([path])


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"1.jpg": b"", "1.txt": b"caf\xe9"}, "1.txt in .* cannot be read: 'utf-8' codec"),
        ({"1.jpg": b"", "1.json": b"{"}, "1.json in .* cannot be read"),
        ({"1.jpg": b"", "1.json": b"[1]"}, "1.json in .*: it must be one object of fields, not list"),
        ({"1.txt": b"x"}, "hold no images"),
    ],
)
def test_bad_members(tmp_path, members, complaint):
    with pytest.raises(DataError, match=complaint):
        read_tars([shard(tmp_path / "a.tar", members)])


def test_cut_short_and_compressed(tmp_path):
    path = shard(tmp_path / "a.tar", {"1.jpg": b"x" * 3000, "2.jpg": b"y" * 3000})
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(DataError, match=r"may be cut short"):
        read_tars([path])
    assert source[0].image == b"x" * 3000
    path.unlink()
    with pytest.raises(ImageError, match=r"a.tar cannot be read"):
        source[0]
    path.write_bytes(b"not a tar file")
    with pytest.raises(DataError, match=r"cannot be read as a tar file"):
        read_tars([path])
    path.rename(tmp_path / "a.tar.gz")
    with pytest.raises(DataError, match=r"compressed, so it has no random access"):
        open_source(tmp_path / "a.tar.gz")
