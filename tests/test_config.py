import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from diptych.config import fingerprint, from_json, override, read_json, to_json
from diptych.errors import ConfigError
from diptych.methods import clip, siglip
from diptych.models.build import DualConfig
from diptych.models.foreign import TimmConfig
from diptych.models.heads import ClassMixtureHeadConfig
from diptych.models.vision import VisionConfig
from diptych.training.optim import OptimizerConfig
from diptych.training.recipe import Recipe


@dataclass(frozen=True)
class Circle:
    radius: float = 1.0


@dataclass(frozen=True)
class Square:
    side: int
    name: str = "square"


@dataclass(frozen=True)
class Drawing:
    shape: Circle | Square = field(default_factory=Circle)
    others: tuple[Circle | Square, ...] = ()
    ink: Literal["red", "blue"] = "red"
    range: tuple[float, float] = (0.0, 1.0)
    copies: int | None = None
    folder: Path | None = None
    lined: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)


def through_text(record: Any) -> Any:
    return json.loads(json.dumps(to_json(record), allow_nan=False))


def test_every_kind_of_value_comes_back():
    drawing = Drawing(
        Square(2, "s"), (Circle(0.5), Square(1)), "blue", (0.25, 2.0), 3, Path("a/b"), True, {"x": [1, {"y": None}]}
    )
    assert from_json(Drawing, through_text(drawing)) == drawing
    assert from_json(Drawing, {}) == Drawing()
    assert through_text(drawing)["others"] == [
        {"kind": "Circle", "radius": 0.5},
        {"kind": "Square", "side": 1, "name": "square"},
    ]


@pytest.mark.parametrize("recipe", [clip.recipe, clip.mini, siglip.recipe, siglip.mini])
def test_a_recipe_comes_back(recipe):
    base = {"clip": clip, "siglip": siglip}[recipe().method].recipe()
    assert override(base, through_text(recipe())) == recipe()
    changed = replace(recipe(), seed=5, writers=("wandb",), optimizer=OptimizerConfig(ema_decay=None, clip_norm=None))
    assert override(base, through_text(changed)) == changed


def test_a_model_comes_back_whichever_towers_it_has():
    for config in (DualConfig(), DualConfig(vision=TimmConfig("resnet18"), image_head=ClassMixtureHeadConfig(7))):
        assert from_json(DualConfig, through_text(config)) == config


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"^Drawing has no key 'shap'. Did you mean 'shape'\? Known: copies, folder, "
    ):
        from_json(Drawing, {"shap": {}})
    with pytest.raises(ConfigError, match=r"^Recipe.optimizer has no key 'learning'"):
        override(clip.recipe(), {"optimizer": {"learning": 1}})
    with pytest.raises(ConfigError, match=r"^Recipe.model.architecture.vision has no key 'dept'. Did you mean 'depth'"):
        override(clip.recipe(), {"model": {"architecture": {"vision": {"dept": 2}}}})
    with pytest.raises(ConfigError, match=r"^Drawing.others\[1\] has no key 'radios'. Did you mean 'radius'"):
        from_json(Drawing, {"others": [{"kind": "Circle"}, {"kind": "Circle", "radios": 1}]})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"copies": "3"}, "Drawing.copies takes int, not '3'"),
        ({"copies": 3.5}, "Drawing.copies takes int, not 3.5"),
        ({"copies": True}, "Drawing.copies takes int, not True"),
        ({"lined": 1}, "Drawing.lined takes bool, not 1"),
        ({"ink": "bleu"}, "Drawing.ink is 'bleu'. Did you mean 'blue'? Known: blue, red."),
        ({"ink": ["red"]}, "Drawing.ink is ['red']"),
        ({"range": [1]}, "Drawing.range takes 2 values, not 1"),
        ({"range": 1}, "Drawing.range takes a list, not 1"),
        ({"range": "ab"}, "Drawing.range takes a list, not 'ab'"),
        ({"range": [0, "b"]}, "Drawing.range[1] takes float, not 'b'"),
        ({"range": [0, None]}, "Drawing.range[1] takes float, not None"),
        ({"range": [0, False]}, "Drawing.range[1] takes float, not False"),
        ({"folder": 3}, "Drawing.folder takes Path, not 3"),
        ({"notes": []}, "Drawing.notes takes Mapping, not []"),
        ({"shape": {"radius": 2}}, "Drawing.shape needs a `kind`; it has None. Known: Circle, Square."),
        ({"shape": {"kind": "Cirle"}}, "Drawing.shape needs a `kind`; it has 'Cirle'. Did you mean 'Circle'?"),
        ({"shape": {"kind": "Square"}}, "Drawing.shape needs side; it has kind."),
        ({"shape": 3}, "Drawing.shape takes a mapping of keys, not 3"),
        ([], "Drawing takes a mapping of keys, not []"),
        ({"kind": "Circle"}, "Drawing is a Drawing, not a Circle."),
    ],
)
def test_a_wrong_value_says_where_it_is_and_what_belongs_there(value, message):
    with pytest.raises(ConfigError) as error:
        from_json(Drawing, value)
    assert message in str(error.value)


def test_whole_numbers_become_floats():
    found = from_json(Drawing, {"range": [0, 2], "shape": {"kind": "Circle", "radius": 3}})
    assert [type(value) for value in (*found.range, found.shape.radius)] == [float] * 3


def test_override_reaches_deep_and_leaves_the_rest():
    base = clip.mini()
    found = override(base, {"optimizer": {"lr": 1, "betas": [0.5, 0.6]}, "data": {"workers": 2}, "epochs": 3})
    assert found == replace(
        base,
        epochs=3,
        data=replace(base.data, workers=2),
        optimizer=replace(base.optimizer, lr=1.0, betas=(0.5, 0.6)),
    )
    assert base == clip.mini()
    assert override(base, {}) == base
    assert override(clip.recipe(), {"objective": {"multi_positive": False}}).objective == clip.Config(False)


def test_override_changes_one_kind_into_another():
    base = DualConfig(vision=VisionConfig(width=64))
    assert override(base, {"vision": {"depth": 2}}).vision == VisionConfig(width=64, depth=2)
    assert override(base, {"vision": {"kind": "VisionConfig", "depth": 2}}).vision == VisionConfig(width=64, depth=2)
    changed = override(base, {"vision": {"kind": "TimmConfig", "name": "resnet18"}})
    assert changed.vision == TimmConfig("resnet18")
    with pytest.raises(
        ConfigError, match=r"DualConfig.text_head needs a `kind`; it has 'ClassMixtureHeadConfig'.*LinearHeadConfig"
    ):
        override(base, {"text_head": {"kind": "ClassMixtureHeadConfig", "dim": 8}})


def test_override_checks_values_as_reading_does():
    for changes, message in (
        ({"epochs": "3"}, "Recipe.epochs takes int"),
        ({"optimizer": 3}, "Recipe.optimizer takes a mapping"),
        ({"optimizer": {"ema_decay": "no"}}, "Recipe.optimizer.ema_decay takes float"),
        ({"precision": "fp8"}, "Recipe.precision is 'fp8'"),
    ):
        with pytest.raises(ConfigError, match=message):
            override(clip.recipe(), changes)
    assert override(clip.recipe(), {"optimizer": {"ema_decay": None}}).optimizer.ema_decay is None


def test_a_generic_record_is_read_with_the_class_that_it_is_of():
    recipe = replace(clip.recipe(), objective=clip.Config(multi_positive=False), epochs=3)
    written = json.loads(json.dumps(to_json(recipe)))
    assert from_json(Recipe, written, of=(clip.Config,)) == recipe
    with pytest.raises(ConfigError, match=r"^Recipe.objective may be of any class. .*of=\(Config,\)"):
        from_json(Recipe, written)
    written["objective"]["multi_positives"] = True
    with pytest.raises(ConfigError, match=r"^Recipe.objective has no key 'multi_positives'. Did you mean"):
        from_json(Recipe, written, of=(clip.Config,))
    with pytest.raises(ConfigError, match=r"^Recipe.objective takes a mapping of keys, not 3"):
        override(recipe, {"objective": 3})


def test_a_fingerprint_follows_every_value_and_kind():
    records = [
        Drawing(),
        Drawing(ink="blue"),
        Drawing(shape=Circle(1.5)),
        Drawing(shape=Square(1)),
        Drawing(others=(Circle(),)),
        Drawing(notes={"a": 1}),
        Drawing(notes={"a": "1"}),
    ]
    found = [fingerprint(record) for record in records]
    assert len(set(found)) == len(records) and all(len(digits) == 16 for digits in found)
    assert fingerprint(Drawing(notes={"a": 1, "b": 2})) == fingerprint(Drawing(notes={"b": 2, "a": 1}))


@pytest.mark.parametrize("content", [None, b"{", b"\xff"])
def test_a_file_that_is_no_json_says_what_to_do(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.json cannot be read as JSON: .*\. Make it again\.$"):
        read_json(tmp_path / "a.json", "Make it again.")
    (tmp_path / "a.json").write_text('{"name": "喵"}', encoding="utf-8")
    assert read_json(tmp_path / "a.json", "") == {"name": "喵"}
