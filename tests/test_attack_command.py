"""`diptych attack`, on drawings and tiny models."""

import json
from dataclasses import replace

import pytest
import torch

from diptych import commands
from diptych.cli import main
from diptych.data.sources import Listed
from diptych.data.words import UniversalWord
from diptych.errors import ConfigError
from diptych.methods import c_pgc, gama
from diptych.models.checkpoint import save_model
from diptych.models.perturbation import load_perturbation, sign_noise
from diptych.types import Text
from tiny_run import write_photos

NOISE = c_pgc.Config(steps=2, batch_size=3, captions=1, filters=((32,), (8,)), z_dim=4, scales=())
NETWORK = gama.Config(steps=2, batch_size=3, width=2, blocks=1, middle=0)


@pytest.fixture
def models(make_model, tmp_path) -> tuple[str, str]:
    for seed in (0, 1):
        save_model(make_model(seed), tmp_path / f"model{seed}")
    return str(tmp_path / "model0"), str(tmp_path / "model1")


@pytest.fixture
def photos(drawings, tmp_path) -> str:
    pairs = ("a cat and a dog", "a dog and a bus", "a bus and a cat")
    samples = [replace(s, texts=(Text(f"{pairs[n % 3]} {n}"),)) for n, s in enumerate(drawings(10))]
    return str(write_photos(tmp_path / "photos", Listed(samples)))


def test_a_noise_is_learnt_measured_kept_and_shown(photos, models, tmp_path, capsys):
    place = {name: tmp_path / f"a.{name}" for name in ("png", "html", "json")}
    reports = commands.attack(
        photos,
        settings=NOISE,
        model=models[0],
        victims=(models[1],),
        out=place["png"],
        html=place["html"],
        json_out=str(place["json"]),
    )
    said = capsys.readouterr().err
    assert "Learning from 8 samples" in said and "eps 12/255" in said
    assert [report.clean.settings["images"] for report in reports.values()] == [2, 2]
    assert [name.split(" on ")[0] for name in reports] == list(models)
    record = json.loads(place["json"].read_text())
    assert list(record) == list(reports) and {one["eps"] for one in record.values()} == {12}
    noise = load_perturbation(place["png"])
    assert noise.delta.shape == (3, 16, 16) and 0 < noise.delta.abs().max() <= 12 / 255
    page = place["html"].read_text()
    assert all(words in page for words in ("lost to the attack", "random noise", "temperature", models[1]))


def test_what_was_learnt_before_is_only_measured(photos, models, tmp_path, capsys):
    sign_noise(16, 5).save(tmp_path / "others.npy")
    reports = commands.attack(photos, settings=NOISE, model=models[0], perturbation=tmp_path / "others.npy")
    assert "Learning" not in capsys.readouterr().err
    (report,) = reports.values()
    assert report.clean.settings["images"] == 10
    assert report.eps == pytest.approx(5)


def test_other_samples_leave_the_source_whole(photos, models, capsys):
    (report,) = commands.attack(
        photos, settings=NETWORK, method="gama", model=models[0], on=(photos,), json_out="-"
    ).values()
    said = capsys.readouterr()
    assert "Learning from 10 samples" in said.err
    assert report.clean.settings["images"] == 10
    assert next(iter(json.loads(said.out).values()))["eps"] == 10


def test_equal_commands_give_equal_numbers(photos, models, tmp_path):
    found = []
    for name in ("a", "b"):
        out = tmp_path / f"{name}.safetensors"
        reports = commands.attack(photos, settings=NOISE, model=models[0], out=out)
        found.append((load_perturbation(out).delta, [report.success() for report in reports.values()]))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_a_word_is_learnt_kept_and_measured_beside_the_noise(photos, models, tmp_path, capsys):
    both = replace(NOISE, word=True, word_filters=((32,), (8,)), word_z_dim=4)
    place = {name: tmp_path / f"pair.{name}" for name in ("safetensors", "html", "png")}
    with pytest.raises(ConfigError, match=r"holds both; not as pair\.png"):
        commands.attack(photos, settings=both, model=models[0], out=place["png"])
    assert "Learning" not in capsys.readouterr().err
    settings = {"model": models[0], "victims": (models[1],), "on": (photos,)}
    (alone, _) = commands.attack(photos, settings=NOISE, **settings).values()
    found = commands.attack(photos, settings=both, out=place["safetensors"], html=place["html"], **settings)
    said, word = capsys.readouterr().err, load_perturbation(place["safetensors"]).word
    assert word is not None and f"The word is {word.word!r}." in said
    first = f"{models[0]} on photos"
    assert list(found)[:3] == [first, f"{first}, word", f"{first}, noise and word"] and len(found) == 6
    assert found[first].success() == alone.success() and found[first].noise_success() == alone.noise_success()
    page = place["html"].read_text()
    assert f"becomes &#x27;{word.word}&#x27;" in page and "lost to random noise and word" in page
    again = commands.attack(photos, settings=NOISE, perturbation=place["safetensors"], **settings)
    assert {name: one.success() for name, one in again.items()} == {name: one.success() for name, one in found.items()}


def test_a_word_without_captions_is_said_to_have_no_place(models, drawings, tmp_path, capsys):
    for number, sample in enumerate(drawings(6)):
        place = tmp_path / "classes" / ("dot", "square")[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(sample.image)
    pair = replace(sign_noise(16, 5), word=UniversalWord("red"))
    pair.save(tmp_path / "pair.safetensors")
    found = commands.attack(
        str(tmp_path / "classes"),
        settings=NOISE,
        model=models[0],
        perturbation=tmp_path / "pair.safetensors",
        html=tmp_path / "a.html",
    )
    assert len(found) == 1 and "'red'. There are no captions" in capsys.readouterr().err
    assert "Captions" not in (tmp_path / "a.html").read_text()


def test_the_command_line_spreads_the_settings_of_a_method(photos, models, tmp_path, capsys):
    flags = "--steps 1 --batch-size 2 --width 2 --blocks 1 --middle 0 --eps 3".split()
    arguments = ["attack", photos, "--method", "gama", "--model", models[0], *flags]
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*arguments, "--out", str(tmp_path / "g.safetensors")])
    assert gama.read(tmp_path / "g.safetensors").eps == 3
    assert "eps 3/255" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["attack", photos, "--model", models[0], "--eps", "0.04", "--steps", "1"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "8/255 is 8" in said
