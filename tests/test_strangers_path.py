"""What a stranger does on the first day, through the command line only: photos and a table, a model, numbers, a search, a report."""

import json

import pytest
from PIL import Image, ImageDraw

from diptych.cli import main

COLOURS = ("red", "green", "blue", "orange", "purple", "black", "brown", "pink", "cyan", "yellow")
SHAPES = ("disc", "square", "triangle", "cross", "bar")
SMALL = """
    --model.start new --model.vocabulary 400 --model.vision-mode full --model.text-mode full
    --model.architecture.image-policy.size 32 --model.architecture.vision.image-size 32
    --model.architecture.vision.width 64 --model.architecture.vision.depth 1 --model.architecture.vision.mlp-width 128
    --model.architecture.text-policy.length 16 --model.architecture.text.width 64 --model.architecture.text.depth 1
    --model.architecture.text.mlp-width 128
    --data.batch-size 24 --data.views.0.flip-rate 0 --data.views.0.crop-scale 1 1
    --epochs 60 --evaluate-every 0 --optimizer.lr 3e-3 --optimizer.ema-decay None --held-out 0.1
""".split()


def draw(colour: str, shape: str) -> Image.Image:
    image = Image.new("RGB", (120, 90), (250, 248, 240))
    canvas = ImageDraw.Draw(image)
    if shape == "disc":
        canvas.ellipse((30, 15, 90, 75), fill=colour)
    elif shape == "square":
        canvas.rectangle((30, 15, 90, 75), fill=colour)
    elif shape == "triangle":
        canvas.polygon([(60, 8), (98, 82), (22, 82)], fill=colour)
    elif shape == "cross":
        canvas.rectangle((50, 5, 70, 85), fill=colour)
        canvas.rectangle((20, 35, 100, 55), fill=colour)
    else:
        canvas.rectangle((5, 38, 115, 52), fill=colour)
    return image


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Return a function that runs a command line in a folder with fifty photos and a table with odd names."""
    (tmp_path / "holiday" / "pics").mkdir(parents=True)
    lines = ["lfd nr;Bilddatei;Was man sieht"]
    for number in range(50):
        colour, shape = COLOURS[number % 10], SHAPES[number // 10]
        draw(colour, shape).save(tmp_path / "holiday" / "pics" / f"IMG_{number:04}.jpg", quality=92)
        lines.append(f"{number};IMG_{number:04}.jpg;a {colour} {shape} on paper")
    (tmp_path / "holiday" / "export.csv").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        out, err = capsys.readouterr()
        assert stop.value.code == 0, err
        return out, err

    return run


def test_from_photos_to_a_search(call, tmp_path):
    _, said = call("train", "holiday/export.csv", *SMALL)
    assert "export.csv: 50 samples." in said
    assert "Columns: image = 'Bilddatei', texts = ('Was man sieht',)." in said
    assert "a red disc on paper" in said
    assert "Training on 45 samples, evaluating on 5 that are never trained on" in said
    run = tmp_path / "runs" / "export-clip"
    commands = [line.strip() for line in said.splitlines() if line.startswith("  diptych ")]
    assert (run / "report.html").stat().st_size > 20_000 and len(commands) == 2

    out, _ = call("evaluate", "holiday/export.csv", "--model", "runs/export-clip", "--json")
    recall = json.loads(out)["retrieval"]["text_to_image"]
    assert recall["recall@1"]["value"] >= 0.7 and recall["recall@10"]["value"] >= 0.9  # by chance 0.02 and 0.2

    _, embed, *rest = commands[0].split()
    _, said = call(embed, *rest)
    assert "50 images of 128 numbers each, computed in " in said and "are in runs/export-clip/index" in said
    held = set(_held_out(tmp_path))
    trained = [number for number in range(50) if number not in held]
    found = 0
    for number in trained[::9]:
        caption = f"a {COLOURS[number % 10]} {SHAPES[number // 10]} on paper"
        out, _ = call("search", "runs/export-clip/index", "--text", caption, "--count", "3", "--html", "found.html")
        assert len(out.splitlines()) == 3
        found += out.split()[2] == f"IMG_{number:04}.jpg"
        assert caption in (tmp_path / "found.html").read_text()
    assert found >= 4  # of five
    out, _ = call("search", "runs/export-clip/index", "--image", "holiday/pics/IMG_0017.jpg", "--count", "1")
    assert out.split()[:3] == ["1", "1.000", "IMG_0017.jpg"]


def _held_out(folder) -> list[int]:
    from diptych.data.sources import open_source
    from diptych.training.prepare import hold_out

    _, held = hold_out(open_source(folder / "holiday" / "export.csv"), 0.1, 0)
    return [int(sample.key[4:8]) for sample in held]
