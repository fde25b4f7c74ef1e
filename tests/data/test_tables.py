import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diptych.data.tables import from_records, join_tables, read_folder, read_table
from diptych.errors import DataError


def read(tmp_path, name: str, content: str | bytes) -> pa.Table:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_table(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'image,caption\na.jpg,"one, two"\nb.jpg,\n'),
        ("a.csv", "\ufeffimage;caption\r\na.jpg;one, two\r\n\r\nb.jpg;\r\n"),
        ("a.CSV", "image|caption\na.jpg|one, two\nb.jpg|"),
        ("a.tsv", "image\tcaption\na.jpg\tone, two\nb.jpg\t\n"),
        ("a.jsonl", '\ufeff{"image": "a.jpg", "caption": "one, two"}\n\n{"image": "b.jpg"}\n'),
        ("a.ndjson", '{"image": "a.jpg", "caption": "one, two"}\n{"image": "b.jpg", "caption": null}'),
    ],
)
def test_text_formats(tmp_path, name, content):
    assert read(tmp_path, name, content).to_pydict() == {"image": ["a.jpg", "b.jpg"], "caption": ["one, two", None]}


def test_many_rows_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("diptych.data.tables._ROWS_AT_ONCE", 3)
    found = read(tmp_path, "a.csv", "n,m\n" + "".join(f"{n},{n * n}\n" for n in range(10)))
    assert found["m"].to_pylist() == [str(n * n) for n in range(10)]
    assert found["n"].num_chunks == 4


def test_quotes_and_lines_inside_fields(tmp_path):
    found = read(tmp_path, "a.csv", 'image,caption\na.jpg,"he said ""hi""\nand left"\n')
    assert found["caption"].to_pylist() == ['he said "hi"\nand left']


def test_bare_quotes_in_tsv(tmp_path):
    found = read(tmp_path, "a.tsv", 'caption\tn\n" i went home , " he said\t1\n" the end\t2\n')
    assert found.to_pydict() == {"caption": ['" i went home , " he said', '" the end'], "n": ["1", "2"]}


def test_no_names_on_top(tmp_path):
    found = read(tmp_path, "a.tsv", "a dog\thttps://x.org/1\na cat\thttps://x.org/2\n")
    assert found.to_pydict() == {"column1": ["a dog", "a cat"], "column2": ["https://x.org/1", "https://x.org/2"]}


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        (
            "a.csv",
            "image,caption\na.jpg,one, two\n",
            r"Line 2 of .*a.csv has 3 fields, its first line has 2 .*double quotes",
        ),
        ("a.csv", "image,image\na,b\n", "names a column twice"),
        ("a.csv", 'image,caption\na.jpg,one\nb.jpg,"two\n', "Line 3 .* cannot be read: unexpected end of data"),
        ("a.csv", "image,caption\n", "has no rows"),
        ("a.csv", "", "has no rows"),
        ("a.csv", b"n\n" + b"1\n" * 9000 + b"caf\xe9\n", "Line 9002 of .* is not UTF-8"),
        ("a.csv", "image,caption\na.jpg,x\n".encode("utf-16"), "Line 1 of .* is not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', "Line 2 of .* is not UTF-8"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "Line 2 of .* is not JSON"),
        ("a.jsonl", "[1, 2]\n", "Line 1 of .* is list; each line must be one object"),
        ("a.jsonl", '{"a": "\\ud83d"}\n', "Column 'a' holds text that is no valid Unicode"),
        ("a.parquet", b"PAR1 no", "cannot be read"),
        ("a.xlsx", "", "ends in '.xlsx'. Known: a folder, .tar, .csv"),
    ],
)
def test_bad_tables(tmp_path, name, content, complaint):
    with pytest.raises(DataError, match=complaint):
        read(tmp_path, name, content)


def test_parquet_text_is_checked(tmp_path):
    bad = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"]).buffers())
    pq.write_table(pa.table({"caption": bad}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"Column 'caption' of .* is damaged: .*UTF8"):
        read_table(tmp_path / "a.parquet")


def test_mixed_values_in_records():
    found = from_records([{"a": "x", "b": 1, "c": 1}, {"a": ["y", "z"], "b": "two", "c": 2**70}, {"b": {"k": "é"}}])
    assert found["a"].to_pylist() == [["x"], ["y", "z"], None]
    assert found["b"].to_pylist() == ["1", "two", '{"k": "é"}']
    assert found["c"].to_pylist() == ["1", str(2**70), None]


def test_tables_joined(tmp_path):
    for number, columns in enumerate(({"a": ["x"], "b": [1]}, {"a": ["y"]})):
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
    found, note = read_folder(tmp_path)
    assert found.to_pydict() == {"a": ["x", "y"], "b": [1, None]}
    assert note == "2 parquet files: 0.parquet, 1.parquet."
    pq.write_table(pa.table({"a": [[1]]}), tmp_path / "2.parquet")
    with pytest.raises(DataError, match=r"The 3 tables in .* do not fit together"):
        join_tables(sorted(tmp_path.iterdir()))


def touch(folder, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_images_with_text_files(tmp_path):
    touch(tmp_path, "b.JPG", "a.jpg", "sub/c.png", "sub/._c.png", ".trash/d.png", "notes.txt")
    (tmp_path / "a.txt").write_bytes("\ufeffa dog\r\n\r\n  \na\u2028line separator\n".encode())
    (tmp_path / "sub" / "c.txt").write_text("a cat")
    found, note = read_folder(tmp_path)
    assert found.to_pydict() == {
        "image": ["a.jpg", "b.JPG", "sub/c.png"],
        "caption": [["a dog", "a\u2028line separator"], [], ["a cat"]],
    }
    assert note == "Images with text files of the same name: 2 of 3 have one."


def test_text_file_that_is_not_utf8(tmp_path):
    touch(tmp_path, "a.jpg")
    (tmp_path / "a.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"Line 2 of .*a.txt is not UTF-8"):
        read_folder(tmp_path)


def test_class_folders(tmp_path):
    touch(tmp_path, "dog/1.jpg", "dog/2.jpg", "cat/1.jpg")
    found, note = read_folder(tmp_path)
    assert found.to_pydict() == {"image": ["cat/1.jpg", "dog/1.jpg", "dog/2.jpg"], "label": ["cat", "dog", "dog"]}
    assert note == "One folder per class: cat, dog."


def test_class_folders_in_parts(tmp_path):
    touch(tmp_path, "train/dog/1.jpg", "train/cat/1.jpg", "val/dog/2.jpg")
    found, _ = read_folder(tmp_path)
    assert found["split"].to_pylist() == ["train", "train", "val"]
    assert found["label"].to_pylist() == ["cat", "dog", "dog"]


def test_images_alone(tmp_path):
    touch(tmp_path, "dog/1.jpg", "2.jpg")
    found, note = read_folder(tmp_path)
    assert found.column_names == ["image"]
    assert note == "Images without any text."


def test_one_table_describes_the_folder(tmp_path):
    touch(tmp_path, "a.jpg", "a.txt")
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,a dog\n")
    (tmp_path / "other.csv").write_text("x\n1\n")
    found, note = read_folder(tmp_path)
    assert found["caption"].to_pylist() == ["a dog"]
    assert note == "Images described by captions.csv."
    (tmp_path / "labels.jsonl").write_text(json.dumps({"image": "a.jpg"}))
    with pytest.raises(DataError, match=r"several tables \(captions.csv, labels.jsonl, other.csv\)"):
        read_folder(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match=r"holds no images"):
        read_folder(tmp_path)
