import json
import random
from pathlib import Path

import pytest

from diptych.curate.prompts import STYLES, FewShot, cut_prompt, style
from diptych.errors import ConfigError, TextError

PAIRS = (("a small boat", "A little boat."), ("old clock", "A clock of stone."), ("blue bus", "A bus stop."))


@pytest.fixture
def official(data: Path) -> dict:
    folder = data.parent / "golden"
    if not folder.is_dir():
        pytest.skip("there are no official numbers beside DIPTYCH_DATA")
    return json.loads((folder / "laclip.json").read_text())


def characters(text: str) -> list[int]:
    """Return one id per character behind an id that begins the text, as the stand-in of the official tokenizer does."""
    return [0, *map(ord, text)]


def spell(ids: list[int]) -> str:
    return "".join(map(chr, ids[1:]))


@pytest.mark.data
def test_official_prompts_and_their_reading(official):
    cases = {name: case for name, case in official.items() if name.startswith("prompts_")}
    assert cases
    for name, case in cases.items():
        coco = case["mode"] == "coco"
        shots = FewShot(case["coco_groups"] if coco else case["pairs"], drawn=coco, official=True)
        rng = random.Random(case["seed"])
        prompts = [cut_prompt(shots.build(c, rng), case["max_seq_len"], characters, spell) for c in case["captions"]]
        if case["error"] is None:
            assert prompts == case["prompts"], name
            assert [shots.parse(prompt, case["completion"]) for prompt in prompts] == case["outputs"], name
        else:
            with pytest.raises(TextError):
                [shots.parse(prompt, case["completion"]) for prompt in prompts]


@pytest.mark.parametrize(
    "caption", ["a green tent", "rain => umbrella sale", "two\nlines", "=>", "tail =>", "a \t b"], ids=repr
)
@pytest.mark.parametrize(
    "answer", [" out\nnext", "out", "\n out\n", ' "out"', " out => next => more", " 'out' "], ids=repr
)
def test_any_caption_gets_its_answer_back(caption, answer):
    shots = FewShot(PAIRS)
    prompt = shots.build(caption, random.Random(0))
    assert prompt.count("=>") == 4 and prompt.endswith("=>") and len(prompt.splitlines()) == 9
    assert shots.parse(prompt, answer) == "out"


def test_a_model_that_repeats_the_question_is_understood():
    shots = FewShot(PAIRS)
    prompt = shots.build("a green tent", random.Random(0))
    assert shots.parse(prompt, "a green tent => A tent that is green.") == "A tent that is green."
    assert shots.parse(prompt, "") == ""


def test_the_clean_prompt_by_hand():
    prompt = FewShot(PAIRS[:1], shots=1).build("a dog", random.Random(0))
    assert prompt == "write image captions differently,\n\na small boat => A little boat.\n\na dog =>"


def test_official_reading_fails_where_the_official_code_does():
    shots = FewShot(PAIRS, official=True)
    with pytest.raises(TextError, match="official=False"):
        shots.parse("one line =>", " out")


def test_a_long_prompt_is_cut_ten_tokens_before_the_limit():
    prompt = "x" * 200
    assert cut_prompt(prompt, 206, characters, spell) == prompt
    assert cut_prompt(prompt, 205, characters, spell) == "x" * 194 + " =>"


def test_drawn_examples_are_two_different_captions():
    groups = [("a1", "a2", "a3"), ("b1", "b2")]
    for seed in range(20):
        prompt = FewShot(groups, drawn=True, shots=2).build("c", random.Random(seed))
        pairs = [line.split(" => ") for line in prompt.split("\n\n")[1:-1]]
        assert all(one != other and one[0] == other[0] for one, other in pairs)


@pytest.mark.parametrize("name", STYLES)
def test_our_examples_keep_what_their_captions_name(name):
    from diptych.curate.wording import fault

    for source, target in STYLES[name]:
        assert fault(source, target) is None, (source, target)
    assert len(style(name).examples) >= 6


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="shots must be 1 to that many"):
        FewShot(PAIRS, shots=4)
    with pytest.raises(ConfigError, match="needs two texts"):
        FewShot([("alone",), ("a", "b"), ("c", "d")])
    with pytest.raises(ConfigError, match="reworded"):
        style("rewordet")
