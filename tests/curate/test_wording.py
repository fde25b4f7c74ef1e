import pytest

from diptych.curate.wording import QualityConfig, fault, nouns, singular
from diptych.errors import ConfigError


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man in red shorts swinging on a rope over a lake .", "man short rope lake"),
        ("A black dog runs through the water with a ball in its mouth .", "dog water ball mouth"),
        ("two red cats left of an upside-down bus and a large dog", "cat bus dog"),
        ("The boys jump over the surf", "boy surf"),
        ("Three children play", "child"),
        ("a boy catches and throws a ball", "boy ball"),
        ("a girl in a marching band", "girl band"),
        ("Crowd of people near the water .", "crowd person water"),
        ("", ""),
    ],
)
def test_nouns_of_captions(caption, expected):
    assert " ".join(nouns(caption)) == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("dogs", "dog"),
        ("cherries", "cherry"),
        ("buses", "buse"),
        ("boxes", "box"),
        ("grass", "grass"),
        ("women", "woman"),
        ("bus", "bus"),
    ],
)
def test_plurals(word, expected):
    assert singular(word) == expected


CAPTION = "A brown dog jumps over a log in the forest ."


@pytest.mark.parametrize(
    ("rewrite", "wrong"),
    [
        ("In the forest, a dog leaps over a log.", None),
        ("A dog jumps over a log.", None),  # two of three nouns
        ("", "empty"),
        ("...", "empty"),
        ("dog", "too short (1 words)"),
        ("A dog and a log and a forest " * 4, "too long (32 words)"),
        ("a brown dog jumps over a log in the forest", "copy of the caption"),
        ("A dog in a forest, over a log!", "duplicate"),
        ("I'm sorry, but I cannot see the dog, the log or the forest.", "refusal"),
        ("As an AI language model, I see a dog, a log, a forest.", "refusal"),
        ("a dog on a log => a dog in the forest", "part of a prompt"),
        ("A cat sits on a log.", "lost dog, forest"),
        ("A dog with a hat, a log and a fox in the forest.", "new hat, fox"),
    ],
)
def test_faults(rewrite, wrong):
    assert fault(CAPTION, rewrite, others=("a dog in a forest over a log",)) == wrong


def test_limits_are_settings():
    assert fault(CAPTION, "A cat sits on a log.", config=QualityConfig(min_nouns=0.3)) is None
    assert fault(CAPTION, "A dog jumps over a log.", config=QualityConfig(min_nouns=1.0)) == "lost forest"
    assert (
        fault(CAPTION, "A dog with a hat, a log and a fox in the forest.", config=QualityConfig(max_new_nouns=2))
        is None
    )
    assert fault("moon", "a full moon, alone") is None
    with pytest.raises(ConfigError, match="min_nouns"):
        QualityConfig(min_nouns=2)
    with pytest.raises(ConfigError, match="min_words"):
        QualityConfig(min_words=9, max_words=3)
