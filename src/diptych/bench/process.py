"""Other processes: anchors that take a step when asked, and functions that must run in a fresh process.

Anchors live in environments of their own and speak the line protocol of `serve`.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from diptych.bench.turns import Contender, Turn
from diptych.errors import DiptychError
from diptych.threads import thread_settings


class Child:
    """A process that serves a contender.

    Attributes:
        hello: What it said of itself when it was ready.
    """

    def __init__(self, command: list[str], job: Mapping[str, Any]) -> None:
        """Start it and wait until it is ready.

        Raises:
            DiptychError: If it ends instead, with the last line it wrote.
        """
        self._command = command
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [*command, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment(),
        )
        self.hello = self._read()

    def step(self) -> Turn:
        """Let it take a step."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: reading says why
        answer = self._read()
        return Turn(answer["seconds"], answer["value"])

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().strip().splitlines()[-1:] or ["no message"]
        self.close()
        raise DiptychError(f"{Path(self._command[-1]).name} ended with code {self._process.returncode}: {last[0]}")


class Anchors:
    """The anchors of one area: started on demand, ended with the context. What cannot be started is left out, with a note.

    Attributes:
        notes: Which anchors are missing, and why.
        versions: Of those that are there.
    """

    def __init__(self, environments: Path, scripts: Path) -> None:
        """Say where anchors are.

        Args:
            environments: One virtual environment per anchor, made by `make bench`.
            scripts: What runs in them.
        """
        self._environments, self._scripts = environments, scripts
        self._children: list[Child] = []
        self.notes: list[str] = []
        self.versions: dict[str, Mapping[str, str]] = {}

    def __enter__(self) -> "Anchors":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, error, trace
        for child in self._children:
            child.close()

    def start(self, anchor: str, name: str, script: str, **job: Any) -> list[Contender]:
        """Return a contender in a process of its own, which stays; nothing if it cannot be started."""
        child = self._child(anchor, name, script, job)
        if child is None:
            return []
        self._children.append(child)
        return [Contender(name, child.step)]

    def ask(self, anchor: str, name: str, script: str, **job: Any) -> Any:
        """Return what one step in a fresh process gives; None if it cannot be started."""
        child = self._child(anchor, name, script, job)
        if child is None:
            return None
        try:
            return child.step().value
        except DiptychError as error:
            self._leave_out(name, str(error))
            return None
        finally:
            child.close()

    def python(self, anchor: str) -> Path | None:
        """Return the Python of an anchor's environment; None if it has not been made."""
        place = self._environments / anchor
        if (place / ".done").is_file():
            return place.absolute() / "bin" / "python"
        self._leave_out(anchor, "its environment is not there; `make bench` makes it")
        return None

    def _child(self, anchor: str, name: str, script: str, job: Mapping[str, Any]) -> Child | None:
        if (python := self.python(anchor)) is None:
            return None
        try:
            child = Child([str(python), str(self._scripts / f"{script}.py")], job)
        except DiptychError as error:
            self._leave_out(name, str(error))
            return None
        self.versions[anchor] = child.hello["versions"]
        return child

    def _leave_out(self, name: str, reason: str) -> None:
        note = f"{name} is left out: {reason}."
        if note not in self.notes:
            self.notes.append(note)


def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function of a module gives in a fresh process; arguments and result must fit into JSON.

    Raises:
        DiptychError: If it fails, with the last line it wrote.
    """
    code = (
        "import json, sys\n"
        f"from {function.__module__} import {function.__name__} as function\n"
        "print(json.dumps(function(*json.loads(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)], capture_output=True, text=True, env=environment()
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise DiptychError(f"{function.__name__}{arguments} ended with code {done.returncode}: {last[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def environment() -> dict[str, str]:
    """Return the environment of a child: as many threads as here, and they wait for one another as the command line's do."""
    threads = torch.get_num_threads()
    return os.environ | thread_settings(threads) | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
