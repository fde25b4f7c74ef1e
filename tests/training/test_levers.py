"""What makes steps cheaper: switched off it changes nothing, switched on it does what it says and a run resumes exactly."""

import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from diptych.data.loader import Loader, LoaderConfig
from diptych.errors import ConfigError
from diptych.losses.contrastive import info_nce
from diptych.models.dual import DualEncoder
from diptych.models.modes import set_mode
from diptych.training.levers import SpeedConfig, levers, shrink, side_at
from diptych.training.log import read_rows
from diptych.training.loop import fit
from diptych.training.optim import OptimizerConfig
from diptych.training.recipe import Recipe, repeats
from diptych.types import Batch, Losses, PairEmbeddings, Tokens, TowerOutput
from diptych.verbs import AbstractObjective
from tiny_run import Killed

RECIPE = Recipe(
    "plain",
    None,
    data=LoaderConfig(batch_size=4, workers=0),
    optimizer=OptimizerConfig(lr=0.01),
    epochs=3,
    save_every=2,
    log_every=1,
    evaluate_every=0,
    precision="fp32",
)
"""Nine steps on twelve samples."""


class Plain(AbstractObjective[PairEmbeddings]):
    """InfoNCE that notes what the image tower saw, in training and in evaluation, and may die after a step."""

    def __init__(self, model: DualEncoder, dies_after: int | None = None) -> None:
        super().__init__()
        self.model, self.dies_after = model, dies_after
        self.seen: list[tuple[bool, int, int]] = []
        model.vision.register_forward_hook(
            lambda tower, inputs, output: self.seen.append(
                (tower.training, inputs[0].shape[-1], output.tokens.shape[1])
            )
        )

    def encode(self, batch: Batch) -> PairEmbeddings:
        return PairEmbeddings((self.model.encode_image(batch.images[0]),), (self.model.encode_text(batch.texts[0]),))

    def loss(self, encoded: PairEmbeddings, batch: Batch) -> Losses:
        loss = info_nce(encoded.images[0], encoded.texts[0], self.model.scale)
        return Losses(loss, {"contrastive": loss})

    def after_step(self, step: int) -> None:
        if step == self.dies_after:
            raise Killed


@pytest.fixture
def run(make_model, drawings, tmp_path):
    """Return a function that trains a 32-pixel model of 16 patches in a folder and returns objective and console."""

    def train(recipe: Recipe = RECIPE, folder: str = "run", *, evaluate=None, resume: bool = False, dies_after=None):
        objective = Plain(larger(make_model), dies_after)
        model = objective.model
        loader = Loader(drawings(12), model.image_policy, model.tokenizer, recipe.data, repeat=repeats(recipe))
        (tmp_path / folder).mkdir(exist_ok=True)
        torch.manual_seed(7)
        console = Console(file=io.StringIO(), width=200)
        fit(objective, loader, recipe, tmp_path / folder, console=console, evaluate=evaluate, resume=resume)
        return objective, console.file.getvalue()

    return train


def larger(make_model) -> DualEncoder:
    from diptych.models.build import build

    model = make_model()
    torch.manual_seed(0)
    config = replace(
        model.config,
        vision=replace(model.config.vision, image_size=32),
        image_policy=replace(model.config.image_policy, size=32),
    )
    return build(config, model.tokenizer)


def with_speed(**changes) -> Recipe:
    return replace(RECIPE, speed=SpeedConfig(**changes))


def differing(one: Plain, other: Plain) -> list[str]:
    theirs = other.model.state_dict()
    return [name for name, value in one.model.state_dict().items() if not torch.equal(value, theirs[name])]


def images_at(model: DualEncoder) -> dict[str, float]:
    """Ask the image tower as evaluation does."""
    with torch.no_grad():
        model.encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    return {}


def test_approximations_are_off_by_default(run):
    plain, lines = run()
    assert plain.seen == [(True, 32, 16)] * 9 and "APPROXIMATION" not in lines
    zero, _ = run(with_speed(patch_dropout=0.0, resolutions=()), "zero")
    assert differing(plain, zero) == []


def test_patches_are_dropped_in_training_and_never_in_evaluation(run):
    objective, lines = run(with_speed(patch_dropout=0.75), evaluate=images_at)
    assert [seen for seen in objective.seen if seen[0]] == [(True, 32, 4)] * 9
    assert [seen for seen in objective.seen if not seen[0]] == [(False, 32, 16)]
    assert "APPROXIMATION: 75% of the patches of an image are left out in training." in lines
    assert objective.model.vision.patch_dropout == 0


def test_sizes_grow_with_the_phases(run, tmp_path):
    objective, lines = run(with_speed(resolutions=(8, 16)), evaluate=images_at)
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    operations = [row["gflops"] * row["seconds_compute"] for row in rows]
    assert operations[0] == pytest.approx(operations[2]) and operations[0] < 0.9 * operations[3] < 0.9 * operations[8]
    sizes = [size for training, size, _ in objective.seen if training]
    assert sizes == [8] * 3 + [16] * 3 + [32] * 3
    assert objective.seen[-1] == (False, 32, 16)
    assert "APPROXIMATION: images are of 8 then 16 then 32 pixels, for equally many steps each." in lines


@pytest.mark.parametrize("step", ["accumulated", "cached"])
@pytest.mark.parametrize("speed", [{"patch_dropout": 0.5}, {"resolutions": (16,)}])
def test_a_killed_run_ends_in_the_same_weights(run, step, speed):
    recipe = replace(with_speed(**speed), step=step, accumulate=1 if step == "accumulated" else 3, epochs=12)
    whole, _ = run(recipe, "whole")
    with pytest.raises(Killed):
        run(recipe, dies_after=7)
    resumed, _ = run(recipe, resume=True)
    assert differing(whole, resumed) == []


def test_the_cached_step_drops_the_same_patches_twice(run):
    cached, _ = run(replace(with_speed(patch_dropout=0.5), step="cached"), "cached")
    plain, _ = run(with_speed(patch_dropout=0.5), "plain")
    torch.testing.assert_close(cached.model.state_dict(), plain.model.state_dict())


@pytest.mark.parametrize(
    ("step", "side"), [(1, 8), (3, 8), (4, 8), (5, 16), (7, 16), (8, None), (10, None)]
)  # ten steps: phases end after 10/3 and 20/3 steps
def test_the_phase_follows_from_the_step(step, side):
    assert side_at(step, 10, (8, 16)) == side
    assert side_at(step, 10, ()) is None
    assert side_at(1, 1, (8, 16)) == 8


def test_shrinking_leaves_alone_what_is_small_and_what_towers_made():
    batch = Batch(
        ("a",),
        (
            torch.full((1, 3, 32, 32), 200, dtype=torch.uint8),
            torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
            TowerOutput(torch.ones(1, 4)),
        ),
        (Tokens(torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1).long()),),
        torch.zeros(1, dtype=torch.int64),
    )
    found = shrink(batch, 16)
    assert torch.equal(found.images[0], torch.full((1, 3, 16, 16), 200, dtype=torch.uint8))
    assert found.images[1] is batch.images[1] and found.images[2] is batch.images[2] and shrink(batch, None) is batch


def test_shrinking_averages_what_it_merges():
    stripes = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    stripes[..., ::2] = 255
    batch = Batch(("a",), (stripes,), (), torch.zeros(1, dtype=torch.int64))
    inner = shrink(batch, 8).images[0][..., 2:-2].float()  # without antialiasing it would be all black or all white
    assert (inner - 127.5).abs().max() < 16


def test_what_cannot_be_is_refused(make_model, drawings):
    model = larger(make_model)
    loader = Loader(drawings(4), model.image_policy, model.tokenizer, RECIPE.data)

    def open_levers(**config) -> None:
        with levers(model, SpeedConfig(**config), loader, torch.autocast("cpu", enabled=False), say=print):
            pass

    with pytest.raises(ConfigError, match=r"12, and the image tower takes no such images: .* patches of 8"):
        open_levers(resolutions=(12,))
    with pytest.raises(ConfigError, match="smaller than the full 32 pixels of the model"):
        open_levers(resolutions=(32,))
    with pytest.raises(ConfigError, match=r"at least 0 and below 1, not 1\.0"):
        SpeedConfig(patch_dropout=1.0)
    with pytest.raises(ConfigError, match=r"at least 1, not \(0,\)"):
        SpeedConfig(resolutions=(0,))
    assert model.training
    set_mode(model.vision, "frozen")
    for config in ({"patch_dropout": 0.5}, {"resolutions": (16,)}):
        with pytest.raises(ConfigError, match="that tower is frozen"):
            open_levers(**config)


def test_texts_by_length_can_be_switched_off(run):
    assert run()[0].model.texts_by_length
    objective, lines = run(with_speed(texts_by_length=False), "off")
    assert not objective.model.texts_by_length and "speed.texts_by_length is off" in lines


# Type checks of the tests hide the code from the compiler, so it runs in a process without them.
COMPILED = """
import sys, tempfile, io, torch
from dataclasses import replace
from pathlib import Path
from rich.console import Console
from diptych.data.loader import Loader, LoaderConfig
from diptych.data.sources import Listed
from diptych.data.tokenizer import TextPolicy, Tokenizer
from diptych.data.transforms import ImagePolicy
from diptych.methods import clip
from diptych.models.build import DualConfig, build
from diptych.models.heads import LinearHeadConfig
from diptych.models.text import TextConfig
from diptych.models.vision import VisionConfig
from diptych.training.levers import SpeedConfig
from diptych.training.log import read_rows
from diptych.training.loop import fit
from diptych.training.optim import OptimizerConfig
from diptych.types import Sample, Text
import numpy as np

words = [" ".join("red green blue a small large circle".split()[: 1 + i % 7]) for i in range(48)]
pixels = np.random.default_rng(0).integers(256, size=(48, 16, 16, 3), dtype=np.uint8)
source = Listed([Sample(str(i), pixels[i], (Text(w),), str(i)) for i, w in enumerate(words)])
config = DualConfig(VisionConfig(16, 8, 16, 1, 2, 32), TextConfig(300, 16, 16, 1, 2, 32), LinearHeadConfig(8), LinearHeadConfig(8),
    image_policy=ImagePolicy(size=16), text_policy=TextPolicy(length=16))
tokenizer = Tokenizer.train(words, vocabulary=300, length=16)
seen = []
for compile in (False, True):
    recipe = replace(clip.mini(), data=LoaderConfig(batch_size=24, workers=0), epochs=2, precision="fp32", log_every=1,
        optimizer=OptimizerConfig(lr=1e-3), speed=SpeedConfig(compile=compile))
    torch.manual_seed(0)
    model = build(config, tokenizer)
    loader = Loader(source, model.image_policy, model.tokenizer, recipe.data)
    folder = Path(tempfile.mkdtemp())
    console = Console(file=io.StringIO(), width=300)
    fit(clip.Objective(model, clip.Config()), loader, recipe, folder, console=console, evaluate=lambda m: {})
    print([line for line in console.file.getvalue().splitlines() if "Compile" in line])
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    assert model.vision._compiled_call_impl is None
    seen.append((model.state_dict(), [row["loss"] for row in rows], rows[0]["gflops"] * rows[0]["seconds_compute"]))
torch.testing.assert_close(seen[1][0], seen[0][0], rtol=1e-3, atol=1e-5)
torch.testing.assert_close(torch.tensor(seen[1][1]), torch.tensor(seen[0][1]))
assert abs(seen[1][2] / seen[0][2] - 1) < 1e-6, seen
"""


def compile_in_a_process(**environment: str) -> str:
    """Train a tiny model with and without compilation, compare, and return what was printed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_compiled_towers_train_to_the_same_weights_and_count_the_same_operations(tmp_path):
    said = compile_in_a_process(TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert re.search(r"Compile: both towers, in \d+ s", said)


@pytest.mark.slow
def test_without_a_compiler_the_run_says_so_and_goes_on(tmp_path):
    python = Path(sys.executable).parent
    said = compile_in_a_process(PATH=str(python), CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert "Compile: off, though asked for: " in said and "g++ or clang++" in said
