"""What runs in the environments of other libraries is not run here; that it is there, and what those environments share, is."""

import ast
import importlib.util
from pathlib import Path

import diptych
from diptych.bench import curate, data, search, startup, train

ANCHORS = Path(__file__).parents[2] / "benchmarks" / "anchors"


def test_every_anchor_has_requirements_and_a_script():
    scripts = {f"train-{script}" for _, script, _ in train.ANCHORS}
    scripts |= {f"data-{name}" for name in data.ANCHORS} | {f"search-{anchor}" for anchor, _, _ in search.ANCHORS}
    scripts |= {f"curate-{name}" for name in curate.ANCHORS}
    assert {path.stem for path in ANCHORS.glob("*.py")} == scripts | {"environment"}
    environments = {entry.family for entry, _, _ in train.ANCHORS} | set(startup.ANCHORS.values())
    environments |= set(data.ANCHORS) | set(curate.ANCHORS) | {anchor for anchor, _, _ in search.ANCHORS}
    assert {path.stem for path in ANCHORS.glob("*.txt")} == environments


def test_scripts_take_the_job_that_they_are_given():
    jobs = {f"train-{script}": {"folder", "batch", "tokens", *job} for _, script, job in train.ANCHORS} | {
        "data-webdataset": {"folder", "workers", "samples", "pixels"},
        "search-faiss": {"folder", "kind", "count"},
        **{f"curate-{name}": {"folder", "whole"} for name in curate.ANCHORS},
    }
    for script, keys in jobs.items():
        tree = ast.parse((ANCHORS / f"{script}.py").read_text())
        (make,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "make")
        assert keys <= {argument.arg for argument in make.args.args}, script


def test_environments_share_torch_and_diptych_and_nothing_else(tmp_path):
    spec = importlib.util.spec_from_file_location("environment", ANCHORS / "environment.py")
    environment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(environment)
    environment.link_shared(tmp_path)
    environment.link_shared(tmp_path)  # again, over what is there
    names = {path.name for path in tmp_path.iterdir()}
    assert {"diptych", "torch", "torchvision"} <= names and not {"numpy", "transformers", "bin"} & names
    assert (tmp_path / "diptych").resolve() == Path(diptych.__file__).parent
    assert any(name.startswith("torch-") and name.endswith(".dist-info") for name in names)  # pip sees that it is there
