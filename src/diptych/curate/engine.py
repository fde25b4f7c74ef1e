"""Who works on the parts: this process, several, or a Ray cluster. What is done is the same, and so is what comes out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from typing import Any

from diptych.errors import require

Task = Callable[[int], None]
"""Works on the part of this number, and leaves its result on the disk whole or not at all; doing it twice does no harm."""


class AbstractEngine(ABC):
    """Does a task for many numbers, in any order."""

    @abstractmethod
    def run(self, task: Task, numbers: Sequence[int], advance: Callable[[int], None]) -> None:
        """Do the task for each number; the first error ends it, and what is done stays done.

        Args:
            task: Can be pickled.
            numbers: Of parts.
            advance: Told of each that is done.
        """


@dataclass(frozen=True)
class LocalEngine(AbstractEngine):
    """This machine.

    Attributes:
        processes: 1 works in this process. More begin without what this one has loaded, so a script needs its `if __name__ == "__main__":`.
    """

    processes: int = 1

    def run(self, task: Task, numbers: Sequence[int], advance: Callable[[int], None]) -> None:
        """Do the task for each number."""
        if self.processes == 1 or len(numbers) == 1:
            for number in numbers:
                task(number)
                advance(1)
            return
        pool = ProcessPoolExecutor(self.processes, _clean_context(), _adopt, (task,))
        try:
            for done in as_completed([pool.submit(_do, number) for number in numbers]):
                done.result()
                advance(1)
        finally:
            pool.shutdown(cancel_futures=True)


def _clean_context() -> BaseContext:
    """Return how processes are started: from a server that has loaded the steps once, else from nothing. Never from this process and its threads."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["diptych.curate.pipeline"])
    return context


@dataclass(frozen=True)
class RayEngine(AbstractEngine):
    """A Ray cluster, through Ray Data (extra `ray`). Source and output must have the same paths on all of its machines.

    Attributes:
        address: Such as `ray://head:10001`; None starts Ray on this machine, or joins the cluster that this process is in.
        workers: At the same time; None for one per processor of the cluster.
    """

    address: str | None = None
    workers: int | None = None

    def run(self, task: Task, numbers: Sequence[int], advance: Callable[[int], None]) -> None:
        """Do the task for each number: the task goes to each worker once, the numbers are a data set of one row per block."""
        ray: Any = require("ray", "ray")
        data: Any = require("ray.data", "ray")
        if not numbers:
            return
        if not ray.is_initialized():
            ray.init(self.address, log_to_driver=False, include_dashboard=False, configure_logging=False)
        workers = min(len(numbers), self.workers or max(1, int(ray.cluster_resources().get("CPU", 1))))
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
        done = rows.map_batches(
            _Worker, fn_constructor_args=(ray.put(task),), concurrency=workers, batch_size=1, batch_format="pyarrow"
        )
        for block in done.iter_batches(batch_size=1, batch_format="pyarrow"):
            advance(block.num_rows)


class _Worker:
    """Holds the task in a process of Ray's."""

    def __init__(self, task: Any) -> None:
        ray = require("ray", "ray")
        self._task: Task = ray.get(task) if isinstance(task, ray.ObjectRef) else task

    def __call__(self, batch: Any) -> Any:
        for number in batch["number"].to_pylist():
            self._task(number)
        return batch


_task: Task  # of a worker process


def _adopt(task: Task) -> None:
    global _task
    _task = task


def _do(number: int) -> None:
    _task(number)
