"""The far end of a `Child`: what runs in an anchor's environment. Standard library only, since nothing else of ours is there.

The job comes as JSON on the command line. The first line out says which versions are here; then every line in means "take a step", and every
line out is JSON with what came out and the seconds it took.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any


def serve(make: Callable[..., Callable[[], Any]], packages: Sequence[str]) -> None:
    """Answer at the other end of a `Child`: make a step from the job, say which versions are here, then take steps until the input ends.

    Args:
        make: Called with the job's keys; returns a step, whose result must fit into JSON.
        packages: That take the step.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the error stream

    def say(answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    step = make(**json.loads(sys.argv[-1]))
    say({"versions": {name: version(name) for name in packages}})
    for _ in sys.stdin:
        began = time.perf_counter()
        value = step()
        say({"seconds": time.perf_counter() - began, "value": value})
