"""Entries in captions by ahocorasick-rs, caption by caption."""

import ahocorasick_rs

from diptych.bench.serve import serve
from diptych.bench.substrings import step


def automaton(patterns):
    find = ahocorasick_rs.AhoCorasick(patterns).find_matches_as_indexes
    return lambda held: [number for number, _, _ in find(held, overlapping=True)]


def make(folder: str, whole: bool):
    return step(folder, automaton, whole)


serve(make, ("ahocorasick_rs",))
