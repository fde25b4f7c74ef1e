"""Where numbers go while a run is on: metrics.jsonl always, other writers on request, and one live line for the human."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diptych.data.loader import Loader
from diptych.errors import require
from diptych.files import write_text
from diptych.training import distributed
from diptych.training.recipe import Writer
from diptych.types import Batch


class Stopwatch:
    """How long steps take, and how much of it they wait for data. What lies between steps is not counted."""

    def __init__(self, loader: Loader) -> None:
        self._loader, self._given = loader, loader.given
        self._data = self._total = self._began = 0.0
        self._flops = 0

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of the loader; the time each takes to come is that of data."""
        batches = iter(self._loader)
        while True:
            began = time.perf_counter()
            batch = next(batches)
            self._data += time.perf_counter() - began
            yield batch

    def start(self) -> None:
        """Begin a step."""
        self._began = time.perf_counter()

    def stop(self, flops: int) -> None:
        """End a step of so many floating-point operations."""
        self._total += time.perf_counter() - self._began
        self._flops += flops

    def lap(self, peak: float) -> dict[str, float]:
        """Return the numbers for the log since the last call; `peak` is the GFLOP/s that the machine could do."""
        compute = self._total - self._data
        gflops = self._flops / compute / 1e9
        found = {
            "seconds_data": self._data,
            "seconds_compute": compute,
            "gflops": gflops,
            "peak_share": gflops / peak,
            "samples_per_second": (self._loader.given - self._given) * distributed.part()[1] / self._total,
        }
        self._data, self._total, self._flops, self._given = 0.0, 0.0, 0, self._loader.given
        return found


class MetricsLog:
    """Appends rows to metrics.jsonl, and hands them to the optional writers. Only the first of several processes writes.

    Rows later than `step` are cut off first: after a resume they would be written twice.
    """

    def __init__(self, folder: Path, *, step: int = 0, writers: Sequence[Writer] = ()) -> None:
        self.path = folder / "metrics.jsonl"
        self._writers: list[_TensorBoard | _Run] = []
        if not distributed.is_first():
            return
        kept = [row for row in read_rows(self.path) if row["step"] <= step] if step else []
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._writers = [_open_writer(name, folder, step) for name in writers]

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one row; it is in the file when this returns, and outlives the process, though not the machine."""
        if not distributed.is_first():
            return
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for writer in self._writers:
            writer.write(int(row["step"]), dict(_scalars(row)))

    def close(self) -> None:
        """Flush the optional writers."""
        for writer in self._writers:
            writer.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        require("tensorboard", "log")
        writer = require("torch.utils.tensorboard", "log").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Run:
    """wandb, or trackio, which has the same three functions."""

    def __init__(self, package: str, folder: Path) -> None:
        self._package = require(package, package)
        self._package.init(project="diptych", name=folder.name)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._package.log(dict(values), step=step)

    def close(self) -> None:
        self._package.finish()


def _open_writer(name: Writer, folder: Path, step: int) -> _TensorBoard | _Run:
    return _TensorBoard(folder, step) if name == "tensorboard" else _Run(name, folder)


def _scalars(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield name and value of every number of a row, nested names joined by slashes."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield prefix + name, float(value)


class Display:
    """The live line of a run. On a terminal it moves; in a file it is one line per log row."""

    def __init__(self, console: Console, progress: Progress, task: Any) -> None:
        self._console, self._progress, self._task = console, progress, task

    def show(self, row: Mapping[str, Any]) -> None:
        """Show one training row."""
        line = (
            f"loss {row['loss']:.3f}  {row['samples_per_second']:.0f} samples/s  "
            f"data {row['seconds_data']:.2f} s  compute {row['seconds_compute']:.2f} s"
        )
        self._progress.update(self._task, completed=row["step"], line=line)
        if not self._console.is_terminal:
            self._console.print(f"step {row['step']}/{self._progress.tasks[0].total}  epoch {row['epoch']:g}  {line}")

    def say(self, sentence: str) -> None:
        """Print a sentence above the live line."""
        self._console.print(sentence, highlight=False, markup=False)


@contextmanager
def display(total: int, console: Console) -> Iterator[Display]:
    """Show a progress bar over `total` steps while the context is open."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[line]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    if not distributed.is_first():
        console = Console(quiet=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Display(console, progress, progress.add_task("training", total=total, line=""))
