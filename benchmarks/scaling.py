"""What a step of several processes sends, and what each keeps in memory, against the formulas of docs/scaling.md.

Processes talk through gloo on this machine. Bytes are counted where collectives are called, as a ring would send them. Memory is the resident
size of the first process after three steps (or its peak during the third) minus that before the model was made; a small model has taken
steps before. Towers are ours, of equal width and depth; batches are small, so activations are too.
Writes benchmarks/results/scaling.json and scaling.md.

    python benchmarks/scaling.py [--widths 256 512] [--depth 4] [--worlds 1 2 4]
"""

import argparse
import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diptych.data.tokenizer import Tokenizer
from diptych.losses.contrastive import info_nce
from diptych.models.build import DualConfig, build
from diptych.models.dual import DualEncoder
from diptych.models.heads import LinearHeadConfig
from diptych.models.text import TextConfig
from diptych.models.vision import VisionConfig
from diptych.training import distributed
from diptych.training.optim import OptimizerConfig, make_average, make_optimizer
from diptych.training.step import STEPS, StepKind
from diptych.training.traffic import counting_traffic
from diptych.types import Batch, Losses, PairEmbeddings, Tokens
from diptych.verbs import AbstractObjective

RESULTS = Path(__file__).parent / "results"
BATCH, LENGTH, DIM, VOCABULARY, STEPS_TAKEN = 8, 16, 512, 4096, 3
ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""What is freed goes back to the system at once, so that resident memory is memory in use."""
CASES: tuple[tuple[StepKind, int], ...] = (("accumulated", 1), ("accumulated", 4), ("cached", 4))


class Contrast(AbstractObjective[PairEmbeddings]):
    """InfoNCE of the main view and the main text."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def encode(self, batch: Batch) -> PairEmbeddings:
        """Return embeddings."""
        return PairEmbeddings((self.model.encode_image(batch.images[0]),), (self.model.encode_text(batch.texts[0]),))

    def loss(self, encoded: PairEmbeddings, batch: Batch) -> Losses:
        """Return the loss."""
        del batch
        loss = info_nce(encoded.images[0], encoded.texts[0], self.model.scale)
        return Losses(loss, {"contrastive": loss})


def make(width: int, depth: int) -> Contrast:
    """Return a model with two towers of that size, for images of four patches."""
    torch.manual_seed(0)
    heads = width // 64
    config = DualConfig(
        VisionConfig(image_size=32, patch_size=16, width=width, depth=depth, heads=heads, mlp_width=4 * width),
        TextConfig(vocabulary=VOCABULARY, length=LENGTH, width=width, depth=depth, heads=heads, mlp_width=4 * width),
        LinearHeadConfig(DIM),
        LinearHeadConfig(DIM),
    )
    return Contrast(build(config, Tokenizer.train(["a red circle"], vocabulary=300, length=LENGTH)))


def samples() -> Batch:
    """Return a batch of this process."""
    keys = torch.arange(BATCH) + BATCH * distributed.part()[0]
    ids, mask = torch.randint(300, (BATCH, LENGTH)), torch.ones(BATCH, LENGTH, dtype=torch.bool)
    images = torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8)
    return Batch(tuple(map(str, keys.tolist())), (images,), (Tokens(ids, mask, keys),), keys)


def resident(which: str) -> float:
    """Return megabytes in memory, now (VmRSS) or at most since they were last asked to be forgotten (VmHWM)."""
    gc.collect()
    if which == "VmRSS":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) * 1024 / 1e6


def forget_peak() -> None:
    """Let VmHWM start from the present size."""
    Path("/proc/self/clear_refs").write_text("5")


def train(width: int, depth: int, kind: StepKind, count: int, sharding: str) -> dict[str, Any]:
    """Take some steps; return what the last one sent, and memory."""
    before = resident("VmRSS")
    objective = make(width, depth)
    towers = nn.ModuleList([objective.model.vision, objective.model.text])
    tower = sum(parameter.numel() for parameter in towers.parameters())
    whole = sum(parameter.numel() for parameter in objective.parameters()) - tower
    layer = max(sum(p.numel() for p in layer.parameters()) for side in towers for layer in distributed.layers_of(side))
    if sharding == "full":
        distributed.shard(objective)
    config = OptimizerConfig(ema_decay=0.9)
    optimizer = make_optimizer(objective, towers, config)
    average = make_average(objective, config)
    assert average is not None
    batches = cycle([samples()])
    for step in range(STEPS_TAKEN):
        optimizer.zero_grad()
        forget_peak()
        with counting_traffic() as traffic:
            STEPS[kind](objective, batches, count, nullcontext())
            distributed.average_gradients(objective)
        optimizer.step()
        average.update(objective, step)
    peak = resident("VmHWM") - before
    return {
        "tower": tower,
        "whole": whole,
        "layer": layer,
        "sent": dict(traffic.sent),
        "calls": dict(traffic.calls),
        "megabytes": resident("VmRSS") - before,
        "peak": peak,
    }


def predict(row: dict[str, Any]) -> dict[str, float]:
    """Return the formulas of docs/scaling.md."""
    world, tower, whole, count = row["world"], row["tower"], row["whole"], row["count"]
    share = (world - 1) / world
    embeddings = 8 * BATCH * count * DIM * (world - 1)
    state = 20 * (tower + whole)
    if row["sharding"] == "none":
        copy = 4 * (tower + whole) if world > 1 else 0
        return {
            "sent": 8 * (tower + whole) * share + embeddings,
            "megabytes": state / 1e6,
            "peak": (state + copy) / 1e6,
        }
    asked = count * (
        3 if row["kind"] == "cached" else 2
    )  # how often layers are put together: forward, forward again, backward
    state = 20 * (tower / world + whole)
    gradients = 4 * tower * share if count > 1 else 0
    return {
        "sent": (4 * tower * (asked + 1) + 8 * whole) * share + embeddings,
        "megabytes": state / 1e6,
        "peak": (state + 20 * row["layer"] + gradients) / 1e6,
    }


def take_part(arguments: list[str]) -> None:
    """Run one case in this process; the first one prints what it found."""
    width, depth, kind, count, sharding = arguments
    with distributed.processes(torch.device("cpu")):
        train(64, 1, kind, int(count), sharding)  # type: ignore[arg-type]
        distributed.wait()
        row = train(int(width), int(depth), kind, int(count), sharding)  # type: ignore[arg-type]
        if distributed.is_first():
            print(json.dumps(row))


def measure(world: int, width: int, depth: int, kind: StepKind, count: int, sharding: str) -> dict[str, Any]:
    """Return one row: what the first of some processes found, beside what was expected."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(world)}
    command = [sys.executable, __file__, "--part", str(width), str(depth), kind, str(count), sharding]
    started = [
        subprocess.Popen(
            command,
            env=os.environ | place | ALLOCATION | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    said = [process.communicate()[0] for process in started]
    assert not any(process.returncode for process in started)
    row = json.loads(said[0].splitlines()[-1])
    row |= {"world": world, "width": width, "depth": depth, "kind": kind, "count": count, "sharding": sharding}
    return row | {"expected": predict(row)}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [
        "| processes | parameters | step | sharding | sent, MB | formula | kept, MB | formula | peak, MB | formula |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        expected, sent = row["expected"], sum(row["sent"].values()) / 1e6
        lines.append(
            f"| {row['world']} | {(row['tower'] + row['whole']) / 1e6:.1f} M | {row['kind']} x {row['count']} | {row['sharding']} "
            f"| {sent:.2f} | {expected['sent'] / 1e6:.2f} | {row['megabytes']:.0f} | {expected['megabytes']:.0f} "
            f"| {row['peak']:.0f} | {expected['peak']:.0f} |"
        )
    return lines


def main() -> None:
    """Measure everything, or (`--part`) take part in one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--part", nargs=5)
    given = parser.parse_args()
    if given.part:
        take_part(given.part)
        return
    rows = []
    for world in given.worlds:
        for width in given.widths:
            for sharding in ("none", "full") if world > 1 else ("none",):
                for kind, count in CASES:
                    rows.append(measure(world, width, given.depth, kind, count, sharding))
                    print(table(rows)[-1], flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    record = {"torch": torch.__version__, "batch": BATCH, "dim": DIM, "rows": rows}
    (given.out / "scaling.json").write_text(json.dumps(record, indent=2) + "\n")
    (given.out / "scaling.md").write_text("\n".join(table(rows)) + "\n")


if __name__ == "__main__":
    main()
