"""The cluster files in docs/scaling.md are what a shell and a YAML parser take, and the commands in them are ours."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from diptych.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
BLOCKS = re.findall(r"^```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Return the arguments of every `diptych train` of the page."""
    text = "\n".join(BLOCKS).replace("\\\n", " ").replace('"$out"', "runs/one")
    found = re.findall(r"-m diptych (train [^$\n]*)", text)
    return [shlex.split(words) for words in found]


def test_the_batch_script_is_valid_shell(tmp_path):
    (script,) = (block for block in BLOCKS if block.startswith("#!/bin/bash"))
    (tmp_path / "job.sh").write_text(script)
    done = subprocess.run(["bash", "-n", str(tmp_path / "job.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"$first:29500" \\\n' in script  # the line goes on


def test_the_job_is_valid_yaml():
    yaml = pytest.importorskip("yaml")
    (block,) = (block for block in BLOCKS if block.startswith("apiVersion"))
    job = yaml.safe_load(block)
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    policy = job["spec"]["elasticPolicy"]
    assert worker["replicas"] == policy["minReplicas"] == policy["maxReplicas"]
    assert int(job["spec"]["nprocPerNode"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    (line,) = container["args"]
    done = subprocess.run(["bash", "-n", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_commands_are_ours(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(commands()) == 4
    for words in commands():
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert (
            stop.value.code == 2 and "diptych train: " in capsys.readouterr().err
        )  # all but that the data are not here
