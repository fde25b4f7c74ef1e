from pathlib import Path

import pytest

from diptych.errors import ConfigError, PlannedMethodError
from diptych.methods import METHODS, load_method

PAPERS = Path(__file__).parents[1] / "PAPERS.md"
BASE = {"clip", "siglip"}


def test_twenty_nine_papers_and_two_base_objectives():
    assert len(set(METHODS) - BASE) == 29
    assert BASE <= set(METHODS)


@pytest.mark.parametrize("slug", METHODS)
def test_state_is_true(slug):
    if METHODS[slug].state == "planned":
        with pytest.raises(PlannedMethodError, match="planned"):
            load_method(slug)
    else:
        module = load_method(slug)
        assert module.__doc__ and METHODS[slug].arxiv in module.__doc__
        assert {"Config", "Objective", "recipe", "mini"} <= set(dir(module))


def test_unknown_method_names_the_nearest():
    with pytest.raises(ConfigError, match="siglip"):
        load_method("siglib")


@pytest.mark.parametrize("slug", METHODS)
def test_papers_page_agrees_with_the_table(slug):
    method = METHODS[slug]
    row = next(line for line in PAPERS.read_text().splitlines() if f"`{slug}`" in line)
    for value in (method.title, method.paper, method.arxiv, method.verb, method.state):
        assert value in row
