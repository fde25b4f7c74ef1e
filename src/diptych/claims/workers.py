"""Who runs the trials: this process, or several others, each of which holds the claims of one method and runs one trial at a time."""

import os
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from types import ModuleType
from typing import Any

import torch

from diptych.claims.claim import Arm, Claim
from diptych.claims.trials import Bench, Outcome, Split
from diptych.errors import TrainingError
from diptych.threads import usable_cores

Run = Callable[[Claim, Arm, int, Split, Mapping[str, Any]], Outcome]
"""Runs one trial: of a claim and its arm, a seed, a split, and a point of the arm's grid."""
Job = Callable[[Run], list[Outcome]]
"""Has trials run, one after another."""


class Worker:
    """A process that runs trials, begun when the first is asked for.

    It has nothing of what this process has loaded, so a script needs its `if __name__ == "__main__":`.

    Args:
        slug: Of the method.
        modules: Returns the module of a method by its slug; can be pickled.
        versions: Of packages, for the record.
        threads: That torch may use there.
    """

    def __init__(
        self, slug: str, modules: Callable[[str], ModuleType], versions: Mapping[str, str], threads: int
    ) -> None:
        context = get_context("spawn")
        self._connection, self._theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(self._theirs, slug, modules, dict(versions), threads))

    def run(self, claim: Claim, arm: Arm, seed: int, split: Split, changes: Mapping[str, Any]) -> Outcome:
        """Return the outcome of one trial; what it raises is raised here.

        Raises:
            TrainingError: If the trial breaks down, or its process ends.
        """
        if self._process.pid is None:
            self._process.start()
            self._theirs.close()
        try:
            self._connection.send((claim.name, arm.name, seed, split, changes))
            answer: Outcome | Exception = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise TrainingError(
                f"The process of {arm.name}, seed {seed}, {split} ended with exit code {self._process.exitcode}; with -9 it is most likely that "
                "memory ran out. What is done is in the log: run the same command again with --processes 1."
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()


@contextmanager
def open_workers(
    number: int, slug: str, modules: Callable[[str], ModuleType], versions: Mapping[str, str]
) -> Iterator[list[Worker]]:
    """Yield workers that share the processors; they end with the context."""
    threads = max(1, usable_cores() // number)
    workers = [Worker(slug, modules, versions, threads) for _ in range(number)]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.stop()


def spread(jobs: Sequence[Job], workers: Sequence[Worker]) -> list[list[Outcome]]:
    """Return what the jobs return, in their order. Each has a worker for itself while it lasts; the first error stops all workers."""
    free = SimpleQueue[Worker]()
    for worker in workers:
        free.put(worker)

    def do(job: Job) -> list[Outcome]:
        worker = free.get()
        try:
            return job(worker.run)
        finally:
            free.put(worker)

    with ThreadPoolExecutor(len(workers)) as pool:
        futures = [pool.submit(do, job) for job in jobs]
        try:
            ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
            errors = [error for future in ended if (error := future.exception()) is not None]
            if errors:
                raise errors[0]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:  # whose threads would wait until their trials are done
                worker.stop()
            raise
    return [future.result() for future in futures]


def _work(
    connection: Connection, slug: str, modules: Callable[[str], ModuleType], versions: Mapping[str, str], threads: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks hears it too, and stops this process
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    arms = {(claim.name, arm.name): (claim, arm) for claim in modules(slug).claim() for arm in claim.arms}
    bench = Bench(modules, versions)
    while True:
        claim, arm, *rest = connection.recv()
        answer: Outcome | Exception
        try:
            answer = bench.run(*arms[claim, arm], *rest)
        except Exception as error:  # for who asked
            error.add_note("".join(traceback.format_exception(error)))
            answer = error
        connection.send(answer)


def _end_with_parent() -> None:
    """Wait until who asks has ended, killed perhaps, and end this process with the trial that nobody would keep."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
