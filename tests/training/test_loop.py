import io
import math
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from diptych.config import to_json
from diptych.data.loader import Loader, LoaderConfig
from diptych.data.sources import AbstractSource, Listed, open_source
from diptych.data.transforms import Augment
from diptych.errors import CheckpointError, DataError, TrainingError
from diptych.methods import clip
from diptych.models.checkpoint import load_model, save_model
from diptych.models.dual import DualEncoder
from diptych.training.log import read_rows
from diptych.training.loop import fit
from diptych.training.optim import OptimizerConfig, schedule
from diptych.training.recipe import Recipe
from diptych.types import Batch, Losses, PairEmbeddings, Text
from diptych.verbs import AbstractObjective
from tiny_run import Killed

DATA = LoaderConfig(batch_size=4, views=(Augment(crop_scale=(0.5, 1.0), flip_rate=0.5),))
RECIPE = Recipe(
    "clip",
    clip.Config(),
    data=DATA,
    optimizer=OptimizerConfig(lr=0.01, ema_decay=0.8),
    epochs=2,
    save_every=2,
    log_every=1,
    precision="fp32",
)
"""Six steps on twelve samples."""


class Watched(AbstractObjective[PairEmbeddings]):
    """CLIP with dropout, so that the random generators matter; may die after a step, or meet a loss that is not a number."""

    def __init__(self, model: DualEncoder, *, dies_after: int | None = None, broken_at: int | None = None) -> None:
        super().__init__()
        self.model, self.plain, self.dropout = model, clip.Objective(model, clip.Config()), nn.Dropout(0.1)
        self.dies_after, self.broken_at = dies_after, broken_at
        self.batches: list[Batch] = []
        self.steps: list[int] = []

    def encode(self, batch: Batch) -> PairEmbeddings:
        self.batches.append(batch)
        encoded = self.plain.encode(batch)
        return PairEmbeddings((self.dropout(encoded.images[0]),), encoded.texts)

    def loss(self, encoded: PairEmbeddings, batch: Batch) -> Losses:
        losses = self.plain.loss(encoded, batch)
        if len(self.steps) + 1 == self.broken_at:
            return Losses(losses.total * math.nan, losses.parts)
        return losses

    def after_step(self, step: int) -> None:
        self.steps.append(step)
        if step == self.dies_after:
            raise Killed


@pytest.fixture
def run(make_model, drawings, tmp_path):
    """Return a function that trains in a folder and returns the objective."""

    def train(
        recipe: Recipe = RECIPE,
        folder: str = "run",
        *,
        source: AbstractSource | None = None,
        model_seed: int = 0,
        console: Console | None = None,
        evaluate=None,
        resume: bool = False,
        **given,
    ) -> Watched:
        source = source or drawings(12)
        texts = [text.text for index in range(len(source)) for text in source.texts(index)]
        objective = Watched(make_model(model_seed, texts), **given)
        loader = Loader(source, objective.model.image_policy, objective.model.tokenizer, recipe.data, seed=recipe.seed)
        (tmp_path / folder).mkdir(exist_ok=True)
        torch.manual_seed(7 + model_seed)
        console = console or Console(file=io.StringIO(), width=200)
        fit(objective, loader, recipe, tmp_path / folder, console=console, evaluate=evaluate, resume=resume)
        return objective

    return train


def weights(objective: Watched) -> dict[str, Tensor]:
    return objective.model.state_dict()


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_training_lowers_the_loss_and_finds_the_pairs(run, tmp_path):
    recipe = replace(RECIPE, epochs=60, data=LoaderConfig(batch_size=12), save_every=1000)
    objective = run(recipe)
    losses = [row["loss"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert losses[0] > 0.8 * math.log(12) and losses[-1] < 0.5 * losses[0]
    assert not objective.training
    batch = objective.batches[0]
    with torch.no_grad():
        similar = objective.model.encode_image(batch.images[0]) @ objective.model.encode_text(batch.texts[0]).T
    assert (similar.argmax(1) == torch.arange(12)).float().mean() > 0.7  # 1/12 at chance


def test_rows_have_every_key_and_say_the_truth(run, tmp_path):
    run(evaluate=lambda model: {"top1": 0.5})
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "evaluation" not in row]
    assert {tuple(row) for row in rows} == {
        (
            "step",
            "epoch",
            "loss",
            "parts",
            "lr",
            "scale",
            "grad_norm",
            "seconds_data",
            "seconds_compute",
            "gflops",
            "peak_share",
            "samples_per_second",
            "skipped",
        )
    }
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == [0.333, 0.667, 1, 1.333, 1.667, 2]
    assert [row["lr"] for row in rows] == [0.01 * schedule(step, 6, 0.05) for step in range(6)]
    assert all(row["parts"] == {"contrastive": row["loss"]} for row in rows)
    assert rows[0]["scale"] == pytest.approx(1 / 0.07, rel=0.02)
    for row in rows:
        assert row["grad_norm"] > 0
        assert row["samples_per_second"] == pytest.approx(4 / (row["seconds_data"] + row["seconds_compute"]))


def test_parts_are_means_over_accumulated_batches_like_the_loss(run, tmp_path):
    run(replace(RECIPE, accumulate=3))
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["parts"]["contrastive"] == pytest.approx(row["loss"]) for row in rows)


def test_rows_are_written_every_few_steps_and_at_the_end(run, tmp_path):
    run(replace(RECIPE, log_every=4))
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [4, 6]


def test_one_seed_gives_one_set_of_weights(run):
    first, second, other = (run(replace(RECIPE, seed=seed), folder) for seed, folder in ((0, "a"), (0, "b"), (1, "c")))
    assert_same(weights(first), weights(second))
    assert not torch.equal(weights(first)["log_scale"], weights(other)["log_scale"])  # another order of samples


def test_every_sample_is_seen_once_per_epoch(run):
    objective = run()
    keys = [key for batch in objective.batches for key in batch.keys]
    assert sorted(keys[:12]) == sorted(keys[12:]) == sorted(f"s{i}" for i in range(12))
    assert keys[:12] != keys[12:]


def test_the_final_model_is_the_one_that_is_saved_and_it_is_averaged(run, tmp_path):
    averaged, plain = run(), run(replace(RECIPE, optimizer=OptimizerConfig(lr=0.01)), "plain")
    for objective, folder in ((averaged, "run"), (plain, "plain")):
        assert_same(load_model(tmp_path / folder / "checkpoint").state_dict(), weights(objective))
    assert not torch.equal(weights(averaged)["log_scale"], weights(plain)["log_scale"])


@pytest.mark.parametrize(("stop", "ema"), [*((stop, 0.8) for stop in range(1, 7)), (3, None), (6, None)])
def test_a_run_that_was_stopped_at_any_step_ends_with_the_same_weights(run, tmp_path, stop, ema):
    recipe = replace(RECIPE, optimizer=replace(RECIPE.optimizer, ema_decay=ema))
    whole = run(recipe, "whole")
    with pytest.raises(Killed):
        run(recipe, dies_after=stop)
    resumed = run(recipe, resume=True, model_seed=1 if stop > 2 else 0)  # the other weights must not matter
    assert resumed.steps[0] == (stop - 1) // 2 * 2 + 1  # a checkpoint every two steps, none after the fatal one
    assert_same(weights(resumed), weights(whole))
    assert same_rows(tmp_path / "run", tmp_path / "whole")
    name = "checkpoint/training.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def same_rows(folder: Path, other: Path) -> bool:
    """Return whether two logs agree but for the clock."""
    clocked = {"seconds_data", "seconds_compute", "gflops", "peak_share", "samples_per_second"}
    found, expected = (
        [{k: v for k, v in row.items() if k not in clocked} for row in read_rows(f / "metrics.jsonl")]
        for f in (folder, other)
    )
    return found == expected


@pytest.mark.parametrize("stop", [2, 3, 4, 5])
def test_accumulated_steps_resume_too(run, stop):
    recipe = replace(RECIPE, accumulate=2, epochs=5, save_every=1)  # three batches per pass: steps straddle passes
    whole = run(recipe, "whole")
    assert whole.steps == [1, 2, 3, 4, 5, 6, 7]  # 15 batches, the last one left over
    with pytest.raises(Killed):
        run(recipe, dies_after=stop)
    resumed = run(recipe, resume=True, model_seed=1)
    assert resumed.steps[0] == stop
    assert_same(weights(resumed), weights(whole))


def test_a_run_may_stop_many_times(run):
    recipe = replace(RECIPE, save_every=1)
    whole = run(recipe, "whole")
    with pytest.raises(Killed):
        run(recipe, dies_after=2)
    for stop in (3, 4, 5):
        with pytest.raises(Killed):
            run(recipe, dies_after=stop, resume=True, model_seed=stop)
    assert_same(weights(run(recipe, resume=True)), weights(whole))


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 1)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_another_number_of_workers_changes_nothing(run, before, after):
    recipe = replace(RECIPE, save_every=1)
    first, second = (replace(recipe, data=replace(DATA, workers=workers)) for workers in (before, after))
    whole = run(recipe, "whole")
    with pytest.raises(Killed):
        run(first, dies_after=3)
    assert_same(weights(run(second, resume=True, model_seed=1)), weights(whole))


def test_resuming_a_finished_run_changes_nothing(run, tmp_path):
    whole = run()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = run(resume=True, model_seed=1)
    assert again.steps == []
    assert_same(weights(again), weights(whole))
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_run_that_never_got_to_a_checkpoint_begins_again(run):
    assert_same(weights(run(folder="empty", resume=True)), weights(run()))


def test_resuming_with_another_recipe_is_refused(run):
    run()
    with pytest.raises(CheckpointError, match=r"other parameters.*average"):
        run(replace(RECIPE, optimizer=OptimizerConfig()), resume=True)


CHILD = """
import os, signal, sys
from pathlib import Path

from rich.console import Console
import torch

from diptych.config import override
from diptych.data.loader import Loader
from diptych.data.sources import open_source
from diptych.methods import clip
from diptych.models.checkpoint import load_model
from diptych.training import state
from diptych.training.loop import fit

start, images, folder, moment = sys.argv[1:]
model = load_model(Path(start))
source = open_source(images)


class Objective(clip.Objective):
    def after_step(self, step):
        if step == 5 and moment == "between":
            os.kill(os.getpid(), signal.SIGKILL)


def half(tensors, path, write=state.save_file):
    write(tensors, path)
    if moment == "writing" and (Path(folder) / "checkpoint").exists():
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)


state.save_file = half
recipe = override(clip.recipe(), RECIPE_JSON)
loader = Loader(source, model.image_policy, model.tokenizer, recipe.data, seed=0)
torch.manual_seed(7)
fit(Objective(model, recipe.objective), loader, recipe, Path(folder), console=Console())
"""


@pytest.fixture
def photos(drawings, tmp_path) -> Path:
    """Return a folder of twelve images with their texts."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for sample in drawings(12):
        (folder / f"{sample.key}.png").write_bytes(sample.image)
        (folder / f"{sample.key}.txt").write_text(sample.texts[0].text)
    return folder


@pytest.mark.parametrize("moment", ["writing", pytest.param("between", marks=pytest.mark.slow)])
def test_a_process_killed_by_the_system_can_be_resumed(make_model, photos, tmp_path, moment):
    save_model(make_model(), tmp_path / "start")
    source = open_source(str(photos))

    def train(folder: str, resume: bool) -> DualEncoder:
        (tmp_path / folder).mkdir(exist_ok=True)
        model = load_model(tmp_path / "start")
        loader = Loader(source, model.image_policy, model.tokenizer, DATA, seed=0)
        torch.manual_seed(7 if not resume else 8)
        fit(
            clip.Objective(model, clip.Config()),
            loader,
            RECIPE,
            tmp_path / folder,
            console=Console(file=io.StringIO()),
            resume=resume,
        )
        return model

    (tmp_path / "run").mkdir()
    script = CHILD.replace("RECIPE_JSON", repr(to_json(RECIPE)))
    arguments = [str(tmp_path / "start"), str(photos), str(tmp_path / "run"), moment]
    child = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 4
    assert_same(train("run", resume=True).state_dict(), train("whole", resume=False).state_dict())
    assert same_rows(tmp_path / "run", tmp_path / "whole")


def test_a_broken_loss_names_the_step_and_leaves_the_checkpoint(run, tmp_path):
    with pytest.raises(
        TrainingError, match=r"Stopped at step 5: the loss is nan \(contrastive = .*first sample 's\d+'"
    ):
        run(broken_at=5)
    whole = run(folder="whole")
    resumed = run(resume=True, model_seed=1)
    assert resumed.steps == [5, 6]
    assert_same(weights(resumed), weights(whole))
    load_model(tmp_path / "run" / "checkpoint")


def test_a_broken_gradient_names_the_step(run, monkeypatch):
    monkeypatch.setattr(nn.utils, "get_total_norm", lambda *_: torch.tensor(math.inf))
    with pytest.raises(TrainingError, match="Stopped at step 1: the gradient norm is inf"):
        run()


@pytest.mark.parametrize(("every", "epochs"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (0, [5]), (9, [5])])
def test_evaluation_is_due_after_every_few_epochs_and_at_the_end(run, tmp_path, every, epochs):
    calls = []

    def evaluate(model: DualEncoder) -> Mapping[str, float]:
        calls.append(model.training)
        return {"top1": len(calls) / 10}

    run(replace(RECIPE, epochs=5, evaluate_every=every), evaluate=evaluate)
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "evaluation" in row]
    assert [row["epoch"] for row in rows] == epochs
    assert [row["step"] for row in rows] == [3 * epoch for epoch in epochs]
    assert [row["evaluation"]["top1"] for row in rows] == [(i + 1) / 10 for i in range(len(epochs))]
    assert calls == [False] * len(epochs)


def test_what_is_evaluated_is_what_is_saved_and_training_goes_on_as_if_it_had_not_been(run, tmp_path):
    seen = []

    def evaluate(model: DualEncoder) -> Mapping[str, float]:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {}

    recipe = replace(RECIPE, save_every=3, evaluate_every=1)
    whole = run(recipe, "whole")
    with pytest.raises(Killed):
        run(recipe, evaluate=evaluate, dies_after=4)
    assert len(seen) == 1
    assert_same(seen[0], load_model(tmp_path / "run" / "checkpoint").state_dict())
    watched = run(recipe, "watched", evaluate=evaluate)
    assert_same(weights(watched), weights(whole))
    assert watched.dropout.training is False


def test_frozen_towers_stay_in_eval_mode(run, monkeypatch):
    modes = []
    encode = Watched.encode

    def watching(self: Watched, batch: Batch) -> PairEmbeddings:
        modes.append((self.training, self.model.vision.training, self.model.text.training))
        return encode(self, batch)

    monkeypatch.setattr(Watched, "encode", watching)
    build = Watched.__init__

    def frozen(self: Watched, model: DualEncoder, **given) -> None:
        model.vision.requires_grad_(False)
        build(self, model, **given)

    monkeypatch.setattr(Watched, "__init__", frozen)
    run(evaluate=lambda model: {})
    assert set(modes) == {(True, False, True)}


def spoilt(source: Listed, *bad: int) -> Listed:
    return Listed([replace(s, image=b"no image") if i in bad else s for i, s in enumerate(source)])


def test_skipped_samples_are_counted(run, drawings, tmp_path):
    objective = run(source=spoilt(drawings(12), 2, 5))
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[2]["skipped"] == 2 and rows[5]["skipped"] == 4
    counts = [len(batch.skipped) for batch in objective.batches]
    assert [row["skipped"] for row in rows] == [sum(counts[: i + 1]) for i in range(6)]
    for row, batch in zip(rows, objective.batches, strict=True):
        seconds = row["seconds_data"] + row["seconds_compute"]
        assert row["samples_per_second"] == pytest.approx(len(batch) / seconds)


def test_the_count_of_skipped_samples_survives_a_resume(run, drawings, tmp_path):
    source = spoilt(drawings(12), 2, 5)
    run(source=source, folder="whole")
    with pytest.raises(Killed):
        run(source=source, dies_after=5)
    run(source=source, resume=True)
    assert same_rows(tmp_path / "run", tmp_path / "whole")


def test_strict_stops_at_the_first_bad_sample(run, drawings):
    with pytest.raises(DataError, match="Sample 2 of listed"):
        run(replace(RECIPE, data=replace(DATA, bad_samples="strict")), source=spoilt(drawings(12), 2))


def test_the_console_tells_steps_precision_and_evaluations(run):
    console = Console(file=io.StringIO(), width=200)
    recipe = replace(RECIPE, accumulate=3, log_every=2, data=replace(DATA, workers=0))
    run(recipe, console=console, evaluate=lambda model: {"top1": 0.25})
    lines = console.file.getvalue().splitlines()
    assert lines.pop(1) == "Workers: 0, as asked."
    assert lines[0] == "Training 2 steps of 12 on cpu. Precision: fp32, as asked."
    threads = r"Threads: \d+; a large matrix product reaches [\d,]+ GFLOP/s with them\. OMP_.*\."
    assert re.fullmatch(threads, lines.pop(1))
    assert [lines.pop(1) for _ in range(3)] == [
        "Attention of the image tower: fused.",
        "Attention of the text tower: fused.",
        "Compile: off, unless speed.compile asks for it.",
    ]
    assert re.fullmatch(r"step 2/2  epoch 2  loss \d\.\d{3}  \d+ samples/s  data .* s  compute .* s", lines[2])
    assert lines[1] == "epoch 1: top1 0.250" and lines[3] == "epoch 2: top1 0.250"
    assert len(lines) == 4


def test_a_source_smaller_than_a_batch_is_one_batch(run, drawings, tmp_path):
    objective = run(replace(RECIPE, data=LoaderConfig(batch_size=64)), source=drawings(5))
    assert [len(batch) for batch in objective.batches] == [5, 5]
    assert [row["epoch"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_several_texts_per_image_are_drawn_anew_every_epoch_and_after_a_resume(run, drawings):
    samples = [replace(s, texts=(*s.texts, Text(f"another {s.key}"))) for s in drawings(12)]
    recipe = replace(RECIPE, epochs=4)
    whole = run(recipe, "whole", source=Listed(samples))
    with pytest.raises(Killed):
        run(recipe, dies_after=6, source=Listed(samples))
    resumed = run(recipe, resume=True, source=Listed(samples))
    passes = whole.batches[:3], whole.batches[3:6]
    first, second = (
        dict(pair for b in p for pair in zip(b.keys, b.texts[0].key.tolist(), strict=True)) for p in passes
    )
    assert set(first) == set(second) and first != second
    assert_same(weights(resumed), weights(whole))
