import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny_run
from diptych import commands
from diptych.cli import read_config
from diptych.config import override, to_json
from diptych.data.sources import Columns
from diptych.errors import CheckpointError, ConfigError, DataError, ImageError
from diptych.models.weights import load
from diptych.use.search import Index
from tiny_run import Killed, write_photos

TINY = override(tiny_run.TINY, {"evaluate_every": 1, "save_every": 2})


@dataclass
class Place:
    """A folder of photos and a run on them."""

    photos: Path
    run: commands.TrainedRun

    def metrics(self) -> dict:
        return json.loads((self.run.folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory, drawings) -> Place:
    root = tmp_path_factory.mktemp("place")
    photos = write_photos(root / "photos", drawings(24))
    return Place(photos, commands.train(str(photos), recipe=TINY, out=root / "run"))


def train(place: Place, out: Path, **more) -> commands.TrainedRun:
    return commands.train(str(place.photos), **{"recipe": TINY, "out": out, "check": False} | more)


def numbers(folder: Path) -> dict:
    """Return metrics.json without what differs from run to run: seconds and the run's own name."""
    record = json.loads((folder / "metrics.json").read_text())
    del record["seconds"], record["settings"]["model"]
    return record


def test_a_run_directory_holds_everything(place):
    names = {path.name for path in place.run.folder.iterdir()}
    assert names == {"checkpoint", "recipe.json", "run.json", "metrics.json", "metrics.jsonl", "report.html"}
    assert {"model.json", "model.safetensors", "tokenizer.json", "training.safetensors", "training.json"} == {
        path.name for path in (place.run.folder / "checkpoint").iterdir()
    }


def test_metrics_have_the_documented_form(place):
    record = place.metrics()
    assert list(record["retrieval"]) == ["image_to_text", "text_to_image"]
    for direction in record["retrieval"].values():
        assert list(direction) == ["recall@1", "recall@5", "recall@10"]
        for number in direction.values():
            assert list(number) == ["value", "low", "high"]
            assert 0 <= number["low"] <= number["value"] <= number["high"] <= 1
    seconds = record["seconds"]
    assert list(seconds) == ["data", "train", "evaluate", "total"]
    assert all(value > 0 for value in seconds.values())
    assert seconds["total"] == pytest.approx(seconds["data"] + seconds["train"] + seconds["evaluate"], abs=0.01)
    assert record["settings"]["images"] == record["settings"]["captions"] == 6


def test_evaluate_writes_the_same_form(place, tmp_path, capsys):
    commands.evaluate(str(place.photos), model=str(place.run.folder), json_out=str(tmp_path / "new" / "e.json"))
    record = json.loads((tmp_path / "new" / "e.json").read_text())
    assert capsys.readouterr().out == ""

    def form(value):
        return {key: form(inner) for key, inner in value.items()} if isinstance(value, dict) else type(value)

    assert form(record["retrieval"]) == form(place.metrics()["retrieval"])
    assert set(record) == set(place.metrics()) and set(record["seconds"]) == set(place.metrics()["seconds"])
    assert record["settings"]["images"] == 24


def test_the_log_has_a_row_per_step_and_per_evaluation(place):
    rows = [json.loads(line) for line in (place.run.folder / "metrics.jsonl").read_text().splitlines()]
    steps, evaluations = [row for row in rows if "loss" in row], [row for row in rows if "evaluation" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]  # 18 samples, batches of 8, two epochs
    assert [row["step"] for row in evaluations] == [2, 4]
    last = place.metrics()["retrieval"]["image_to_text"]["recall@1"]["value"]
    assert evaluations[-1]["evaluation"]["image_to_text/recall@1"] == last


def test_the_record_of_a_run(place):
    record = json.loads((place.run.folder / "run.json").read_text())
    assert record["source"] == str(place.photos)
    assert (record["training"]["samples"], record["held_out"]["samples"]) == (18, 6)
    assert record["training"]["fingerprint"] != record["held_out"]["fingerprint"]
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_the_checkpoint_is_the_model_that_was_measured(place):
    saved = load(place.run.folder)
    for name, value in place.run.model.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[name], value, rtol=0, atol=0)


def test_the_report_shows_the_numbers_and_both_galleries(place):
    html = (place.run.folder / "report.html").read_text()
    value = place.metrics()["retrieval"]["text_to_image"]["recall@5"]["value"]
    assert "text_to_image/recall@5" in html and f"<strong>{value:.3f}</strong>" in html
    assert html.count('class="card"') >= 12 and html.count("data:image/webp") >= 30
    assert "18 (photos (training part))" in html and "All images can be read." in html
    assert "there are only 6 candidates, so recall@10 is 1 for every model" in html


def test_a_run_is_not_overwritten_unasked(place, tmp_path):
    before = (place.run.folder / "metrics.json").read_bytes()
    with pytest.raises(ConfigError, match=r"holds a run already. Go on with --resume, replace it with --overwrite"):
        train(place, place.run.folder)
    with pytest.raises(CheckpointError, match="holds no run to resume"):
        train(place, tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()
    assert (place.run.folder / "metrics.json").read_bytes() == before


def test_overwriting_replaces_the_run_and_nothing_else(place, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(place.run.folder, out)
    (out / "notes.txt").write_text("mine")
    (out / "index").mkdir()
    train(place, out, recipe=override(TINY, {"epochs": 1}), overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "index").exists()  # an index of the old weights would answer nonsense
    assert json.loads((out / "checkpoint" / "training.json").read_text())["step"] == 2
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3


def test_an_overwrite_that_cannot_start_leaves_the_old_run(place, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(place.run.folder, out)
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    for recipe in (override(TINY, {"model": {"start": "no-such-model"}}), override(TINY, {"data": {"batch_size": 1}})):
        with pytest.raises((CheckpointError, DataError)):
            train(place, out, recipe=recipe, overwrite=True, check=True)
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before


def test_the_recipe_of_a_run_repeats_it(place, tmp_path):
    again = commands.read_recipe(read_config(place.run.folder / "recipe.json"))
    assert again == TINY and to_json(again) == json.loads((place.run.folder / "recipe.json").read_text())
    train(place, tmp_path / "again", recipe=again)
    assert numbers(tmp_path / "again") == numbers(place.run.folder)
    one, two = load(place.run.folder).state_dict(), load(tmp_path / "again").state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_another_seed_is_another_run(place, tmp_path):
    train(place, tmp_path / "other", recipe=override(TINY, {"seed": 1}))
    one, two = load(place.run.folder), load(tmp_path / "other")
    assert not torch.equal(one.vision.position, two.vision.position)
    assert (
        numbers(tmp_path / "other")["settings"]["fingerprint"] != numbers(place.run.folder)["settings"]["fingerprint"]
    )


def test_a_killed_run_goes_on_to_the_same_end(place, tmp_path, monkeypatch):
    from diptych.training import loop

    calls = []

    def stop(state, folder, step):
        calls.append(step)
        save(state, folder, step)
        if len(calls) == 1:
            raise Killed

    save = loop.save
    monkeypatch.setattr(loop, "save", stop)
    out = tmp_path / "run"
    with pytest.raises(Killed):
        train(place, out)
    assert (out / "recipe.json").exists() and not (out / "metrics.json").exists()
    train(place, out, resume=True)
    assert calls == [2, 4]
    assert numbers(out) == numbers(place.run.folder)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2, 3, 4, 4]


def test_resuming_with_another_model_keeps_the_recipe_of_the_run(place, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(place.run.folder, out)
    wider = override(TINY, {"model": {"architecture": {"text_head": {"dim": 16}, "image_head": {"dim": 16}}}})
    with pytest.raises(CheckpointError, match=r"other parameters .* Resume with the recipe.json of that run"):
        train(place, out, recipe=wider, resume=True)
    assert commands.read_recipe(read_config(out / "recipe.json")) == TINY


def test_a_folder_for_evaluation_is_used_whole(place, tmp_path, drawings):
    other = write_photos(tmp_path / "other", drawings(12))
    run = train(place, tmp_path / "run", evaluate_on=str(other), recipe=override(TINY, {"epochs": 1}))
    record = json.loads((run.folder / "run.json").read_text())
    assert (record["training"]["samples"], record["held_out"]["samples"]) == (24, 12)
    assert run.evaluation.settings["images"] == 12


def test_evaluate_against_another_model(place, tmp_path, capsys):
    train(place, tmp_path / "other", recipe=override(TINY, {"seed": 1}))
    models = {"model": str(place.run.folder), "against": str(tmp_path / "other")}
    commands.evaluate(str(place.photos), **models, json_out="-")
    out, err = capsys.readouterr()
    record = json.loads(out)
    other = commands.evaluate(str(place.photos), model=str(tmp_path / "other"))
    for name, difference in record["difference"].items():
        side, key = name.split("/")
        assert difference["value"] == pytest.approx(
            record["retrieval"][side][key]["value"] - other.headline()[name].value, abs=1e-6
        )
        assert difference["low"] <= difference["value"] <= difference["high"]
    assert len(record["difference"]) == 6
    assert f"{models['model']} minus {models['against']}, paired over the same items:" in err


def test_every_number_is_said_beside_chance_and_compared(place, saved_model, tmp_path, drawings, capsys):
    samples = list(drawings(12))
    write_photos(tmp_path / "labelled", samples)
    rows = [f"s{i}.png,{s.texts[0].text.split()[1]},{'ab'[i % 2]}" for i, s in enumerate(samples)]
    (tmp_path / "labelled" / "list.csv").write_text("\n".join(["image,label,domain", *rows]) + "\n")
    columns = Columns(image="image", label="label", domain="domain", texts=())
    models = {"model": str(place.run.folder), "against": saved_model}
    found = commands.evaluate(str(tmp_path / "labelled" / "list.csv"), columns=columns, json_out="-", **models)
    out, err = capsys.readouterr()
    for name, chance in (("top1", 1), ("top5", 5), ("mean_per_class", 1), ("top1/a", 1), ("top1/b", 1)):
        value = (found.headline() | found.details())[f"zeroshot/{name}"]
        assert f"  zeroshot/{name:23} {value}  by guessing {chance / 6:.3f}\n" in err
        assert f"zeroshot/{name}" in json.loads(out)["difference"]


def test_a_model_against_itself_shows_no_difference(place, capsys):
    commands.evaluate(str(place.photos), model=str(place.run.folder), against=str(place.run.folder))
    assert capsys.readouterr().err.count("+0.000 [+0.000, +0.000]  no difference shown") == 6


def test_embed_then_search(place, tmp_path, capsys, drawings):
    index = commands.embed(str(place.photos), model=str(place.run.folder), out=tmp_path / "index")
    assert index.images.shape == (24, 8) and Index.read(tmp_path / "index").items == index.items
    assert "24 images of 8 numbers each" in capsys.readouterr().err
    hits = commands.search(tmp_path / "index", image=place.photos / "s5.png", count=3, html=tmp_path / "found.html")
    assert hits[0].item.key == "s5.png" and hits[0].score == pytest.approx(1, abs=1e-5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].split()[:3] == ["1", "1.000", "s5.png"]
    assert lines[0].endswith(drawings(6)[5].texts[0].text)
    html = (tmp_path / "found.html").read_text()
    assert html.count("<img") == 3 and "HIT" not in html and "MISS" not in html


def test_columns_that_were_named_are_remembered_by_the_index(place, tmp_path):
    table = place.photos.parent / "odd.csv"
    table.write_text("image,other,caption\nnone.png,photos/s0.png,a\nnone.png,photos/s1.png,b\n")
    columns = Columns(image="other")
    commands.embed(str(table), model=str(place.run.folder), out=tmp_path / "index", columns=columns)
    commands.search(tmp_path / "index", text="a red circle", html=tmp_path / "found.html")
    assert (tmp_path / "found.html").read_text().count("<img") == 2


def test_search_says_what_is_missing(place, tmp_path):
    commands.embed(str(place.photos), model=str(place.run.folder), out=tmp_path / "index")
    with pytest.raises(ImageError, match=r"no image file .*nope.png"):
        commands.search(tmp_path / "index", image=tmp_path / "nope.png")


def test_convert_to_diptych_gives_the_same_model(place, tmp_path):
    commands.convert(str(place.run.folder), out=tmp_path / "copy")
    one, two = load(place.run.folder).state_dict(), load(tmp_path / "copy").state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one) and one.keys() == two.keys()
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        "model.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_the_doctor_finds_good_samples_good(place, capsys):
    diagnosis = commands.doctor(str(place.photos), recipe=TINY)
    assert diagnosis.healthy
    said = capsys.readouterr().err
    assert "photos: 24 samples." in said and "  ok       All images can be read." in said


def test_the_doctor_finds_errors_and_training_stops_before_it_writes(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
        (tmp_path / f"{i}.txt").write_text("words")
    assert not commands.doctor(str(tmp_path), recipe=TINY).healthy
    with pytest.raises(DataError, match="doctor found errors: 4 images cannot be read"):
        commands.train(str(tmp_path), recipe=TINY, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_labels_alone_are_measured_by_zero_shot(place, tmp_path):
    for i, sample in enumerate(place.photos.glob("*.png")):
        target = tmp_path / "classes" / ("even", "odd")[i % 2] / sample.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sample, target)
    run = commands.train(str(tmp_path / "classes"), recipe=TINY, out=tmp_path / "run", check=False)
    record = json.loads((run.folder / "metrics.json").read_text())
    assert "retrieval" not in record and record["settings"]["classes"] == 2
    assert record["chance"] == {"zeroshot/top1": 0.5}
    assert "Image to text" not in (run.folder / "report.html").read_text()


def test_samples_that_only_have_images_cannot_be_trained_on(tmp_path):
    for i in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    with pytest.raises(DataError, match="doctor found errors: 3 samples have no text"):
        commands.train(str(tmp_path), recipe=TINY, out=tmp_path / "run")
