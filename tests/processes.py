"""Several processes that talk through gloo, as `torchrun` starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def launch(*arguments: str, world: int = 2) -> list[subprocess.Popen]:
    """Start Python with these arguments in so many processes; code ends as the command line does, see there."""
    if arguments[0] == "-c":
        arguments = ("-c", f"{arguments[1]}\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n", *arguments[2:])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def finish(processes: list[subprocess.Popen], *, seconds: float = 300) -> None:
    """Wait until all have ended well."""
    errors = [process.communicate(timeout=seconds)[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(errors)
