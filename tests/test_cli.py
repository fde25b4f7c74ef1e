import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from diptych import commands
from diptych.cli import COMMANDS, main
from diptych.methods import METHODS, clip
from tiny_run import ARCHITECTURE

TINY = {
    "epochs": 1,
    "held_out": 0.25,
    "model": {
        "start": "new",
        "architecture": ARCHITECTURE,
        "vocabulary": 300,
        "vision_mode": "full",
        "text_mode": "full",
    },
    "data": {"batch_size": 8},
}


@pytest.fixture
def call(capsys, monkeypatch):
    """Return a function that runs a command line and returns exit code, output and error stream."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory, drawings) -> Path:
    """Return a folder with photos, a small configuration and a run."""
    root = tmp_path_factory.mktemp("cli")
    (root / "photos").mkdir()
    for sample in drawings(12):
        (root / "photos" / f"{sample.key}.png").write_bytes(sample.image)
        (root / "photos" / f"{sample.key}.txt").write_text(sample.texts[0].text)
    (root / "tiny.json").write_text(json.dumps(TINY))
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "train",
                str(root / "photos"),
                "--config",
                str(root / "tiny.json"),
                "--out",
                str(root / "run"),
                "--no-check",
            ]
        )
    assert stop.value.code == 0
    return root


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_all_commands_and_methods(call, arguments):
    code, out, err = call(*arguments)
    assert (code, err) == (0, "")
    for name, explanation in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(explanation)}$", out, re.MULTILINE)
    for method in METHODS.values():
        line = "planned" if method.state == "planned" else "that work"
        assert re.search(rf"^methods {line}:.*\b{method.slug}\b", out, re.MULTILINE)


def test_version(call):
    assert call("--version") == (0, version("diptych") + "\n", "")


def test_every_command_is_a_function_or_the_table():
    assert set(COMMANDS) - {"methods"} <= set(dir(commands))


def test_methods_lists_the_table(call):
    code, out, _ = call("methods")
    assert code == 0
    for line, method in zip(out.splitlines(), METHODS.values(), strict=True):
        assert line.split()[:2] == [method.slug, method.verb] and line.endswith(method.title)
        assert f" {method.state} " in line
    assert call("methods", "--help")[0] == 0
    assert call("methods", "clip")[0] == 2


def test_unknown_command_names_the_nearest(call):
    code, out, err = call("trian", "photos")
    assert (code, out) == (2, "")
    assert "There is no command 'trian'. Did you mean 'train'?" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("command", "wrong", "right"),
    [
        ("train", "--epoch", "--epochs"),
        ("evaluate", "--modle", "--model"),
        ("doctor", "--data.batch", "--data.batch-size"),
    ],
)
def test_unknown_flag_names_the_nearest(call, command, wrong, right):
    code, _, err = call(command, "photos", wrong, "3")
    assert code == 2
    assert wrong in err and re.search(rf"{re.escape(right)}\b", err.partition("Perhaps you meant")[2])


def arguments_of(command: str) -> list[tuple[str, bool]]:
    """Return the flags that a command's function promises, and whether each is a positional argument."""
    return [
        (
            "--json" if name == "json_out" else f"--{name.replace('_', '-')}",
            parameter.kind is parameter.POSITIONAL_OR_KEYWORD,
        )
        for name, parameter in inspect.signature(getattr(commands, command)).parameters.items()
        if name not in ("recipe", "columns", "steps", "settings")  # spread over the command line
    ]


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"methods"}))
def test_help_of_a_command_explains_every_argument(call, command):
    code, out, err = call(command, "--help")
    assert (code, err) == (0, "")
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", out).split())
    function = getattr(commands, command)
    assert " ".join((inspect.getdoc(function) or "").partition("\n")[0].split()) in text
    explained = dict(re.findall(r"^    (\w+): (.*)$", inspect.getsource(function), re.MULTILINE))
    explained |= dict(re.findall(r"^        (\w+): (.*)$", inspect.getsource(function), re.MULTILINE))
    for flag, positional in arguments_of(command):
        name = "json_out" if flag == "--json" else flag.removeprefix("--").replace("-", "_")
        assert positional or f" {flag}" in f" {text}", flag
        assert explained[name][:40] in text, name


def test_help_of_train_explains_every_setting(call):
    _, out, _ = call("train", "--help")
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", out).split())

    def check(record, prefix: str) -> None:
        doc = inspect.getdoc(type(record)) or ""
        for field in fields(record):
            value, flag = getattr(record, field.name), f"--{prefix}{field.name}".replace("_", "-")
            parts = {"": value} if not isinstance(value, tuple) else {f".{i}": part for i, part in enumerate(value)}
            if parts and all(map(is_dataclass, parts.values())):
                for place, part in parts.items():
                    check(part, f"{prefix}{field.name}{place}.")
            else:
                assert flag in text, flag
                explanation = re.search(rf"{field.name}: (.*)", doc)
                assert explanation is not None and explanation[1][:40].strip() in text, flag

    check(clip.recipe(), "")
    assert "--method SLUG chooses the method; --config FILE.json" in text


def test_flags_reach_every_part_of_a_recipe(call, place, tmp_path):
    code, _, err = call(
        "train", place / "photos", "--config", place / "tiny.json", "--out", tmp_path, "--no-check",
        "--epochs=2", "--model.architecture.vision.width", 24, "--data.batch-size", 4, "--optimizer.lr", "5e-4",
    )  # fmt: skip
    assert code == 0, err
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert (recipe["epochs"], recipe["data"]["batch_size"], recipe["optimizer"]["lr"]) == (2, 4, 5e-4)
    assert recipe["model"]["architecture"]["vision"]["width"] == 24
    assert recipe["model"]["architecture"]["text"]["width"] == 16  # the rest is the file's


@pytest.mark.parametrize("flag", [["--method", "siglip"], ["--method=siglip"]])
def test_method_siglip(call, place, tmp_path, flag):
    code, _, err = call(
        "train", place / "photos", *flag, "--config", place / "tiny.json", "--out", tmp_path, "--no-check"
    )
    assert code == 0, err
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["method"] == "siglip" and recipe["model"]["architecture"]["scale"]["bias"] == -10
    assert "sigmoid" in json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["parts"]


def test_a_planned_method_says_so(call):
    code, out, err = call("train", "photos", "--method", "cloc")
    assert (code, out) == (2, "")
    assert err.startswith("diptych train: cloc (CLOC") and "is planned: there is no code for it yet" in err
    assert "What works as objective today: clip, siglip" in err
    code, _, err = call("doctor", "photos", "--method", "clp")
    assert code == 2 and "Did you mean 'clip'?" in err


@pytest.mark.parametrize("place_of_flag", ["last", "before"])
def test_json_alone_goes_to_the_output(call, place, place_of_flag):
    model = ["--model", place / "run"]
    code, out, err = call(
        "evaluate", place / "photos", *([*model, "--json"] if place_of_flag == "last" else ["--json", *model])
    )
    assert code == 0 and json.loads(out)["settings"]["images"] == 12
    assert "image_to_text/recall@1" in err  # the table is not in the way


@pytest.mark.parametrize("form", ["--json {}", "--json={}"])
def test_json_with_a_file(call, place, tmp_path, form):
    file = tmp_path / "numbers.json"
    code, out, _ = call("evaluate", place / "photos", "--model", place / "run", *form.format(file).split(" "))
    assert (code, out) == (0, "") and json.loads(file.read_text())["settings"]["images"] == 12


def test_embed_search_and_convert(call, place, tmp_path):
    index = tmp_path / "index"
    assert call("embed", place / "photos", "--model", place / "run", "--out", index)[0] == 0
    code, out, _ = call("search", index, "--image", place / "photos" / "s3.png", "--count", 2)
    assert (
        code == 0 and [line.split()[0] for line in out.splitlines()] == ["1", "2"] and "s3.png" in out.splitlines()[0]
    )
    assert call("convert", place / "run", "--out", tmp_path / "copy")[0] == 0
    assert (tmp_path / "copy" / "model.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctor", "{}/nowhere"], "There is no file or folder"),
        (["train", "{}/nowhere"], "There is no file or folder"),
        (["train", "{}/photos", "--config", "{}/nowhere.json"], "nowhere.json cannot be read as JSON"),
        (["train", "{}/photos", "--config", "{}/photos/s0.png"], "s0.png cannot be read as JSON"),
        (["evaluate", "{}/photos", "--model", "nowhere"], "There is no model 'nowhere'"),
        (["search", "{}/photos", "--text", "x"], "is no index"),
        (["search", "{}/photos"], "is no index"),
        (["embed", "{}/photos", "--model", "{}/run", "--out", "{}/tiny.json/index"], "tiny.json"),
    ],
)
def test_what_cannot_be_used_ends_with_2_and_one_line(call, place, arguments, message):
    code, out, err = call(*(argument.format(place) for argument in arguments))
    assert (code, out) == (2, "")
    assert message in err and err.splitlines()[-1].startswith(f"diptych {arguments[0]}: ") and "Traceback" not in err


def test_doctor_ends_with_1_when_it_found_errors(call, place, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    code, _, err = call("doctor", tmp_path, "--config", place / "tiny.json")
    assert code == 1 and "ERROR    3 images cannot be read" in err
    assert call("doctor", place / "photos", "--config", place / "tiny.json")[0] == 0


@pytest.mark.parametrize(
    ("command", "module", "more"), [("train", "training", " The run goes on with --resume."), ("embed", "using", "")]
)
def test_ctrl_c_ends_with_130_and_one_line(call, monkeypatch, command, module, more):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"diptych.commands.{module}.open_source", stopped)
    code, _, err = call(command, "photos", *(["--out", "x"] if command == "embed" else []))
    assert (code, err) == (130, f"diptych {command}: stopped.{more}\n")


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("command", ["methods", "--help"])
def test_a_broken_pipe_is_silent(command, unbuffered):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-m", "diptych", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment | ({"PYTHONUNBUFFERED": "1"} if unbuffered else {}),
    )
    process.stdout.close()  # the reader goes before anything is written
    assert (process.stderr.read(), process.wait()) == (b"", 0)
    process.stderr.close()
