"""Two processes are one: same batches, same loss, same gradients, same weights after a run, whatever the kind of step."""

import json
import os
import signal
import socket
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diptych.config import override, to_json
from diptych.data.loader import Loader, LoaderConfig
from diptych.data.sources import open_source
from diptych.methods import clip
from diptych.models.checkpoint import load_model, save_model
from diptych.training.step import STEPS

# What each process does: gradients of one step of each kind, written by both, and the number of collectives it took.
GRADIENTS = """
import json, sys
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
import torch, torch.distributed as dist
from safetensors.torch import save_file
from diptych.data.loader import Loader, LoaderConfig
from diptych.data.sources import open_source
from diptych.methods import clip
from diptych.models.checkpoint import load_model
from diptych.training import distributed
from diptych.training.step import STEPS

folder = Path(sys.argv[1])
counted = {"all_reduce": 0}
plain = dist.all_reduce
def counting(*args, **kwargs):
    counted["all_reduce"] += 1
    return plain(*args, **kwargs)
dist.all_reduce = counting

with distributed.processes(torch.device("cpu")):
    rank, world = distributed.part()
    losses = {}
    for kind, count in (("accumulated", 1), ("accumulated", 2), ("cached", 2)):
        objective = clip.Objective(load_model(folder / "model"), clip.Config())
        loader = Loader(open_source(folder / "photos"), objective.model.image_policy, objective.model.tokenizer,
                        LoaderConfig(batch_size=3), repeat=count if kind == "cached" else None, part=(rank, world))
        found = STEPS[kind](objective, iter(loader), count, nullcontext())
        counted["all_reduce"] = 0
        distributed.average_gradients(objective)
        assert counted["all_reduce"] == 1
        name = f"{kind}{count}"
        losses[name] = [loss.total.item() for loss in found]
        gradients = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
        save_file(gradients, folder / f"{name}-{rank}.safetensors")
    (folder / f"losses-{rank}.json").write_text(json.dumps(losses))
"""

RUN = """
import json, os, signal, sys
from pathlib import Path
import torch
from rich.console import Console
from diptych.config import override
from diptych.data.sources import open_source
from diptych.methods import clip
from diptych.models.checkpoint import load_model
from diptych.training import distributed
from diptych.training.loop import fit
from diptych.training.prepare import make_loader

folder, name, dies_after = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
recipe = override(clip.recipe(), json.loads((folder / "recipe.json").read_text()))

class Objective(clip.Objective):
    def after_step(self, step):
        if step == dies_after and distributed.part()[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)

with distributed.processes(torch.device("cpu")):
    model = load_model(folder / "model")
    torch.manual_seed(distributed.part()[0])
    loader = make_loader(recipe, open_source(folder / "photos"), model)
    (folder / name).mkdir(exist_ok=True)
    fit(Objective(model, recipe.objective), loader, recipe, folder / name, console=Console(), resume=True)
"""


@pytest.fixture
def folder(make_model, drawings, tmp_path) -> Path:
    """Return a folder with a model and thirteen photos, one of which cannot be read."""
    (tmp_path / "photos").mkdir()
    for sample in drawings(13):
        (tmp_path / "photos" / f"{sample.key}.png").write_bytes(sample.image if sample.key != "s4" else b"broken")
        (tmp_path / "photos" / f"{sample.key}.txt").write_text(sample.texts[0].text)
    save_model(make_model(), tmp_path / "model")
    return tmp_path


def launch(script: str, *arguments: str) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def finish(processes: list[subprocess.Popen]) -> list[str]:
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return errors


def test_two_processes_have_the_gradients_of_one(folder):
    finish(launch(GRADIENTS, str(folder)))
    losses = [json.loads((folder / f"losses-{rank}.json").read_text()) for rank in range(2)]
    assert losses[0] == losses[1]
    for kind, count in (("accumulated", 1), ("accumulated", 2), ("cached", 2)):
        objective = clip.Objective(load_model(folder / "model"), clip.Config())
        loader = Loader(
            open_source(folder / "photos"),
            objective.model.image_policy,
            objective.model.tokenizer,
            LoaderConfig(batch_size=6),
            repeat=count if kind == "cached" else None,
        )
        batches = list(islice(loader, count * (2 if kind == "cached" else 1)))
        assert {len(batch) for batch in batches} == {6, 5} or count == 1  # one sample is skipped: uneven parts
        found = STEPS[kind](objective, batches, count, torch.autocast("cpu", enabled=False))
        assert losses[0][f"{kind}{count}"] == pytest.approx([loss.total.item() for loss in found], rel=1e-6)
        expected = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
        largest = max(value.abs().max().item() for value in expected.values())
        for rank in range(2):
            gradients = load_file(folder / f"{kind}{count}-{rank}.safetensors")
            assert set(gradients) == set(expected)
            for name, value in expected.items():
                torch.testing.assert_close(gradients[name], value, rtol=1e-5, atol=1e-6 * largest)


@pytest.fixture
def recipe(folder):
    made = override(
        clip.recipe(),
        {
            "data": {"batch_size": 3},
            "epochs": 4,
            "accumulate": 2,
            "step": "cached",
            "save_every": 1,
            "log_every": 1,
            "precision": "fp32",
        },
    )
    (folder / "recipe.json").write_text(json.dumps(to_json(made)))
    return made


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_it_goes_on_to_the_same_weights(folder, recipe):
    finish(launch(RUN, str(folder), "whole", "-1"))
    first, second = launch(RUN, str(folder), "run", "2")
    why = second.communicate(timeout=60)[1]
    error = first.communicate(timeout=60)[1]
    assert second.returncode == -signal.SIGKILL, why
    assert first.returncode == 1
    assert "Another process of this run has stopped" in error and "--resume" in error
    finish(launch(RUN, str(folder), "run", "-1"))
    for name in ("model.safetensors", "training.safetensors"):
        one, other = (load_file(folder / run / "checkpoint" / name) for run in ("run", "whole"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]  # written once, by the first process
