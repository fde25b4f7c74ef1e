from dataclasses import replace

import pytest
import torch
from rich.console import Console

from diptych.data.loader import LoaderConfig
from diptych.data.parts import slices
from diptych.errors import ConfigError
from diptych.evaluation.continual import ItemTrace, Trace
from diptych.methods import clip, mod_x, zscl
from diptych.models.checkpoint import load_model
from diptych.models.embedding import embed_images
from diptych.training.optim import OptimizerConfig
from diptych.training.recipe import ModelConfig, Recipe
from diptych.training.stream import Stage, fitted, run_stream

QUIET = Console(quiet=True)
RECIPE = Recipe(
    "clip",
    clip.Config(),
    model=ModelConfig(start="new"),
    data=LoaderConfig(batch_size=4, workers=0),
    optimizer=OptimizerConfig(lr=0.01),
    epochs=3,
    save_every=2,
    device="cpu",
    precision="fp32",
)


@pytest.fixture
def stages(drawings) -> list[Stage]:
    return [Stage(f"part-{n}", part, RECIPE) for n, part in enumerate(slices(drawings(16), 2), 1)]


@pytest.fixture
def measure(drawings):
    """Return a function that measures a model: the mean of its embeddings of each part, which any change of the weights shows in."""
    parts = slices(drawings(16), 2)
    return lambda model: [float(embed_images(model, part).mean()) for part in parts]


def test_a_stream_is_its_stages_one_after_another(make_model, stages, measure, tmp_path):
    scores = run_stream(make_model(), stages, fitted(clip.Objective, console=QUIET), measure, tmp_path / "stream")
    assert len(scores) == 3 and len({row[0] for row in scores}) == 3
    model, train = make_model(), fitted(clip.Objective, console=QUIET)
    expected = [tuple(measure(model))]
    for stage in stages:
        model = train(model, stage, tmp_path / "by hand" / stage.name)
        expected.append(tuple(measure(model)))
    assert scores == tuple(expected)
    assert Trace("mean", ("part-1", "part-2"), ("part-1", "part-2"), scores).matrix.shape == (2, 2)


def test_what_is_finished_is_not_done_again(make_model, stages, measure, tmp_path):
    train = fitted(clip.Objective, console=QUIET)
    scores = run_stream(make_model(), stages[:1], train, measure, tmp_path)

    def never(*_):
        raise AssertionError

    assert run_stream(make_model(), stages[:1], never, never, tmp_path) == scores
    assert run_stream(make_model(), stages, train, measure, tmp_path)[:2] == scores


def test_items_are_kept_one_by_one(make_model, stages, drawings, tmp_path):
    def each(model):
        return [tuple(embed_images(model, part)[:, 0].tolist()) for part in slices(drawings(16), 2)]

    train = fitted(clip.Objective, console=QUIET)
    items = run_stream(make_model(), stages, train, each, tmp_path)
    assert items[0] == tuple(each(make_model())) and [[len(task) for task in row] for row in items] == [[8, 8]] * 3
    names = ("part-1", "part-2")
    trace = ItemTrace("first number", names, names, items)
    again = run_stream(make_model(), stages, train, each, tmp_path)  # read from the disk
    assert ItemTrace("first number", names, names, again) == trace


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(
    ("module", "stop"),
    [(clip, 1), (clip, 2), (clip, 3), (mod_x, "in a fit"), (zscl, "in a fit")],
    ids=lambda value: getattr(value, "__name__", str(value)).rpartition(".")[2],
)
def test_a_stream_that_was_stopped_anywhere_ends_the_same(
    make_model, stages, measure, tmp_path, monkeypatch, stop, module
):
    stages = [replace(stage, recipe=replace(RECIPE, objective=module.Config())) for stage in stages]
    train = fitted(module.Objective, console=QUIET)
    scores = run_stream(make_model(), stages, train, measure, tmp_path / "whole")
    calls = 0

    def stopping(model):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise StoppedError
        return measure(model)

    class Stopping(module.Objective):
        def after_step(self, step: int) -> None:
            nonlocal calls
            super().after_step(step)
            calls += 1
            if calls == 9:  # of two stages with six steps each; the last checkpoint is that of step 8
                raise StoppedError

    first = fitted(Stopping, console=QUIET) if stop == "in a fit" else train
    with pytest.raises(StoppedError):
        run_stream(make_model(), stages, first, stopping if stop != "in a fit" else measure, tmp_path / "stopped")
    assert run_stream(make_model(), stages, train, measure, tmp_path / "stopped") == scores
    last = [load_model(tmp_path / kind / "02-part-2" / "checkpoint").state_dict() for kind in ("whole", "stopped")]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_a_stream_of_other_stages_is_refused(make_model, stages, measure, tmp_path):
    train = fitted(clip.Objective, console=QUIET)
    run_stream(make_model(), stages[:1], train, measure, tmp_path)
    other = replace(stages[0], recipe=replace(RECIPE, epochs=2))
    with pytest.raises(ConfigError, match=r"01-part-1 was run with other settings or other samples"):
        run_stream(make_model(), [other], train, measure, tmp_path)


def test_the_teacher_of_a_stage_is_the_model_after_the_stage_before(make_model, stages, measure, tmp_path):
    seen = []

    class Watched(mod_x.Objective):
        def __init__(self, model, config):
            super().__init__(model, config)
            seen.append(self.old.module)

    recipe = replace(RECIPE, objective=mod_x.Config())
    run_stream(
        make_model(), [replace(s, recipe=recipe) for s in stages], fitted(Watched, console=QUIET), measure, tmp_path
    )
    before = load_model(tmp_path / "01-part-1" / "checkpoint")
    for own, theirs in zip(seen[1].parameters(), before.parameters(), strict=True):
        assert torch.equal(own, theirs)
