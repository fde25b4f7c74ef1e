"""Ratios that must hold on any machine, busy or not: medians of interleaved turns, with slack. They are no measurements; `make bench` makes those."""

import subprocess
import sys

import pytest

from diptych.bench import cached, loss
from diptych.bench.process import fresh
from diptych.bench.startup import OWN, run
from diptych.bench.turns import ratio, take_turns, timed

SLACK = 1.6


@pytest.mark.parametrize("name", ["InfoNCE", "sigmoid"])
def test_tiled_loss_takes_no_longer_than_the_plain_one(name):
    """Fails if tiles are computed twice as often as they must be: today the tiled form takes less time than the plain one."""
    forms = [timed(form, loss.make_step(name, 2048, 256, form)) for form in ("plain", "tiled")]
    seconds = take_turns(forms, 5, skip=1)
    assert ratio(seconds["tiled"], seconds["plain"]).value <= 1.15 * SLACK


def test_tiled_loss_needs_no_matrix():
    """Fails if one n x n matrix of 268 MB is ever held, or a strip of n x 3,200 of it."""
    assert fresh(loss.time_and_memory, "InfoNCE", 8192, 512, "tiled")[1] <= 100


def test_cached_step_costs_one_more_forward_pass():
    """Fails if every chunk encodes the whole batch: 1 + 4 x 3 forward passes where a plain step costs 3 and a cached one 4."""
    setting = cached.Setting(batch=64, chunk=16, image=64, width=128)
    steps = [timed(kind, cached.make_step(kind, setting, "fp32")) for kind in ("plain", "cached")]
    seconds = take_turns(steps, 4, skip=1)
    assert ratio(seconds["cached"], seconds["plain"]).value <= 1.45 * SLACK


@pytest.mark.parametrize("name", ["import diptych", "diptych --help"])
def test_start_is_as_quick_as_importing_numpy(name):
    """Fails if torch is loaded, which takes ten times as long as numpy."""
    contenders = [run(each, [sys.executable, *OWN[each]]) for each in (name, "import numpy")]
    seconds = take_turns(contenders, 5, skip=1)
    assert ratio(seconds[name], seconds["import numpy"]).value <= SLACK


def test_start_loads_none_of_the_large_packages():
    """Fails if any module on the way to the help imports one of them at its top."""
    code = "import sys, diptych, diptych.cli; diptych.cli.usage(); print({'torch', 'numpy', 'tyro', 'PIL'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
