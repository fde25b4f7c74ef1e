import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from diptych.data.tokenizer import Tokenizer
from diptych.errors import CheckpointError, ConfigError
from diptych.models import checkpoint
from diptych.models.build import build
from diptych.models.checkpoint import load_model, save_model
from diptych.models.dual import DualEncoder, ScaleConfig
from diptych.models.embedding import embed_images, embed_texts
from diptych.models.foreign import HFTextConfig, TimmConfig, load_source
from diptych.models.modes import set_mode
from diptych.models.weights import load
from diptych.types import Sample

WORDS = ["a red circle", "A  blue Square"]


def sample() -> Sample:
    """Return an image that each resize, interpolation and background treats otherwise: wide, noisy and half transparent."""
    pixels = np.random.default_rng(0).integers(256, size=(23, 40, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return Sample("s", file.getvalue(), (), "s")


def assert_same(found: DualEncoder, expected: DualEncoder, *, atol: float = 0) -> None:
    torch.testing.assert_close(embed_images(found, [sample()]), embed_images(expected, [sample()]), rtol=0, atol=atol)
    torch.testing.assert_close(embed_texts(found, WORDS), embed_texts(expected, WORDS), rtol=0, atol=atol)


def edit(folder: Path, change) -> None:
    record = json.loads((folder / "model.json").read_text())
    change(record)
    (folder / "model.json").write_text(json.dumps(record))


@pytest.fixture
def model(make_model) -> DualEncoder:
    return make_model()


@pytest.fixture
def saved(model, tmp_path) -> Path:
    save_model(model, tmp_path / "saved")
    return tmp_path / "saved"


# --- there and back ---


def test_a_saved_model_comes_back(model, saved):
    found = load_model(saved)
    assert_same(found, model)
    assert found.config == model.config and not found.training
    assert {p.name for p in saved.iterdir()} == {"model.json", "model.safetensors", "tokenizer.json"}
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


def test_preprocessing_travels_with_the_weights(make_model, tmp_path):
    plain = make_model()
    image_policy = replace(
        plain.image_policy, resize="pad", interpolation="nearest", mean=(0.1, 0.2, 0.3), background=(0, 255, 0)
    )
    text_policy = replace(plain.config.text_policy, clean="canonicalize", length=6, begin=None)
    config = replace(plain.config, image_policy=image_policy, text_policy=text_policy, scale=ScaleConfig(2.0, -3.0))
    model = build(config, plain.tokenizer)
    model.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.equal(embed_images(model, [sample()]), embed_images(plain, [sample()]))
    assert not torch.equal(embed_texts(model, WORDS), embed_texts(plain, WORDS))
    save_model(model, tmp_path / "m")
    found = load_model(tmp_path / "m")
    assert_same(found, model)
    assert found.image_policy == image_policy and found.tokenizer.policy == text_policy
    assert found.bias.item() == -3


def test_half_is_half_the_size_and_nearly_the_same(model, saved, tmp_path):
    save_model(model, tmp_path / "half", half=True)
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in ("saved", "half")}
    sizes = {name: sum(value.nbytes for value in found.values()) for name, found in weights.items()}
    assert sizes["half"] * 2 == sizes["saved"]
    found = load_model(tmp_path / "half")
    assert_same(found, model, atol=2e-3)
    assert all(parameter.dtype == torch.float32 for parameter in found.parameters())


def test_a_run_directory_and_its_checkpoint_are_the_same_model(model, tmp_path):
    save_model(model, tmp_path / "run" / "checkpoint")
    for spec in (tmp_path / "run", str(tmp_path / "run"), tmp_path / "run" / "checkpoint"):
        assert_same(load(spec), model)


def test_low_rank_updates_are_merged(model, tmp_path):
    names = set(model.state_dict())
    set_mode(model.vision, "lora")
    set_mode(model.text, "lora")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_model(model, tmp_path / "m")
    assert set(load_file(tmp_path / "m" / "model.safetensors")) == names
    assert_same(load_model(tmp_path / "m"), model, atol=1e-5)


# --- towers of installed packages ---


@pytest.fixture(scope="module")
def pretrained() -> DualEncoder:
    return load("lite0-minilm", offline=True)


@pytest.fixture
def frozen(pretrained) -> DualEncoder:
    for tower in (pretrained.vision, pretrained.text):
        set_mode(tower, "frozen")
    return pretrained


def test_frozen_towers_of_packages_are_left_out(frozen, tmp_path):
    save_model(frozen, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    assert {name.partition(".")[0] for name in weights} == {"image_head", "text_head", "log_scale"}
    assert not (tmp_path / "m" / "tokenizer.json").exists()
    assert sum(path.stat().st_size for path in (tmp_path / "m").iterdir()) < 10e6  # the towers have 100 MB
    assert_same(load_model(tmp_path / "m"), frozen)


def test_a_tower_that_was_trained_is_kept_even_if_frozen_later(frozen, tmp_path):
    bias = frozen.text.model.encoder.layer[0].output.dense.bias
    original = bias.detach().clone()
    with torch.no_grad():
        bias.add_(1)
    try:
        save_model(frozen, tmp_path / "m")
        weights = load_file(tmp_path / "m" / "model.safetensors")
        found = load_model(tmp_path / "m")
        assert_same(found, frozen)
    finally:
        with torch.no_grad():
            bias.copy_(original)
    assert torch.equal(weights["text.model.encoder.layer.0.output.dense.bias"], original + 1)
    assert not any(name.startswith("vision.") for name in weights)


def test_a_tower_that_learns_is_kept(frozen, tmp_path):
    set_mode(frozen.vision, "full")
    save_model(frozen, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    assert sum(name.startswith("vision.") for name in weights) == len(frozen.vision.state_dict())
    assert not any(name.startswith("text.") for name in weights)


def test_a_frozen_tower_without_a_package_is_kept(make_model, tmp_path):
    model = make_model()
    vision = TimmConfig("test_vit")
    model = build(replace(model.config, vision=vision), model.tokenizer)
    for tower in (model.vision, model.text):
        set_mode(tower, "frozen")
    save_model(model, tmp_path / "m")
    assert set(load_file(tmp_path / "m" / "model.safetensors")) == set(model.state_dict())


def test_a_text_tower_from_a_folder_outlives_the_folder(make_model, bert, tmp_path):
    folder = shutil.copytree(bert[1], tmp_path / "bert")
    model = make_model()
    model = build(
        replace(model.config, text=HFTextConfig(str(folder))), Tokenizer.train(WORDS, vocabulary=300, length=16)
    )
    load_source(model.text)
    save_model(model.eval(), tmp_path / "m")
    save_model(model, tmp_path / "old")
    edit(tmp_path / "old", lambda record: record.pop("text"))  # as checkpoints were written before
    assert_same(load_model(tmp_path / "old"), model)
    shutil.rmtree(folder)
    found = load_model(tmp_path / "m")
    assert_same(found, model)
    assert found.config == model.config and found.fingerprint == model.fingerprint
    save_model(found, tmp_path / "again")
    assert_same(load_model(tmp_path / "again"), model)
    with pytest.raises(CheckpointError, match=r"needs a folder with the config.json of a transformers model"):
        load_model(tmp_path / "old")


# --- what cannot be loaded ---


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".pkl", ".ckpt"])
def test_pickles_are_refused_and_not_run(tmp_path, suffix):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / f"model{suffix}").write_bytes(pickle.dumps(Bomb()))
    for function in (load_model, load):
        with pytest.raises(CheckpointError, match=r"is a pickle file; .*Convert it to safetensors"):
            function(tmp_path / f"model{suffix}")
    assert not (tmp_path / "ran").exists()


def test_weights_without_their_preprocessing_are_refused(saved):
    (saved / "model.json").unlink()
    for function in (load_model, load):
        with pytest.raises(CheckpointError, match=r"has no model\.json.*without their preprocessing"):
            function(saved)


@pytest.mark.parametrize("number", [2, None])
def test_another_format_is_refused(saved, number):
    edit(saved, lambda record: record.update(format=number))
    with pytest.raises(CheckpointError, match=f"has format {number}; this diptych reads 1"):
        load_model(saved)


def test_a_missing_tokenizer_is_refused(saved):
    (saved / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        load_model(saved)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_file_cut_short_is_named(saved, name, share):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read: .*Use an earlier checkpoint"):
        load_model(saved)


def test_missing_weights_are_named(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("vision.position"), r"lacks vision\.position \(1 differences\)"),
        (lambda w: w.update(extra=torch.ones(1)), r"has an unknown extra \(1 differences\)"),
        (
            lambda w: w.update({"text.position": torch.ones(17, 16), "log_scale": torch.ones(1)}),
            r"has log_scale of shape \(1,\) instead of \(\) \(2 differences\)",
        ),
    ],
)
def test_weights_of_another_model_are_refused(saved, change, message):
    weights = load_file(saved / "model.safetensors")
    change(weights)
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"does not fit its model\.json: it {message}"):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["vision"].update(widht=16), r"DualConfig\.vision has no key 'widht'\. Did you mean 'width'"),
        (lambda m: m["text"].update(pool="ends"), r"DualConfig\.text\.pool is 'ends'\. Did you mean 'end'"),
        (lambda m: m["vision"].update(kind="VisionConf"), r"needs a `kind`.*Did you mean 'VisionConfig'"),
        (lambda m: m["image_policy"].update(mean=[0.5]), r"DualConfig\.image_policy\.mean takes 3 values, not 1"),
        (lambda m: m["vision"].update(width="wide"), r"DualConfig\.vision\.width takes int, not 'wide'"),
    ],
)
def test_a_wrong_word_in_the_record_is_named(saved, change, message):
    edit(saved, lambda record: change(record["model"]))
    with pytest.raises(ConfigError, match=message):
        load_model(saved)


# --- what happens on the way to the disk ---


def test_a_full_disk_leaves_the_old_model(model, saved, make_model, monkeypatch):
    def full(weights, path):
        Path(path).write_bytes(b"half a")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(make_model(1), saved)
    assert_same(load_model(saved), model)
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


KILLED = """
import os, signal, sys
from pathlib import Path

import torch

from diptych.models.checkpoint import load_model, save_model

torch.set_num_threads(1)
root = Path(sys.argv[1])
old, new = load_model(root / "old"), load_model(root / "new")
seen, fatal = 0, None

def watch(event, arguments):
    global seen
    if event.startswith(("open", "os.", "shutil.")) and any(str(root) in str(argument) for argument in arguments):
        seen += 1
        if seen == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
for number in range(1, 200):
    folder = root / str(number) / "model"
    save_model(old, folder)
    child = os.fork()
    if child == 0:
        seen, fatal = 0, number
        save_model(new, folder)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
"""


def test_a_save_killed_at_any_moment_leaves_a_whole_model(make_model, tmp_path):
    """Kill a process that replaces a model at each of its file operations in turn, until it gets through."""
    old, new = make_model(0), make_model(1)
    save_model(old, tmp_path / "old")
    save_model(new, tmp_path / "new")
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True, timeout=120)
    folders = sorted((path for path in tmp_path.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    states = []
    for folder in folders:
        found = load(folder / "model")
        matches = [name for name, model in (("old", old), ("new", new)) if equal(found, model)]
        assert len(matches) == 1
        states.append((matches[0], (folder / "model").exists()))
    assert states == sorted(states, key=lambda state: ("old", "new").index(state[0]))  # old, then new, never back
    assert {("old", True), ("old", False), ("new", True)} <= set(states)
    save_model(new, folders[0] / "model")  # what a kill left behind does not stand in the way
    assert equal(load(folders[0] / "model"), new)


def equal(one: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items())
