import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diptych.data.loader import Loader, LoaderConfig, Position
from diptych.errors import CheckpointError, TrainingError
from diptych.methods.clip import Config, Objective
from diptych.models.checkpoint import load_model
from diptych.training.optim import OptimizerConfig, WeightAverage, exponential, make_optimizer
from diptych.training.state import RunState, restore, save
from diptych.training.step import accumulate_gradients


@pytest.fixture
def make_state(make_model, drawings):
    """Return a function that gives a run which has taken some steps."""

    def make(seed: int = 0, *, steps: int = 0, ema: float | None = 0.5) -> RunState:
        model = make_model(seed)
        objective = Objective(model, Config())
        loader = Loader(drawings(8), model.image_policy, model.tokenizer, LoaderConfig(batch_size=3))
        optimizer = make_optimizer(objective, (model.vision, model.text), OptimizerConfig())
        average = None if ema is None else WeightAverage(objective, exponential(ema))
        state = RunState(objective, optimizer, average, loader)
        objective.train()
        advance(state, steps)
        return state

    return make


def advance(state: RunState, steps: int) -> None:
    for step, batch in zip(range(1, steps + 1), state.loader, strict=False):
        state.optimizer.zero_grad()
        accumulate_gradients(state.objective, [batch], 1, nullcontext())
        state.optimizer.step()
        if state.average is not None:
            state.average.update(state.objective, step)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("ema", [None, 0.5])
def test_everything_comes_back(make_state, tmp_path, ema):
    state = make_state(steps=3, ema=ema)
    torch.manual_seed(5)
    torch.rand(3)
    expected = state.tensors()
    save(state, tmp_path, 3)
    following = torch.rand(4)

    other = make_state(1, ema=ema)
    torch.manual_seed(6)
    assert restore(other, tmp_path) == 3
    assert_same(other.tensors(), expected)
    assert torch.equal(torch.rand(4), following)
    assert other.loader.position == Position(1, 1)  # three batches of two per pass
    assert {float(moments["step"]) for moments in other.optimizer.state.values()} == {3}

    advance(state, 2)
    advance(other, 2)
    assert_same(other.tensors(), state.tensors())


def test_a_state_before_the_first_step_has_zero_moments(make_state, tmp_path):
    state = make_state()
    tensors = state.tensors()
    assert all(not tensors[f"{moment}.model.log_scale"].any() for moment in ("step", "exp_avg", "exp_avg_sq"))
    save(state, tmp_path, 0)
    other = make_state(1)
    restore(other, tmp_path)
    advance(state, 1)
    advance(other, 1)
    assert_same(other.tensors(), state.tensors())


def test_buffers_come_back(make_state, tmp_path):
    def with_counter(seed: int, value: float) -> RunState:
        state = make_state(seed)
        state.objective.register_buffer("counter", torch.tensor(value))
        return state

    save(with_counter(0, 7.0), tmp_path, 1)
    other = with_counter(1, 0.0)
    restore(other, tmp_path)
    assert other.objective.counter.item() == 7


def test_tensors_are_copies(make_state):
    state = make_state(steps=1)
    before = state.tensors()
    kept = {name: value.clone() for name, value in before.items()}
    advance(state, 1)
    assert_same(before, kept)


def test_the_saved_model_has_the_averaged_weights_and_the_run_keeps_its_own(make_state, tmp_path):
    state = make_state(steps=3)
    before = state.tensors()
    save(state, tmp_path, 3)
    assert_same(state.tensors(), before)
    assert state.objective.training and state.objective.model.vision.training
    saved = load_model(tmp_path / "checkpoint").state_dict()
    assert_same(saved, {name: before[f"average.model.{name}"] for name in saved})
    assert not torch.equal(saved["log_scale"], before["weight.model.log_scale"])


def test_without_an_average_the_saved_model_has_the_weights(make_state, tmp_path):
    state = make_state(steps=1, ema=None)
    save(state, tmp_path, 1)
    assert_same(load_model(tmp_path / "checkpoint").state_dict(), state.objective.model.state_dict())


def test_final_weights_are_given_back_when_something_goes_wrong(make_state):
    state = make_state(steps=2)
    state.objective.model.text.eval()
    before = state.tensors()
    with pytest.raises(KeyError), state.final_weights():
        inside = state.tensors()
        assert torch.equal(inside["weight.model.log_scale"], before["average.model.log_scale"])
        assert not state.objective.model.vision.training
        raise KeyError
    assert_same(state.tensors(), before)
    assert state.objective.model.vision.training and not state.objective.model.text.training


def test_without_a_checkpoint_nothing_happens(make_state, tmp_path):
    state = make_state(steps=1)
    before = state.tensors()
    assert restore(state, tmp_path) == 0
    assert_same(state.tensors(), before)
    assert state.loader.position == Position(0, 1)


def test_the_checkpoint_that_a_kill_left_aside_is_found(make_state, tmp_path):
    save(make_state(steps=2), tmp_path, 2)
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    assert restore(make_state(1), tmp_path) == 2


def widened(state: RunState) -> RunState:
    state.objective.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    return state


def reshaped(state: RunState) -> RunState:
    state.objective.model.log_scale = nn.Parameter(torch.zeros(2))
    return state


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (widened, "exp_avg.extra"),
        (reshaped, "exp_avg.model.log_scale"),
        (lambda state: replace(state, average=None), "average.model.image_head"),
    ],
    ids=["another parameter", "another shape", "no average"],
)
def test_a_checkpoint_of_other_parameters_is_refused(make_state, tmp_path, change, first):
    save(make_state(steps=1), tmp_path, 1)
    state = change(make_state(1))
    before = state.tensors()
    with pytest.raises(CheckpointError, match=f"other parameters.*first difference: {first}.*recipe.json"):
        restore(state, tmp_path)
    assert_same(state.tensors(), before)


def test_a_checkpoint_of_other_batches_is_refused(make_state, drawings, tmp_path):
    save(make_state(steps=1), tmp_path, 1)
    state = make_state(1)
    model, before = state.objective.model, state.tensors()
    smaller = Loader(drawings(8), model.image_policy, model.tokenizer, LoaderConfig(batch_size=2))
    with pytest.raises(
        CheckpointError, match=r"batches of 3 over all processes; now they hold 2.*set data.batch_size to 3\."
    ):
        restore(replace(state, loader=smaller), tmp_path)
    assert_same(state.tensors(), before)


def test_a_checkpoint_of_an_older_version_is_named(make_state, tmp_path):
    state = make_state()
    save(state, tmp_path, 3)
    path = tmp_path / "checkpoint" / "training.json"
    record = json.loads(path.read_text())
    del record["batch"]
    path.write_text(json.dumps(record))
    with pytest.raises(
        CheckpointError, match=r"training.json does not say batch: an older version .* Its model can be used"
    ):
        restore(state, tmp_path)


def test_a_checkpoint_of_a_machine_with_a_gpu_can_be_resumed_without(make_state, tmp_path):
    save(make_state(steps=1), tmp_path, 1)
    path = tmp_path / "checkpoint" / "training.safetensors"
    tensors = load_file(path)
    tensors.setdefault("generator.cuda.0", torch.zeros(16, dtype=torch.uint8))
    if torch.cuda.is_available():
        del tensors["generator.cuda.0"]
    save_file(tensors, path)
    assert restore(make_state(1), tmp_path) == 1


@pytest.mark.parametrize("name", ["training.safetensors", "training.json"])
def test_a_damaged_checkpoint_is_named(make_state, tmp_path, name):
    save(make_state(steps=1), tmp_path, 1)
    path = tmp_path / "checkpoint" / name
    path.write_bytes(path.read_bytes()[:20])
    state = make_state(1)
    before = state.tensors()
    with pytest.raises(CheckpointError, match="checkpoint cannot be read"):
        restore(state, tmp_path)
    assert_same(state.tensors(), before)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse to write files beyond a size, as it does when the disk is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("at", ["model.safetensors", "training.safetensors"])
def test_a_full_disk_leaves_the_checkpoint_before(make_state, tmp_path, at):
    state = make_state(steps=2)
    expected = state.tensors()
    save(state, tmp_path, 2)
    files = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint").iterdir()}
    assert len(files["model.safetensors"]) + 4000 < len(files["training.safetensors"])
    advance(state, 1)
    later = state.tensors()

    with pytest.raises(TrainingError, match=r"checkpoint of step 3 could not be written.*make room"), room(files, at):
        save(state, tmp_path, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint").iterdir()} == files
    assert_same(state.tensors(), later)  # the averaged weights did not stay in the model
    load_model(tmp_path / "checkpoint")

    other = make_state(1)
    assert restore(other, tmp_path) == 2
    assert_same(other.tensors(), expected)

    save(state, tmp_path, 3)
    assert restore(other, tmp_path) == 3


def room(files: dict[str, bytes], at: str):
    """Leave too little room for one file, and enough for smaller ones."""
    return largest_file(len(files[at]) - 2000)


def test_only_safetensors_and_json_are_written(make_state, tmp_path):
    save(make_state(steps=1), tmp_path, 1)
    names = {path.name for path in Path(tmp_path / "checkpoint").iterdir()}
    assert names == {
        "model.json",
        "model.safetensors",
        "tokenizer.json",
        "training.json",
        "training.safetensors",
    }
