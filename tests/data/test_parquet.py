import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from diptych.data import parquet
from diptych.data.columns import Columns
from diptych.data.parquet import RowGroups, read_parquet
from diptych.data.sources import open_source
from diptych.data.tables import read_table
from diptych.errors import DataError, ImageError


def blob(number: int, size: int = 1000) -> bytes:
    """Return bytes that no codec makes smaller."""
    return np.random.default_rng(number).bytes(size)


def table(start: int = 0, stop: int = 10) -> pa.Table:
    numbers = range(start, stop)
    image = [None if n % 7 == 3 else {"bytes": blob(n), "path": f"{n}.jpg"} for n in numbers]
    return pa.table({"image": image, "caption": [f"text {n}" for n in numbers], "thumb": [blob(n, 9) for n in numbers]})


@pytest.fixture
def path(tmp_path) -> Path:
    """Return a file of ten rows in row groups of three."""
    pq.write_table(table(), tmp_path / "a.parquet", row_group_size=3)
    return tmp_path / "a.parquet"


def size(groups: RowGroups) -> int:
    return sum(column.nbytes for column in groups._columns.values())


@pytest.mark.parametrize("limit", [0, 5000, 10**9])
def test_cells_are_those_of_the_whole_file_read_at_once(path, limit):
    found, whole, groups = read_parquet(path), table(), RowGroups(limit)
    assert found.column_names == whole.column_names
    assert found["caption"].equals(whole["caption"])
    for column in ("image", "thumb"):
        expected, places = whole[column].to_pylist(), found[column].to_pylist()
        for row in np.random.default_rng(0).permutation(30) % 10:
            assert groups(places[row]) == expected[row]


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.struct({"bytes": pa.binary(), "path": pa.string()})]
)
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_kinds_of_bytes(tmp_path, kind, compression):
    cells = [{"bytes": b"a", "path": None}, {"bytes": b"", "path": "x"}, None]
    if not pa.types.is_struct(kind):
        cells = [cell and cell["bytes"] for cell in cells]
    pq.write_table(pa.table({"i": pa.array(cells, kind)}), tmp_path / "a.parquet", compression=compression)
    groups = RowGroups()
    assert [groups(place) for place in read_parquet(tmp_path / "a.parquet")["i"].to_pylist()] == cells


def test_row_groups_are_read_once_while_there_is_room(path, monkeypatch):
    read, plain = [], parquet._read_group
    monkeypatch.setattr(parquet, "_read_group", lambda *key: (read.append(key[2]), plain(*key))[1])
    places, groups = read_parquet(path)["image"].to_pylist(), RowGroups(limit=6800)  # two groups of three, not three
    for row in (0, 1, 4, 2, 5, 6, 0, 3):
        groups(places[row])
        assert size(groups) <= 6800
    assert read == [0, 1, 2, 0, 1]  # group 2 took the place of 0, the one asked for longest ago
    small = RowGroups(limit=1)
    for row in (0, 1, 4):
        small(places[row])
        assert len(small._columns) == 1
    assert read[5:] == [0, 1]


def test_a_source_over_shards(tmp_path, monkeypatch):
    for number in range(3):
        pq.write_table(table(10 * number, 10 * number + 10), tmp_path / f"{number}.parquet", row_group_size=4)
    source, whole = open_source(tmp_path), pa.concat_tables(table(n, n + 10) for n in (0, 10, 20))
    expected = [cell and cell["bytes"] for cell in whole["image"].to_pylist()]
    assert [sample.image for sample in source] == expected
    assert [source.texts(i)[0].text for i in range(30)] == whole["caption"].to_pylist()
    copy = pickle.loads(pickle.dumps(source))
    assert copy.cell._columns == {} and [sample.image for sample in copy] == expected
    order = np.random.default_rng(0).permutation(30).tolist()
    loader = DataLoader(source, None, num_workers=2, sampler=order)  # workers are forked
    assert [sample.image for sample in loader] == [expected[i] for i in order]
    monkeypatch.setattr(parquet, "_read_group", lambda *key: pytest.fail("an image was read"))
    texts = open_source(tmp_path)
    assert [texts.texts(i) and texts.without_image(i).key for i in range(30)] == [f"row-{i}" for i in range(30)]


def test_large_row_groups_are_told_of(tmp_path, monkeypatch):
    for number in range(2):
        pq.write_table(table(0, 3 + 7 * number), tmp_path / f"{number}.parquet")
    assert not any("row group" in note for note in open_source(tmp_path).notes)
    monkeypatch.setattr(parquet, "REMEMBERED_BYTES", 8000)
    (note,) = [note for note in open_source(tmp_path).notes if note.startswith("A row group of ")]
    assert note.startswith("A row group of 1.parquet holds 0 MB") and "row_group_size=100" in note
    assert not any("row group" in note for note in open_source(tmp_path / "0.parquet").notes)


@pytest.mark.slow  # a spawned worker imports everything anew
def test_spawned_workers(path):
    loader = DataLoader(open_source(path), None, num_workers=2, multiprocessing_context="spawn")
    assert [sample.image for sample in loader] == [cell and cell["bytes"] for cell in table()["image"].to_pylist()]


def test_an_image_column_is_found_by_what_is_in_it(tmp_path):
    pq.write_table(pa.table({"what": ["a dog", "a cat"], "pic": [b"1", b"2"]}), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert (source[1].image, source.columns.image) == (b"2", "pic")
    pq.write_table(pa.table({"pic": [b"1", b"2"]}), tmp_path / "a.parquet")
    assert open_source(tmp_path / "a.parquet")[1].image == b"2"


def test_parts_and_captions_keep_rows_and_images_together(path):
    whole = table().append_column("split", pa.array(["a", "b"] * 5))
    pq.write_table(whole, path, row_group_size=3)
    source = open_source(f"{path}:b", columns=Columns(image="thumb"))
    assert [sample.image for sample in source] == [blob(n, 9) for n in (1, 3, 5, 7, 9)]


MEMORY = """
import sys
from pathlib import Path
from diptych.data import parquet
from diptych.data.sources import open_source
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
open_source(sys.argv[1])[0]  # what is imported late
before = peak()
source = open_source(sys.argv[2])
source.cell.limit = 8 << 20
assert sum(len(source[i].image) for i in range(len(source))) == 96 << 20
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_below_the_size_of_the_file(tmp_path):
    with pq.ParquetWriter(tmp_path / "large.parquet", pa.schema({"image": pa.binary(), "text": pa.string()})) as file:
        for n in range(48):
            file.write_table(pa.table({"image": [blob(n * 8 + i, 1 << 18) for i in range(8)], "text": ["t"] * 8}))
    pq.write_table(pa.table({"image": [b"1"], "text": ["t"]}), tmp_path / "small.parquet")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "small.parquet"), str(tmp_path / "large.parquet")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 40 << 10  # in KB; the whole is 96 MB


def test_cut_short(path):
    whole = path.read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=rf"{path} cannot be read: "):
            read_table(path)


def test_damaged_images_are_found_on_reading(path):
    pq.write_table(table(), path, row_group_size=3, compression="none")
    source = open_source(path)
    content = bytearray(path.read_bytes())
    start = content.find(blob(5))
    content[start - 4 : start] = b"\xff\xff\xff\x7f"  # the length of row 5, in group 1
    path.write_bytes(content)
    damaged = open_source(path)
    assert damaged[0].image == source[0].image == blob(0) and damaged.texts(5) == source.texts(5)
    with pytest.raises(ImageError, match=rf"Row group 1 of {path} cannot be read: .*The file is damaged"):
        damaged[5]


def test_a_file_that_was_changed_or_moved_since(path):
    source = open_source(path)
    pq.write_table(table(0, 4), path, row_group_size=1)
    with pytest.raises(ImageError, match=rf"Row group 0 of {path} cannot be read: .*was changed since it was opened"):
        source[1]
    path.unlink()
    with pytest.raises(ImageError, match=rf"Row group 3 of {path} cannot be read: "):
        source[9]
