import random
from collections.abc import Sequence

import pytest

from diptych.curate.language_model import AbstractLanguageModel
from diptych.curate.prompts import FewShot
from diptych.curate.wording import nouns
from diptych.curate.writers import FRAMES, PromptedWriter, RuleWriter, reordered
from diptych.data.scenes import SceneConfig, scenes
from diptych.errors import ConfigError, TextError


class Echo(AbstractLanguageModel):
    """Answers with the question, in upper case."""

    def __init__(self, short: int = 0) -> None:
        self.short, self.seen = short, []

    def complete(self, prompts: Sequence[str], *, seed: int) -> list[str]:
        self.seen.append((tuple(prompts), seed))
        return [f" {p.rpartition(chr(10))[2].removesuffix('=>').strip().upper()}\nmore" for p in prompts[self.short :]]


PROMPTS = {
    "a": FewShot([("one", "two"), ("three", "four")], shots=1),
    "b": FewShot([("x", "y")], shots=1, official=True),
}


def test_a_language_model_is_shown_examples_and_read():
    model = Echo()
    writer = PromptedWriter(model, PROMPTS)
    assert writer.styles == ("a", "b")
    assert writer.write(["a dog", "a cat"], "a", seed=3) == ["A DOG", "A CAT"]
    assert writer.write(["a dog", "a cat"], "a", seed=3) and model.seen[0] == model.seen[1]
    assert writer.write(["a dog"], "b", seed=3) == [""]  # one example is too few for the official line count


def test_a_model_that_loses_prompts_is_seen():
    with pytest.raises(TextError, match="asked for 2 texts and gave 1"):
        PromptedWriter(Echo(short=1), PROMPTS).write(["a dog", "a cat"], "a", seed=0)


def test_unknown_styles_are_refused():
    with pytest.raises(ConfigError, match=r"no style 'frame'.*framed"):
        RuleWriter().check(["framed", "frame"])


def test_the_name_follows_what_is_written():
    assert RuleWriter().name == RuleWriter(FRAMES).name != RuleWriter(("so {}",)).name
    assert PromptedWriter(Echo(), PROMPTS).name != PromptedWriter(Echo(), {"a": PROMPTS["a"]}).name


@pytest.mark.parametrize(
    ("caption", "allowed"),
    [
        ("a cat", {"a cat"}),
        ("a cat left of a dog", {"a cat left of a dog", "a dog right of a cat"}),
        ("two cats and a bus", {"two cats and a bus", "a bus and two cats"}),
    ],
)
def test_orders_of_a_list(caption, allowed):
    found = {reordered(caption, random.Random(seed)) for seed in range(40)}
    assert found == allowed or found == allowed - {caption}


def test_what_is_named_stays(capsys):
    captions = [text[0].text for text in map(scenes(count=60, config=SceneConfig(size=16)).texts, range(60))]
    for style in RuleWriter.styles:
        for caption, text in zip(captions, RuleWriter().write(captions, style, seed=1), strict=True):
            assert set(nouns(caption)) <= {*nouns(text)} | {word for word in text.replace(",", "").split()} | {
                word.removesuffix("s") for word in text.replace(",", "").split()
            }
            assert text.count(" left of ") + text.count(" right of ") == caption.count(" left of ") + caption.count(
                " right of "
            )
    assert RuleWriter().write(captions, "both", seed=1) == RuleWriter().write(captions, "both", seed=1)
    assert RuleWriter().write(captions, "both", seed=1) != RuleWriter().write(captions, "both", seed=2)
