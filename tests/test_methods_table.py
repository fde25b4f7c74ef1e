import re
from pathlib import Path

import pytest

from diptych.errors import ConfigError, PlannedMethodError
from diptych.methods import METHODS, load_method

PAPERS = Path(__file__).parents[1] / "PAPERS.md"
BASE = {"clip", "siglip"}
PAPER_SLUGS = set(
    """
    alip anovl brain_encoding c_pgc clippings cloc conceptclip cosmo diva fdt gama genhancer grounded_semantics improved_baselines
    ip_clip laclip machine_vision_therapy metaclip mod_x nevlp regionspot rs_m_clip s_vco scene_graph_3d sevlm trident vlm2vec vr_lwf
    zscl
    """.split()
)


def test_twenty_nine_papers_and_two_base_objectives():
    assert len(PAPER_SLUGS) == 29
    assert set(METHODS) == PAPER_SLUGS | BASE
    assert len({method.arxiv for method in METHODS.values()}) == 31


@pytest.mark.parametrize("slug", METHODS)
def test_state_is_true(slug):
    method = METHODS[slug]
    if method.state == "planned":
        with pytest.raises(
            PlannedMethodError, match=f"{slug}.*{re.escape(method.paper)}.*is planned.*What works as {method.verb}"
        ):
            load_method(slug)
    else:
        module = load_method(slug)
        assert module.__doc__ and method.arxiv in module.__doc__
        own = {"Objective", "recipe"} if method.verb == "objective" else {method.verb.capitalize()}
        assert {"Config", "mini"} | own <= set(dir(module))


def test_unknown_method_names_the_nearest():
    with pytest.raises(ConfigError, match="siglip"):
        load_method("siglib")


def test_a_method_of_another_verb_is_no_objective():
    assert load_method("metaclip", verb="curator") is load_method("metaclip")
    with pytest.raises(ConfigError, match=r"metaclip .* verb curator, .* verb objective.*: clip, siglip"):
        load_method("metaclip", verb="objective")


def test_papers_page_agrees_with_the_table():
    rows = [line.strip("| ").split(" | ") for line in PAPERS.read_text().splitlines() if line.startswith("| `")]
    assert rows == [
        [f"`{m.slug}`", m.title, m.paper, f"[{m.arxiv}](https://arxiv.org/abs/{m.arxiv})", m.verb, m.state]
        for m in METHODS.values()
    ]
