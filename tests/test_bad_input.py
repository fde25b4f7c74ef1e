"""What strangers' data and mistakes get, through the commands: a counted skip or one clear sentence, never a traceback."""

import io
import json
import pickle
import re
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from diptych import commands
from diptych.config import override
from diptych.data.sources import Columns, open_source
from diptych.errors import CheckpointError, ColumnError, ConfigError, DataError, DiptychError, ImageError, TextError
from diptych.models.checkpoint import save_model
from diptych.use.search import Index
from tiny_run import TINY, write_photos

STRICT = override(TINY, {"data": {"bad_samples": "strict"}})


@pytest.fixture
def photos(tmp_path, drawings) -> Path:
    """Return a folder of twelve good photos with captions."""
    return write_photos(tmp_path / "photos", drawings(12))


def train(source: Path | str, *, check: bool = True, recipe=TINY, **more) -> commands.TrainedRun:
    out = Path(str(source).partition(":")[0])
    return commands.train(str(source), recipe=recipe, out=out.with_name(f"{out.name}-run"), check=check, **more)


def steps(run: commands.TrainedRun) -> list[dict]:
    rows = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "loss" in row]


def add(folder: Path, name: str, image: bytes, text: str = "something odd") -> None:
    (folder / name).write_bytes(image)
    (folder / name).with_suffix(".txt").write_text(text, encoding="utf-8")


def encoded(image: Image.Image, kind: str = "PNG", **more) -> bytes:
    image.save(file := io.BytesIO(), kind, **more)
    return file.getvalue()


def blank_png(width: int, height: int) -> bytes:
    """Return a white one-bit PNG, made row by row so that it never lies in memory."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer, row = zlib.compressobj(1), b"\0" + b"\xff" * ((width + 7) // 8)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_training_goes_on_without_broken_images_and_counts_them(photos, capsys):
    good = (photos / "s0.png").read_bytes()
    photo = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "JPEG")
    for name, content in {
        "a.png": b"",
        "b.jpg": b"not an image",
        "c.png": good[:40],
        "d.jpg": photo[: len(photo) // 2],
    }.items():
        add(photos, name, content)
    run = train(photos, recipe=override(TINY, {"data": {"batch_size": 6}}))
    held, rows = run.evaluation.settings, steps(run)
    in_training = 4 - held["skipped"]
    assert held["images"] + held["skipped"] == 4 and in_training > 0
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(np.isfinite(row["loss"]) for row in rows)
    assert rows[-1]["skipped"] == 2 * in_training  # in two epochs
    html = (run.folder / "report.html").read_text()
    assert f"{in_training} images cannot be read and will be skipped." in html
    assert f"unreadable samples were skipped {rows[-1]['skipped']} times" in html
    if held["skipped"]:
        assert f"{held['skipped']} images could not be read and were left out" in html
    assert f"warning  {in_training} images cannot be read" in capsys.readouterr().err


def test_strict_stops_at_the_first_broken_image(photos):
    for i in range(6):
        add(photos, f"x{i}.png", b"")
    with pytest.raises(ImageError, match=r"Sample \d+ of photos \(training part\): .* its file is empty"):
        train(photos, recipe=STRICT, check=False)


def test_enormous_images_are_skipped_and_long_ones_are_used(photos, monkeypatch):
    decoded = []
    load = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda image: (decoded.append(image.size), load(image))[1])
    add(photos, "enormous.png", blank_png(20_000, 20_000))
    add(photos, "large.png", blank_png(12_000, 12_000))  # Pillow itself would only warn
    add(photos, "long.png", blank_png(20_000, 100))
    add(photos, "tall.png", blank_png(3, 4_000))
    index = commands.embed(str(photos), model=str(train(photos, check=False).folder), out=photos.with_name("index"))
    assert index.skipped == 2 and len(index.items) == 14
    assert {"long.png", "tall.png"} <= {item.key for item in index.items}
    assert (20_000, 100) in decoded and not {(20_000, 20_000), (12_000, 12_000)} & {*decoded}


def test_odd_kinds_of_images_train(photos):
    picture = Image.new("RGB", (30, 20), "white")
    ImageDraw.Draw(picture).rectangle((2, 2, 12, 12), fill="red")
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG"),
        "sixteen.png": encoded(Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160)),
        "palette.gif": encoded(picture.convert("P"), "GIF"),
        "alpha.png": encoded(picture.convert("RGBA")),
        "gray_alpha.png": encoded(picture.convert("LA")),
        "bits.png": encoded(picture.convert("1")),
        "turned.jpg": encoded(picture, "JPEG", exif=exif),
        "float.tiff": encoded(Image.fromarray(np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)), "TIFF"),
        "one.png": encoded(Image.new("RGB", (1, 1), "blue")),
        "photo.webp": encoded(picture, "WEBP"),
        "photo.bmp": encoded(picture, "BMP"),
    }
    for i, (name, content) in enumerate(kinds.items()):
        add(photos, f"{i}-{name}", content, f"a picture called {name}")
    run = train(photos, recipe=STRICT)
    assert steps(run)[-1]["skipped"] == run.evaluation.settings["skipped"] == 0
    index = commands.embed(str(photos), model=str(run.folder), out=photos.with_name("index"))
    assert len(index.items) == 12 + len(kinds)
    add(photos, "upright.png", encoded(picture.rotate(-90, expand=True)))
    add(photos, "lying.png", encoded(picture))
    index = commands.embed(str(photos), model=str(run.folder), out=photos.with_name("index"))
    rows = {item.key.partition("-")[2] or item.key: row for item, row in zip(index.items, index.images, strict=True)}
    upright, lying = (float(rows[name] @ rows["turned.jpg"]) for name in ("upright.png", "lying.png"))
    assert upright > 0.999 > lying


def test_empty_texts_are_skipped_and_any_script_is_learnt(photos, tmp_path):
    for name, text in {"he": "חתול אדום", "ar": "قطة حمراء", "emoji": "🐈🟥", "zwj": "👩‍👩‍👧", "th": "แมวสีแดง"}.items():
        add(photos, f"{name}.png", (photos / "s0.png").read_bytes(), text)
    add(photos, "blank.png", (photos / "s1.png").read_bytes(), " \n\t\n")
    (photos / "none.png").write_bytes((photos / "s2.png").read_bytes())
    run = train(photos, evaluate_on=str(photos))
    assert any("no text" in note for note in open_source(photos).notes)
    assert steps(run)[-1]["skipped"] > 0
    assert "2 images without a caption take no part in retrieval." in (run.folder / "report.html").read_text()
    index = tmp_path / "index"
    commands.embed(str(photos), model=str(run.folder), out=index)
    assert {"🐈🟥", "חתול אדום"} <= {text for item in Index.read(index).items for text in item.texts}
    for text in ("חתול", "🐈", "new words: żółw"):
        assert len(commands.search(index, text=text)) == 10
    with pytest.raises(TextError, match="is empty"):
        commands.search(index, text="  ")


def test_very_long_texts_are_cut_and_said_so(photos, capsys):
    add(photos, "long.png", (photos / "s0.png").read_bytes(), "word " * 5000)
    train(photos, evaluate_on=str(photos))
    assert re.search(r"warning  1 of 13 texts are longer than 16 tokens \(longest 5,?\d+\)", capsys.readouterr().err)


def test_missing_columns_name_the_nearest(photos):
    (photos / "table.csv").write_text("photo,wording\ns0.png,a red thing\ns1.png,a green thing\n")
    with pytest.raises(ColumnError, match=r"no column 'wordin'. Did you mean 'wording'\? Known: photo, wording."):
        train(photos / "table.csv", columns=Columns(texts=("wordin",)))
    with pytest.raises(ColumnError, match="no column tells parts apart"):
        train(f"{photos / 'table.csv'}:train")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"epoch": 3}, r"Recipe has no key 'epoch'. Did you mean 'epochs'\?"),
        ({"data": {"batchsize": 3}}, r"Recipe.data has no key 'batchsize'. Did you mean 'batch_size'\?"),
        ({"method": "clipp"}, "There is no method 'clipp'. Did you mean 'clip'"),
        ({"epochs": "many"}, "Recipe.epochs takes int, not 'many'"),
        ({"precision": "fp16"}, "Recipe.precision is 'fp16'.*Known: auto, bf16, fp32"),
        ({"model": 3}, "Recipe.model takes a mapping of keys, not 3"),
        ({"objective": {"multi_positiv": True}}, "Did you mean 'multi_positive'"),
    ],
)
def test_wrong_configuration_names_the_nearest(record, message):
    with pytest.raises(ConfigError, match=message):
        commands.read_recipe(record)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": 1.5}, "held_out is a share between 0 and 1, not 1.5"),
        ({"data": {"batch_size": 0}}, "batch_size must be >= 1"),
        ({"device": "gpu"}, "device is 'gpu', which torch cannot use here"),
    ],
)
def test_impossible_values_are_refused(photos, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(photos, recipe=override(TINY, changes))
    assert not photos.with_name("photos-run").exists()


def test_wrong_checkpoints_are_refused(photos, tmp_path, make_model):
    for name in ("weights.pt", "weights.bin", "model.ckpt"):
        (tmp_path / name).write_bytes(pickle.dumps({"weight": [1.0]}))
        with pytest.raises(CheckpointError, match="is a pickle file; loading one can run any code inside it"):
            commands.evaluate(str(photos), model=str(tmp_path / name))
    with pytest.raises(CheckpointError, match=r"has no model.json"):
        commands.evaluate(str(photos), model=str(photos))
    with pytest.raises(CheckpointError, match=r"There is no model 'mimi'. Did you mean 'mini'"):
        commands.evaluate(str(photos), model="mimi")
    save_model(make_model(), tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        commands.embed(str(photos), model=str(tmp_path / "cut"), out=tmp_path / "index")
    record = json.loads((tmp_path / "one" / "model.json").read_text())
    record["model"]["vision"]["width"] = 32
    (tmp_path / "one" / "model.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"does not fit its model.json"):
        commands.embed(str(photos), model=str(tmp_path / "one"), out=tmp_path / "index")
    assert not (tmp_path / "index").exists()


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "folder"])
def test_no_pickle_is_ever_opened(photos, tmp_path, name):
    trace, path = tmp_path / "trace", tmp_path / name
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists()
    trace.unlink()
    if name == "folder":
        path.mkdir()
        torch.save({"x": torch.ones(1)}, path / "pytorch_model.bin")
        (path / "model.safetensors").write_bytes(pickle.dumps(Bomb(trace)))
    else:
        path.write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(DiptychError):
        commands.evaluate(str(photos), model=str(path))
    assert not trace.exists()


def test_a_tar_that_points_outside_of_itself_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("../../evil.jpg")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(DataError, match=r"points outside of it \('../../evil.jpg'\)"):
        train(tmp_path / "a.tar")


@pytest.mark.parametrize("check", [True, False])
def test_nothing_readable_is_an_error(tmp_path, make_model, check):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        add(folder, f"{i}.png", b"\x89PNG broken", f"picture {i}")
    with pytest.raises(
        DataError, match="images cannot be read" if check else "None of the 4 samples of a batch could be used"
    ):
        train(folder, check=check)
    save_model(make_model(), tmp_path / "model")
    with pytest.raises(ImageError, match=r"None of the 6 images of photos can be read. First: 0: '0.png'"):
        commands.embed(str(folder), model=str(tmp_path / "model"), out=tmp_path / "index")


@pytest.mark.parametrize("check", [True, False])
def test_nothing_with_a_text_is_an_error(tmp_path, drawings, check):
    for sample in drawings(6):
        (tmp_path / f"{sample.key}.png").write_bytes(sample.image)
    with pytest.raises(DataError, match="have no text" if check else "has no text with a role in"):
        commands.train(str(tmp_path), recipe=TINY, out=tmp_path / "run", check=check)


def test_one_sample_is_an_error(tmp_path, drawings):
    folder = tmp_path / "photos"
    folder.mkdir()
    add(folder, "a.png", drawings(1)[0].image)
    with pytest.raises(DataError, match="photos has 1 samples; training and evaluation need at least one each"):
        train(folder)
    add(folder, "b.png", drawings(2)[1].image)
    with pytest.raises(DataError, match="A batch holds one sample, so there is nothing to contrast"):
        train(folder)


def test_a_batch_larger_than_the_data_is_all_of_it(photos):
    run = train(photos, recipe=override(TINY, {"data": {"batch_size": 4096}}))
    assert [row["step"] for row in steps(run)] == [1, 2]  # nine samples in one batch, twice


def test_a_table_that_is_not_utf8_is_refused(photos):
    (photos / "table.csv").write_bytes("image,caption\ns0.png,a café\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"Line 2 of .*table.csv is not UTF-8 text. Save the file as UTF-8."):
        train(photos / "table.csv")


def test_an_empty_folder_and_no_folder(tmp_path):
    with pytest.raises(DataError, match="holds no images"):
        commands.train(str(tmp_path), recipe=TINY, out=tmp_path / "run")
    with pytest.raises(DataError, match="There is no file or folder"):
        commands.train(str(tmp_path / "nowhere"), recipe=TINY, out=tmp_path / "run")
