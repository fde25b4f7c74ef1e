"""Contrastive losses block by block against the plain form that holds the n x n matrix, forward and backward in fp32.

Values and gradients are compared before anything is timed. The two forms take turns, so that a busy machine slows both alike; what counts
are medians of ratios. The third column compares with the three matrix products that the plain form cannot do without, by torch.mm.
Memory is measured in a process of its own per case: peak resident size minus the size with inputs in memory, gradients of
the inputs included. Sizes above --dense are not tried in the plain form. Writes benchmarks/results/loss.json and loss.md.

    python benchmarks/loss.py [--sizes 1024 2048 4096 8192 16384 65536] [--dims 128 512] [--repeats 7] [--dense 8192]
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diptych.losses.contrastive import TILED_FROM, info_nce, shared_positives, sigmoid_loss

RESULTS = Path(__file__).parent / "results"
LOSSES = ("InfoNCE", "InfoNCE, duplicates", "sigmoid", "sigmoid, duplicates")
TOLERANCE = 1e-5
Form = Literal["plain", "tiled"]
Step = Callable[[Form], list[Tensor]]


def make_step(name: str, n: int, d: int) -> Step:
    """Return a function that computes a loss of n pairs and its gradients; of every ten samples with duplicates, two are one group."""
    generator = torch.Generator().manual_seed(0)
    image = normalize(torch.randn(n, d, generator=generator), dim=-1)
    text = normalize(image + 4 * normalize(torch.randn(n, d, generator=generator), dim=-1), dim=-1)
    scale, bias = torch.tensor(30.0), torch.tensor(-10.0)
    inputs = [image, text, scale, bias][: 3 if "InfoNCE" in name else 4]
    for value in inputs:
        value.requires_grad_()
    loss = info_nce if "InfoNCE" in name else sigmoid_loss
    group, key = torch.arange(n), torch.arange(n)
    if "duplicates" in name:
        group = torch.where(group % 10 == 9, group - 1, group)

    def step(form: Form) -> list[Tensor]:
        with patch.dict(TILED_FROM, clear=True) if form == "plain" else patch.dict(TILED_FROM, cpu=0):
            value = loss(*inputs, positives=shared_positives(group, key))
            return [value.detach(), *torch.autograd.grad(value, inputs)]

    return step


def products(n: int, d: int) -> float:
    """Return the seconds that three n x n x d products take, from one of at most 2048 x 2048 x d."""
    side = min(n, 2048)
    a, b, out = torch.randn(side, d), torch.randn(d, side), torch.empty(side, side)
    torch.mm(a, b, out=out)
    began = time.perf_counter()
    torch.mm(a, b, out=out)
    return 3 * (time.perf_counter() - began) * (n / side) ** 2


def seconds(step: Step, form: Form) -> float:
    """Return how long one step takes."""
    began = time.perf_counter()
    step(form)
    return time.perf_counter() - began


def largest_difference(step: Step) -> float:
    """Return the largest relative difference between the two forms, over the loss and each gradient as a whole."""
    pairs = zip(step("plain"), step("tiled"), strict=True)
    return max(float((a - b).norm() / a.norm()) for a, b in pairs)


def memory(name: str, n: int, d: int, form: Form) -> float:
    """Return the megabytes that one step takes beyond its inputs; only right in a fresh process."""
    make_step(name, 1024, d)(form)
    step = make_step(name, n, d)
    before = resident("VmRSS")
    step(form)
    return resident("VmHWM") - before


def resident(which: str) -> float:
    """Return megabytes in memory, now (VmRSS) or at most so far (VmHWM); ru_maxrss would start at the size of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def memory_in_child(name: str, n: int, d: int, form: Form) -> float:
    """Return `memory`, measured in a process of its own."""
    command = [sys.executable, __file__, "--memory", name, str(n), str(d), form]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(name: str, n: int, d: int, repeats: int, plain: bool) -> dict[str, object]:
    """Return one row."""
    step = make_step(name, n, d)
    row: dict[str, object] = {"loss": name, "n": n, "d": d}
    if plain:
        difference = largest_difference(step)
        assert difference < TOLERANCE, f"{name}, n = {n}, d = {d}: the forms differ by {difference:.1e}"
        row["difference"] = difference
    forms: tuple[Form, ...] = ("plain", "tiled") if plain else ("tiled",)
    turns = [{form: seconds(step, form) for form in forms} | {"products": products(n, d)} for _ in range(repeats)]
    if plain:
        row["tiled_over_plain"] = statistics.median(turn["tiled"] / turn["plain"] for turn in turns)
    for form in forms:
        row[f"{form}_over_products"] = statistics.median(turn[form] / turn["products"] for turn in turns)
        row[f"{form}_s"] = statistics.median(turn[form] for turn in turns)
        row[f"{form}_mb"] = memory_in_child(name, n, d, form)
    return row


def table(rows: list[dict[str, object]]) -> list[str]:
    """Return the lines of a Markdown table."""

    def cell(row: dict[str, object], key: str, form: str) -> str:
        return format(row[key], form) if key in row else "-"

    lines = [
        "| loss | n | d | time, tiled / plain | tiled / 3 products | plain / 3 products | MB, tiled | MB, plain | difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = (
            ("tiled_over_plain", ".2f"),
            ("tiled_over_products", ".2f"),
            ("plain_over_products", ".2f"),
            ("tiled_mb", ",.0f"),
            ("plain_mb", ",.0f"),
            ("difference", ".0e"),
        )
        cells = " | ".join(cell(row, key, form) for key, form in numbers)
        lines.append(f"| {row['loss']} | {row['n']:,} | {row['d']} | {cells} |")
    return lines


def main() -> None:
    """Measure everything, or (`--memory`) one case for the process that asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 65536])
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dense", type=int, default=8192)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--memory", nargs=4, metavar=("LOSS", "N", "D", "FORM"))
    given = parser.parse_args()
    if given.memory:
        name, n, d, form = given.memory
        print(memory(name, int(n), int(d), form))
        return
    rows = []
    for d in given.dims:
        for n in given.sizes:
            for name in given.losses:
                repeats = max(1, given.repeats if n <= given.dense else given.repeats // 3)
                rows.append(measure(name, n, d, repeats, n <= given.dense))
                print(table(rows)[-1], flush=True)
    machine = {
        "processor": platform.machine(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    packages = {"python": platform.python_version(), "torch": version("torch")}
    setting = {"repeats": given.repeats, "dtype": "float32", "pass": "forward and backward"}
    given.out.mkdir(parents=True, exist_ok=True)
    record = {"setting": setting, "machine": machine, "packages": packages, "rows": rows}
    (given.out / "loss.json").write_text(json.dumps(record, indent=2) + "\n")
    head = f"Forward and backward in fp32, {machine['threads']} threads ({machine['vector']}), medians of {given.repeats} turns."
    (given.out / "loss.md").write_text("\n".join([head, "", *table(rows)]) + "\n")


if __name__ == "__main__":
    main()
