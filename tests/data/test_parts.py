from dataclasses import replace

import pytest

from diptych.data.parts import Prompted, by_class, by_domain, one_against_others, one_domain, prompt, slices
from diptych.data.sources import Listed
from diptych.errors import ConfigError, DataError


@pytest.fixture
def labelled(drawings) -> Listed:
    samples = [
        replace(s, label=s.texts[0].text.split()[1], domain=("day", "night")[row % 2])
        for row, s in enumerate(drawings(12))
    ]
    return Listed(samples, "drawings")


def test_prompts_take_the_place_of_texts(labelled):
    prompted = Prompted(labelled, "a drawing of a {}.")
    assert [text.text for text in prompted.texts(0)] == [f"a drawing of a {labelled[0].label}."]
    assert prompted[0].texts == prompted.without_image(0).texts == prompted.texts(0)
    assert prompted[0].texts[0].role == "label" and prompted[0].image == labelled[0].image
    assert len(prompted) == len(labelled) and prompted.fingerprint != labelled.fingerprint
    assert prompt("polar_bear") == "a photo of a polar bear."


def test_a_sample_without_a_label_has_no_prompt(drawings):
    with pytest.raises(DataError, match=r"'s0' of drawings has no label.*columns\.label"):
        Prompted(drawings(3)).texts(0)


def test_classes_make_tasks(labelled):
    colours = sorted({sample.label for sample in labelled})
    first, second = by_class(labelled, [colours[:2], colours[2:5]])
    assert {sample.label for sample in first} == set(colours[:2])
    assert {sample.label for sample in second} == set(colours[2:5])
    assert len(first) + len(second) == sum(sample.label in colours[:5] for sample in labelled)


@pytest.mark.parametrize(("groups", "words"), [([["red"], ["red"]], "not: red"), ([["pink"]], "not: pink")], ids=str)
def test_classes_that_are_not_there_or_there_twice_are_refused(labelled, groups, words):
    with pytest.raises(ConfigError, match=words):
        by_class(labelled, groups)


def test_domains_make_tasks(labelled, drawings):
    parts = by_domain(labelled)
    assert list(parts) == ["day", "night"] and [len(part) for part in parts.values()] == [6, 6]
    assert {sample.domain for sample in parts["night"]} == {"night"}
    with pytest.raises(DataError, match=r"no domains.*columns\.domain"):
        by_domain(drawings(3))


@pytest.mark.parametrize("count", [1, 5, 12])
def test_slices_are_the_whole_in_order(drawings, count):
    source = drawings(12)
    parts = slices(source, count)
    assert [sample.key for part in parts for sample in part] == [sample.key for sample in source]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ConfigError, match="1 to 12 slices, not 13"):
        slices(source, 13)


def test_one_domain_against_others(drawings):
    samples = [replace(s, domain=("a", "b", "c")[row % 3]) for row, s in enumerate(drawings(9))]
    source = Listed(samples, "drawings")
    one, others = one_against_others(source, "b")
    assert [s.key for s in one] == ["s1", "s4", "s7"] and {s.domain for s in others} == {"a", "c"} and len(others) == 6
    assert {s.domain for s in one_against_others(source, "b", ("c",))[1]} == {"c"}
    assert [s.key for s in one_domain(source, "c")] == ["s2", "s5", "s8"]
    with pytest.raises(ConfigError, match=r"drawings has no domain 'd'.*Known: a, b, c"):
        one_domain(source, "d")


@pytest.mark.parametrize(("one", "others"), [("x", ()), ("a", ("a",)), ("a", ("b", "x"))])
def test_a_domain_is_there_and_on_one_side(drawings, one, others):
    samples = [replace(s, domain=("a", "b")[row % 2]) for row, s in enumerate(drawings(4))]
    with pytest.raises(ConfigError, match="drawings has the domains a, b"):
        one_against_others(Listed(samples, "drawings"), one, others)


def test_a_domain_alone_has_no_others(drawings):
    source = Listed([replace(s, domain="a") for s in drawings(3)], "drawings")
    with pytest.raises(ConfigError, match="a against nothing"):
        one_against_others(source, "a")
