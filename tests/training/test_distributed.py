"""Two processes are one: same batches, same loss, same gradients, same weights after a run, whatever the kind of step."""

import json
import shutil
import signal
import subprocess
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diptych.commands import convert
from diptych.config import override, to_json
from diptych.data.loader import Loader, LoaderConfig
from diptych.data.sources import open_source
from diptych.data.tokenizer import TextPolicy, Tokenizer
from diptych.data.transforms import ImagePolicy
from diptych.errors import CheckpointError
from diptych.methods import clip
from diptych.models.build import DualConfig, build
from diptych.models.checkpoint import load_model, save_model
from diptych.models.dual import DualEncoder
from diptych.models.foreign import HFTextConfig, TimmConfig
from diptych.models.heads import LinearHeadConfig
from diptych.models.shards import Shards
from diptych.models.weights import load
from diptych.training import distributed
from diptych.training.step import STEPS
from processes import finish, launch

# What each process does: gradients of one step of each kind, with towers whole and sharded, written by both, and how they were summed.
GRADIENTS = """
import json, sys
from contextlib import nullcontext
from pathlib import Path
import torch
from safetensors.torch import save_file
from diptych.data.loader import Loader, LoaderConfig
from diptych.data.sources import open_source
from diptych.methods import clip
from diptych.models.checkpoint import load_model
from diptych.training import distributed
from diptych.training.step import STEPS, clip_gradients
from diptych.training.traffic import counting_traffic
from diptych.types import rows

folder, name = Path(sys.argv[1]), sys.argv[2]
found = {}

def step(case, kind, count, batches, sharding):
    objective = clip.Objective(load_model(folder / name), clip.Config())
    if sharding == "full":
        distributed.shard(objective)
        assert not objective.model.texts_by_length  # or processes would call the tower differently often
    with counting_traffic() as traffic:
        losses = STEPS[kind](objective, batches, count, nullcontext())
        distributed.average_gradients(objective)
    norm = clip_gradients(objective, None)
    found[f"{case}-{sharding}"] = [[loss.total.item() for loss in losses], norm, traffic.calls, traffic.sent]
    gradients = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
    whole = {n: g.full_tensor() if distributed.is_cut(g) else g for n, g in gradients.items()}
    save_file(whole, folder / f"{name}-{case}-{sharding}-{rank}.safetensors")

def loader(size, repeat, part):
    model = load_model(folder / name)
    config = LoaderConfig(batch_size=size)
    return iter(Loader(open_source(folder / "photos"), model.image_policy, model.tokenizer, config, repeat=repeat, part=part))

with distributed.processes(torch.device("cpu")):
    rank, world = distributed.part()
    for sharding in ("none", "full"):
        for kind, count in (("accumulated", 1), ("accumulated", 2), ("cached", 2)):
            batches = loader(3, count if kind == "cached" else None, (rank, world))
            step(f"{kind}{count}", kind, count, batches, sharding)
        whole = next(loader(9, None, (0, 1)))  # one of them cannot be read
        assert len(whole) == 8
        step("uneven", "accumulated", 1, [rows(whole, 0, 5) if rank == 0 else rows(whole, 5, 8)], sharding)
    (folder / f"{name}-{rank}.json").write_text(json.dumps(found))
"""

# A run in each process. One may be killed: "step" is process 1 after step 2; "part" is process 1 when it has written its part of that
# step's checkpoint; "exchange" is process 0 when all parts are there, before they take the place of the old ones.
RUN = """
import json, os, signal, sys, warnings
from pathlib import Path
import torch
from rich.console import Console
warnings.simplefilter("error")
from diptych import files
from diptych.config import override
from diptych.data.sources import open_source
from diptych.methods import clip
from diptych.models.checkpoint import load_model
from diptych.models.modes import set_mode
from diptych.training import distributed, state
from diptych.training.loop import fit
from diptych.training.prepare import make_loader

folder, name, dies, changes = Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
recipe = override(override(clip.recipe(), json.loads((folder / "recipe.json").read_text())), changes)
now = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Objective(clip.Objective):
    def after_step(self, step):
        global now
        now = step
        if (dies, step, distributed.part()[0]) == ("step", 2, 1):
            die()

write = state._write_parts
def write_and_die(*arguments):
    write(*arguments)
    if (dies, now, distributed.part()[0]) == ("part", 2, 1):
        die()
state._write_parts = write_and_die

remove = files.shutil.rmtree
def die_and_remove(path, **options):
    if (dies, now) == ("exchange", 2) and str(path).endswith(".old"):
        die()
    remove(path, **options)
files.shutil.rmtree = die_and_remove

def evaluate(model):
    with torch.inference_mode():
        return {"zeros": model.encode_image(torch.zeros(1, 3, 16, 16)).sum().item()}

with distributed.processes(torch.device("cpu")):
    model = load_model(folder / "model")
    torch.manual_seed(distributed.part()[0])
    if "model" in changes:
        set_mode(model.vision, recipe.model.vision_mode)
        set_mode(model.text, recipe.model.text_mode)
    loader = make_loader(recipe, open_source(folder / "photos"), model)
    (folder / name).mkdir(exist_ok=True)
    fit(Objective(model, recipe.objective), loader, recipe, folder / name, console=Console(), evaluate=evaluate, resume=True)
    assert recipe.sharding == "none" or not model.texts_by_length
    if distributed.is_first() and recipe.sharding == "full":  # what the caller has is a whole model, that of the checkpoint
        saved = load_model(folder / name / "checkpoint").state_dict()
        assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
        assert evaluate(model) == evaluate(load_model(folder / name / "checkpoint"))
"""


@pytest.fixture(scope="module")
def folder(make_model, drawings, tmp_path_factory) -> Path:
    """Return a folder with a model and thirteen photos, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "photos").mkdir()
    for sample in drawings(13):
        (folder / "photos" / f"{sample.key}.png").write_bytes(sample.image if sample.key != "s4" else b"broken")
        (folder / "photos" / f"{sample.key}.txt").write_text(sample.texts[0].text)
    save_model(make_model(), folder / "model")
    recipe = {
        "data": {"batch_size": 3},
        "optimizer": {"clip_norm": 0.5, "epsilon": 1e-4},  # where a gradient is 0 but for rounding, no step
        "epochs": 4,
        "accumulate": 2,
        "step": "cached",
        "save_every": 1,
        "evaluate_every": 2,
        "log_every": 1,
        "precision": "fp32",
    }
    (folder / "recipe.json").write_text(json.dumps(to_json(override(clip.recipe(), recipe))))
    return folder


CASES = {"accumulated1": (6, 1), "accumulated2": (6, 2), "cached2": (6, 2), "uneven": (9, 1)}
"""Samples per batch over both processes, and batches per step."""


def foreign_model(bert: Path) -> DualEncoder:
    """Return a model with small towers of timm and transformers; writes the configuration of the second."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertConfig(**sizes, vocab_size=300).save_pretrained(bert)
    config = DualConfig(
        TimmConfig("test_vit"),
        HFTextConfig(str(bert)),
        LinearHeadConfig(8),
        LinearHeadConfig(8),
        image_policy=ImagePolicy(size=160),
        text_policy=TextPolicy(length=16),
    )
    torch.manual_seed(0)
    return build(config, Tokenizer.train(["a red circle", "a blue square"], vocabulary=300, length=16))


@dataclass(frozen=True)
class Numbers:
    """How many numbers parameters have, and how many when each has an even number of rows, for two processes."""

    plain: int
    padded: int


def sizes(objective: clip.Objective) -> tuple[Numbers, int]:
    """Return the size of the towers, and that of all else."""
    towers = [*objective.model.vision.parameters(), *objective.model.text.parameters()]
    plain = sum(p.numel() for p in towers)
    padded = sum(p.numel() + len(p) % 2 * p[0].numel() for p in towers)
    return Numbers(plain, padded), sum(p.numel() for p in objective.parameters()) - plain


@pytest.mark.parametrize("name", ["model", pytest.param("foreign", marks=pytest.mark.slow)])
def test_two_processes_have_the_gradients_of_one(folder, name):
    if name == "foreign":
        save_model(foreign_model(folder / "bert"), folder / name)
    finish(launch("-c", GRADIENTS, str(folder), name))
    found = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1] and set(found[0]) == {f"{case}-{mode}" for case in CASES for mode in ("none", "full")}
    for case, (size, count) in CASES.items():
        objective = clip.Objective(load_model(folder / name), clip.Config())
        layers = sum(len(list(distributed.layers_of(t))) + 1 for t in (objective.model.vision, objective.model.text))
        assert layers == {"model": 4, "foreign": 10}[name]
        loader = Loader(
            open_source(folder / "photos"),
            objective.model.image_policy,
            objective.model.tokenizer,
            LoaderConfig(batch_size=size),
            repeat=count if case == "cached2" else None,
        )
        batches = list(islice(loader, count * (2 if case == "cached2" else 1)))
        assert {len(batch) for batch in batches} == {6, 5} or count == 1  # one sample is skipped: uneven parts
        kind = "cached" if case == "cached2" else "accumulated"
        losses = STEPS[kind](objective, batches, count, torch.autocast("cpu", enabled=False))
        expected = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
        norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
        largest = max(value.abs().max().item() for value in expected.values())
        for sharding in ("none", "full"):
            values, its_norm, calls, sent = found[0][f"{case}-{sharding}"]
            assert values == pytest.approx([loss.total.item() for loss in losses], rel=1e-6)
            assert its_norm == pytest.approx(norm, rel=1e-5)
            # One sum over processes per step and parameter, whatever the number of batches.
            assert calls["allreduce"] == 1
            assert calls.get("reducescatter", 0) == (layers if sharding == "full" else 0)
            # What docs/scaling.md says of bytes, for two processes: 8 P (W - 1) / W, and so on.
            towers, rest = sizes(objective)
            assert sent["allreduce"] == 4 * (rest if sharding == "full" else rest + towers.plain)
            if sharding == "full":
                asked = count * (3 if kind == "cached" else 2)
                assert sent["reducescatter"] == 2 * towers.padded
                gathered = sent["allgather"] - found[0][f"{case}-none"][3]["allgather"]
                assert gathered == 2 * towers.padded * asked
            for rank in range(2):
                gradients = load_file(folder / f"{name}-{case}-{sharding}-{rank}.safetensors")
                assert set(gradients) == set(expected)
                for key, value in expected.items():
                    torch.testing.assert_close(gradients[key], value, rtol=1e-5, atol=1e-6 * largest)


# An objective that looks at weights of a tower beside its calls.
DIRECT = """
import sys
from contextlib import nullcontext
from pathlib import Path
import torch
from diptych.data.loader import Loader, LoaderConfig
from diptych.data.sources import open_source
from diptych.methods import clip
from diptych.models.checkpoint import load_model
from diptych.training import distributed
from diptych.training.step import accumulate_gradients
from diptych.types import Losses

class Direct(clip.Objective):
    def loss(self, encoded, batch):
        total = super().loss(encoded, batch).total + self.model.vision.position.square().sum()
        return Losses(total, {})

folder = Path(sys.argv[1])
with distributed.processes(torch.device("cpu")):
    objective = Direct(load_model(folder / "model"), clip.Config())
    distributed.shard(objective)
    loader = Loader(open_source(folder / "photos"), objective.model.image_policy, objective.model.tokenizer,
                    LoaderConfig(batch_size=3), part=distributed.part())
    accumulate_gradients(objective, iter(loader), 1, nullcontext())
"""


@pytest.mark.slow
def test_weights_of_sharded_towers_cannot_be_used_by_themselves(folder):
    for process in launch("-c", DIRECT, str(folder)):
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 1
        assert "ConfigError: Sharded towers can only be called as a whole" in error and "Set sharding to none." in error


MODES = ("none", "full")


def run(folder: Path, name: str, *, dies: str = "never", world: int = 2, **changes: object) -> list[subprocess.Popen]:
    return launch("-c", RUN, str(folder), name, dies, json.dumps(changes), world=world)


@pytest.fixture(scope="module", params=MODES)
def whole(request, folder) -> str:
    """Return how towers were sharded in a run of two processes that was not interrupted; it lies in the folder under that name."""
    finish(run(folder, request.param, sharding=request.param))
    return request.param


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a run's checkpoint, as if nothing had been cut."""
    parts = {stem: Shards(folder / "checkpoint", stem).whole() for stem in ("model", "training")}
    return {f"{stem}.{name}": value for stem, tensors in parts.items() for name, value in tensors.items()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Check all but the random states, of which there is one per process."""
    names = {name for name in expected if "generator" not in name}
    assert names == {name for name in found if "generator" not in name}
    for name in names:
        scale = max(1.0, expected[name].abs().max().item())
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.slow
def test_a_run_of_two_processes_is_that_of_one(folder, whole):
    finish(run(folder, f"one-{whole}", world=1, data={"batch_size": 6}))
    assert_close(saved(folder / whole), saved(folder / f"one-{whole}"), 1e-6)
    rows = [
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in (whole, f"one-{whole}")
    ]
    assert [row["step"] for row in rows[0]] == [1, 2, 2, 3, 4, 4]  # written once, by the first process
    for two, one in zip(*rows, strict=True):
        for key in one.keys() & {"loss", "grad_norm", "scale", "evaluation"}:
            assert two[key] == pytest.approx(one[key], rel=1e-5)
    assert max(row.get("grad_norm", 0) for row in rows[0]) > 0.5  # they were clipped


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["step", "part", "exchange"])
def test_a_killed_process_ends_the_run_and_it_goes_on_to_the_same_weights(folder, whole, dies):
    if whole == "none" and dies == "part":
        pytest.skip("only the first process writes")
    name = f"{whole}-{dies}"
    processes = run(folder, name, dies=dies, sharding=whole)
    killed, other = processes if dies == "exchange" else reversed(processes)
    why = killed.communicate(timeout=300)[1]
    error = other.communicate(timeout=300)[1]
    assert killed.returncode == -signal.SIGKILL, why
    assert other.returncode == 1
    assert "Another process of this run has stopped" in error and "--resume" in error
    checkpoint = folder / name / "checkpoint"
    assert json.loads((checkpoint / "training.json").read_text())["step"] == 1
    load_model(checkpoint)
    finish(run(folder, name, sharding=whole))
    one, other = saved(folder / name), saved(folder / whole)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4]
    assert {path.name for path in (folder / name).iterdir()} == {"checkpoint", "metrics.jsonl"}


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(folder, whole):
    other = next(mode for mode in MODES if mode != whole)
    parts = run(folder, f"moved-{whole}", dies="step", sharding=whole)
    for process in parts:
        process.communicate(timeout=300)
    shutil.copytree(folder / f"moved-{whole}", folder / f"moved-to-{other}")
    (wrong,) = run(folder, f"moved-{whole}", world=1)
    assert "batches of 6 over all processes; now they hold 3" in wrong.communicate(timeout=300)[1]
    finish(run(folder, f"moved-{whole}", world=1, data={"batch_size": 6}))
    finish(run(folder, f"moved-to-{other}", sharding=other))
    for name in (f"moved-{whole}", f"moved-to-{other}"):
        assert_close(saved(folder / name), saved(folder / whole), 1e-6)


@pytest.mark.slow
def test_adapted_and_frozen_towers_are_saved_whole(folder):
    model = {"vision_mode": "frozen", "text_mode": "lora"}
    for process in run(folder, "lora", dies="step", sharding="full", model=model):
        process.communicate(timeout=300)
    finish(run(folder, "lora", sharding="full", model=model))
    finish(run(folder, "lora-one", world=1, data={"batch_size": 6}, model=model))
    assert_close(saved(folder / "lora"), saved(folder / "lora-one"), 1e-6)


@pytest.mark.slow
def test_a_sharded_checkpoint_is_read_as_any_other(folder, tmp_path):
    for process in run(folder, "unfinished", dies="step", sharding="full"):
        process.communicate(timeout=300)
    names = {path.name for path in (folder / "unfinished" / "checkpoint").iterdir()}
    shards = {f"{stem}-0000{number}-of-00002.safetensors" for stem in ("model", "training") for number in (1, 2)}
    assert names == {*shards, "model.json", "tokenizer.json", "training.json"}
    convert(str(folder / "unfinished"), out=tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").exists()
    one, other = load(folder / "unfinished").state_dict(), load(tmp_path / "whole").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    (folder / "unfinished" / "checkpoint" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        load(folder / "unfinished")
