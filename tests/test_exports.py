import inspect
import resource
import subprocess
import sys

import pytest

import diptych

PUBLIC = [
    "AbstractObjective",
    "AbstractSource",
    "Batch",
    "Columns",
    "DiptychError",
    "DualConfig",
    "DualEncoder",
    "Encoded",
    "Interval",
    "Losses",
    "METHODS",
    "PairEmbeddings",
    "Recipe",
    "Sample",
    "Text",
    "Tokens",
    "build",
    "compare",
    "convert",
    "demo",
    "doctor",
    "embed",
    "embed_images",
    "embed_texts",
    "evaluate",
    "evaluate_model",
    "load",
    "load_method",
    "methods",
    "open_source",
    "reproduce",
    "rewrite",
    "search",
    "train",
]


def test_public_names():
    assert diptych.__all__ == PUBLIC
    assert dir(diptych) == PUBLIC


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "METHODS"])
def test_public_names_are_documented_and_typed(name):
    value = getattr(diptych, name)
    assert inspect.getdoc(value)
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


def test_commands_are_functions_even_after_their_packages_are_imported():
    import diptych.evaluation.run
    import diptych.training.loop

    for name in ("train", "evaluate", "embed", "search", "doctor", "convert", "demo", "reproduce"):
        assert inspect.isfunction(getattr(diptych, name))
    assert len(diptych.methods()) == len(diptych.METHODS)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = diptych.trian


@pytest.mark.parametrize(
    "code",
    [
        "import diptych",
        "from diptych.cli import main; main(['--help'])",
        "import diptych; diptych.methods()",
    ],
)
def test_no_torch_is_loaded(code):
    check = f"{code}; import sys; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_help_is_fast():
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "diptych", "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.4
