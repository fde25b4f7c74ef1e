import gzip
import io
import json
import shutil
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diptych.curate import parts as parts_module
from diptych.curate.pairs import beside, pairs_of, read_pairs, with_images
from diptych.curate.parts import (
    BAD_ROW,
    BAD_SHARD,
    NOT_FETCHED,
    NOT_JSON,
    NOT_UTF8,
    Block,
    Layout,
    Part,
    find_layout,
    find_parts,
    read,
)
from diptych.data.columns import Columns
from diptych.errors import ColumnError, DataError


def rows(spec, **options) -> list[dict]:
    """Return all rows of a source with their faults."""
    found = []
    for part in find_parts(str(spec), **options):
        for block in read(part, images=True):
            records = block.table.to_pylist() if not block.faults else [{}] * block.table.num_rows
            good = [i for i in range(block.table.num_rows) if i not in block.faults]
            for place, row in zip(good, block.table.take(np.array(good, int)).to_pylist(), strict=True):
                records[place] = row
            found += [{**record, "fault": block.faults.get(i)} for i, record in enumerate(records)]
    return found


def strings(values: list[bytes | None]) -> pa.Array:
    """Return strings that nobody has checked, as a writer in another language leaves them."""
    data = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), data.buffers())


def archive(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


class TestJsonl:
    def test_parts_hold_every_line_once(self, tmp_path):
        path = tmp_path / "a.jsonl"
        lines = [json.dumps({"id": i, "caption": "x" * (i % 17)}) for i in range(200)]
        path.write_text("\n".join(lines))  # no line end at the end
        for size in (1, 7, 26, 100, 10_000):
            assert [row["id"] for row in rows(path, part_bytes=size)] == list(range(200))

    def test_bad_lines_are_rows(self, tmp_path):
        path = tmp_path / "a.jsonl"
        good = b'{"caption": "a cat"}'
        path.write_bytes(
            b"\n".join(
                [b"\xef\xbb\xbf" + good, b'{"caption": "\xff"}', b"[1]", b"", b'{"cap', b'{"caption": "\\ud83d"}', good]
            )
        )
        assert [row["fault"] for row in rows(path)] == [None, NOT_UTF8, NOT_JSON, NOT_JSON, NOT_UTF8, None]
        assert [row.get("caption") for row in rows(path) if row["fault"] is None] == ["a cat"] * 2

    def test_ten_megabytes_of_caption(self, tmp_path, monkeypatch):
        monkeypatch.setattr(parts_module, "BATCH_BYTES", 1 << 20)
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"caption": "x" * 10_000_000}) + "\n" for _ in range(3)))
        assert [block.table.num_rows for part in find_parts(str(path)) for block in read(part)] == [1, 1, 1]


class TestParquet:
    def test_row_groups_are_parts(self, tmp_path):
        table = pa.table({"key": [str(i) for i in range(100)], "caption": ["a cat"] * 100, "jpg": [b"x" * 100] * 100})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=10, use_dictionary=False)
        found = find_parts(str(tmp_path / "a.parquet"), part_bytes=3000)
        assert len(found) > 2 and [part.start for part in found][:2] == [0, found[0].stop]
        assert [row["key"] for row in rows(tmp_path / "a.parquet", part_bytes=3000)] == table["key"].to_pylist()
        (first, *_) = read(found[0])
        assert first.table["jpg"].null_count == first.table.num_rows

    def test_text_that_is_not_utf8_spoils_its_row_only(self, tmp_path):
        table = pa.table(
            {"caption": strings([b"one", b"tw\xff", None, b"four"]), "url": strings([b"a", b"b", b"\xfe", b"d"])}
        )
        pq.write_table(table, tmp_path / "a.parquet")
        assert [row["fault"] for row in rows(tmp_path)] == [None, NOT_UTF8, NOT_UTF8, None]

    def test_damage_is_counted(self, tmp_path):
        table = pa.table({"caption": [f"a cat {i} {'x' * (i % 91)}" for i in range(4000)]})
        path = tmp_path / "a.parquet"
        pq.write_table(table, path, row_group_size=1000, use_dictionary=False, compression="gzip")
        data = bytearray(path.read_bytes())
        start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
        data[start + 40 : start + 400] = bytes(360)
        path.write_bytes(bytes(data))
        faults = [row["fault"] for row in rows(path)]
        assert (
            len(faults) == 4000
            and faults[1000:2000] == [BAD_ROW] * 1000
            and set(faults[:1000] + faults[2000:]) == {None}
        )
        path.write_bytes(bytes(data[: len(data) // 2]))  # the end, which says where everything is, has not been written
        assert [row["fault"] for row in rows(path)] == [BAD_SHARD]


class TestCsv:
    def test_rows_with_faults(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_bytes(b'id,caption\n1,"a cat, sitting"\n2,b\xffd\n3\n4,\n5,"two\nlines"\n')
        found = rows(path)
        assert [row["fault"] for row in found] == [None, NOT_UTF8, BAD_ROW, None, None]
        assert [row.get("caption") for row in found if not row["fault"]] == ["a cat, sitting", None, "two\nlines"]


class TestTar:
    MEMBERS = {  # noqa: RUF012
        "0/a.jpg": b"picture a",
        "0/a.txt": b"a cat\nthe same cat\n",
        "0/b.png": b"picture b",
        "0/b.json": b'{"caption": "a dog", "width": 3}',
        "0/c.jpg": b"picture c",
        "0/c.txt": b"\xff",
    }

    @pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz")])
    def test_samples(self, tmp_path, name, mode):
        path = archive(tmp_path / name, self.MEMBERS, mode)
        a, b, c = rows(path)
        assert (a["key"], a["image"], a["caption"]) == ("0/a", b"picture a", ["a cat", "the same cat"])
        assert (b["key"], b["image"], b["caption"], b["width"]) == ("0/b", b"picture b", ["a dog"], 3)
        assert c["fault"] == NOT_UTF8

    def test_a_shard_cut_short(self, tmp_path):
        path = archive(tmp_path / "a.tar", {**self.MEMBERS, "0/d.jpg": bytes(5000), "0/d.txt": b"a bird"})
        path.write_bytes(path.read_bytes()[: 512 * 14])
        faults = [row["fault"] for row in rows(path)]
        assert faults[:3] == [None, None, NOT_UTF8] and faults[-1] == BAD_SHARD
        path.write_bytes(b"")
        assert [row["fault"] for row in rows(path)] == [BAD_SHARD]
        path.write_bytes(gzip.compress(archive(tmp_path / "b.tar", self.MEMBERS).read_bytes())[:200])
        path = path.rename(tmp_path / "a.tar.gz")
        assert rows(path)[-1]["fault"] == BAD_SHARD


class TestImg2dataset:
    """Its three formats: tar shards, folders, parquet; what was not downloaded stands in a parquet file beside the first two."""

    @pytest.fixture
    def said(self):
        return pa.table(
            {
                "key": ["000000", "000001", "000002"],
                "url": ["http://a/1.jpg", "http://a/2.jpg", "http://a/3.jpg"],
                "caption": ["a cat", "a dog", "a bird"],
                "status": ["success", "failed_to_download", "success"],
            }
        )

    def check(self, found):
        assert [(row.get("key"), row["fault"]) for row in found if not row["fault"]] == [
            ("000000", None),
            ("000002", None),
        ]
        assert [row["fault"] for row in found if row["fault"]] == [NOT_FETCHED]
        assert [row["image"] for row in found if not row["fault"]] == [b"one", b"three"]

    def test_tar(self, tmp_path, said):
        archive(
            tmp_path / "00000.tar",
            {
                f"{k}.{e}": d
                for k, d, t in (("000000", b"one", b"a cat"), ("000002", b"three", b"a bird"))
                for e, d in (("jpg", d), ("txt", t))
            },
        )
        pq.write_table(said, tmp_path / "00000.parquet")
        (tmp_path / "00000_stats.json").write_text("{}")
        assert [part.kind for part in find_parts(str(tmp_path))] == ["tar"]
        self.check(rows(tmp_path))

    def test_files(self, tmp_path, said):
        folder = tmp_path / "00000"
        folder.mkdir()
        for key, data, text in (("000000", b"one", "a cat"), ("000002", b"three", "a bird")):
            (folder / f"{key}.jpg").write_bytes(data)
            (folder / f"{key}.txt").write_text(text)
            (folder / f"{key}.json").write_text(json.dumps({"url": "http://a"}))
        pq.write_table(said, tmp_path / "00000.parquet")
        self.check(rows(tmp_path))

    def test_parquet(self, tmp_path, said):
        pq.write_table(said.append_column("jpg", pa.array([b"one", None, b"three"])), tmp_path / "00000.parquet")
        layout = find_layout(find_parts(str(tmp_path)))
        assert (layout.text, layout.key, layout.image) == ("caption", "key", "jpg")


def test_what_a_source_can_be(tmp_path):
    with pytest.raises(DataError, match="no parquet, jsonl, csv or tar"):
        find_parts(str(tmp_path))
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text('{"caption": "a cat"}\n')
    assert [Path(part.path).name for part in find_parts(str(tmp_path))] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert [Path(part.path).name for part in find_parts(str(tmp_path / "{c,a}.jsonl"))] == ["a.jsonl", "c.jsonl"]
    (tmp_path / "d.doc").touch()
    with pytest.raises(DataError, match=r"ends in '.doc'"):
        find_parts(str(tmp_path / "d.doc"))
    with pytest.raises(ColumnError, match="No column holds captions"):
        (tmp_path / "e.jsonl").write_text('{"number": 3}\n')
        find_layout(find_parts(str(tmp_path / "e.jsonl")))
    with pytest.raises(DataError, match="Not one row"):
        (tmp_path / "f.jsonl").write_text("?\n")
        find_layout(find_parts(str(tmp_path / "f.jsonl")))
    found = find_layout(find_parts(str(tmp_path / "a.jsonl")), Columns(texts=("caption",)))
    assert found.text == "caption"


def test_names_do_not_depend_on_where_a_source_lies(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.jsonl").write_text('{"caption": "a cat"}\n' * 3)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    keys = []
    for name in ("here", "there"):
        (part,) = found = find_parts(str(tmp_path / name))
        keys.append([k for table in read_pairs(part, 0, find_layout(found)) for k in table["key"].to_pylist()])
    assert keys[0] == keys[1] == ["a.jsonl@0:0", "a.jsonl@0:1", "a.jsonl@0:2"]


class TestPairs:
    LAYOUT = Layout("caption", image="image", key="id")

    def test_a_row_per_caption(self):
        table = pa.table({"id": [7, None, 8, 9], "caption": [["a", "b"], ["c"], [], None]})
        found = pairs_of(Block(table), self.LAYOUT, "file@0", 100)
        assert found["key"].to_pylist() == ["7", "7#2", "file@0:101", "8", "9"]
        assert found["group"].to_pylist() == ["7", "7", "file@0:101", "8", "9"]
        assert found["row"].to_pylist() == [100, 100, 101, 102, 103]
        assert found["place"].to_pylist() == [0, 1, 0, 0, 0]
        assert found["caption"].to_pylist() == ["a", "b", "c", None, None]
        assert found["reason"].to_pylist() == [None, None, None, "no text", "no text"]

    def test_faults_and_columns_that_are_not_there(self):
        block = Block(pa.table({"id": strings([b"7", b"\xff", b"9"]), "caption": [1, 2, None]}), {1: NOT_UTF8})
        found = pairs_of(block, self.LAYOUT, "f@0", 0)
        assert found["key"].to_pylist() == ["7", "f@0:1", "9"] and found["caption"].to_pylist() == ["1", None, None]
        assert found["reason"].to_pylist() == [None, NOT_UTF8, "no text"]
        assert (
            pairs_of(Block(pa.table({"other": [1, 2]})), self.LAYOUT, "f@0", 0)["reason"].to_pylist() == ["no text"] * 2
        )

    def test_images_come_with_those_that_are_kept(self, tmp_path):
        (tmp_path / "1.png").write_bytes(b"from the disk")
        table = pa.table(
            {
                "id": ["a", "b", "c", "d"],
                "caption": [["x", "y"], ["z"], [], ["w"]],
                "image": ["1.png", "2.png", "1.png", "http://a/1.png"],
            }
        )
        pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
        part, layout = (
            Part("parquet", str(tmp_path / "t.parquet")),
            Layout("caption", "image", "id", folder=str(tmp_path)),
        )
        pairs = pa.concat_tables(read_pairs(part, 3, layout))
        assert pairs["number"].to_pylist() == [(3 << 40) + i for i in range(5)]
        found = pa.concat_tables(with_images(iter([pairs]), part, layout))
        assert found["image"].to_pylist() == [b"from the disk"] * 2 + [None] * 3

    def test_blocks_meet_their_pairs_wherever_they_are_cut(self, tmp_path, monkeypatch):
        rng = np.random.default_rng(0)
        table = pa.table({"id": range(50), "caption": [["t"] * int(n) for n in rng.integers(0, 4, 50)]})
        pq.write_table(table, tmp_path / "t.parquet", row_group_size=7)
        part, layout = Part("parquet", str(tmp_path / "t.parquet")), Layout("caption", key="id")
        pairs = pa.concat_tables(read_pairs(part, 0, layout))
        cuts = [0, 0, 3, 4, 40, 41, pairs.num_rows]
        pieces = (pairs.slice(a, b - a) for a, b in pairwise(cuts))
        seen = 0
        for block, own, first in beside(pieces, part):
            assert sorted(set(own["row"].to_pylist())) == list(range(first, first + block.table.num_rows))
            seen += own.num_rows
        assert seen == pairs.num_rows
