"""Matching of entries as others do it, caption by caption. Standard library only, for use in the environments of anchors."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

SEPARATORS, BLANKS = ",.;:?!`", "\t\n\r"

Find = Callable[[str], Iterable[int]]
"""Gives the number of every pattern that stands in a spaced caption, once or more."""


def space(text: str) -> str:
    """Return a caption as patterns are looked for in it, by the fastest way in Python that we know of; see `diptych.curate.match`."""
    for separator in SEPARATORS:
        text = text.replace(separator, f" {separator} ")
    for blank in BLANKS:
        text = text.replace(blank, " ")
    return f" {text} "


def loop(patterns: Sequence[str]) -> Find:
    """Return the finder of the reference: is each pattern a substring?"""
    return lambda held: [number for number, one in enumerate(patterns) if one in held]


def step(folder: str, make: Callable[[list[str]], Find], whole: bool) -> Callable[[], Any]:
    """Return a step that finds the patterns of all captions in a folder.

    Args:
        folder: Holds patterns.json and captions.json.
        make: Makes the finder.
        whole: Return all matches; else only how many there are.
    """
    patterns, captions = (json.loads((Path(folder) / f"{name}.json").read_text()) for name in ("patterns", "captions"))
    find = make(patterns)

    def take() -> Any:
        found = [sorted(set(find(space(caption)))) for caption in captions]
        return found if whole else sum(map(len, found))

    return take
