"""Entries in captions by pyahocorasick, caption by caption."""

import ahocorasick

from diptych.bench.serve import serve
from diptych.bench.substrings import step


def automaton(patterns):
    found = ahocorasick.Automaton()
    for number, pattern in enumerate(patterns):
        found.add_word(pattern, number)
    found.make_automaton()
    return lambda held: [number for _, number in found.iter(held)]


def make(folder: str, whole: bool):
    return step(folder, automaton, whole)


serve(make, ("pyahocorasick",))
