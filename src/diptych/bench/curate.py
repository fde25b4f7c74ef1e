"""Matching captions against half a million entries: ours, automata that are asked caption by caption, and the loop over substrings."""

import gzip
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from diptych.bench.process import Anchors, fresh
from diptych.bench.record import Bar, Column, Finding, Table
from diptych.bench.resident import forget_peak, resident
from diptych.bench.substrings import loop, space
from diptych.bench.turns import Contender, median, ratio, take_turns, timed
from diptych.curate.match import Matcher, match_batches, pattern
from diptych.curate.metadata import count_ngrams
from diptych.data.bundles import bundle_file
from diptych.errors import DiptychError

OWN, LOOP = "diptych", "loop over substrings"
ANCHORS = ("pyahocorasick", "ahocorasick-rs")
LOOPED = 3
"""Captions of a step of the loop, which takes half a million comparisons for each."""
DISTINCT = 16
"""Batches of the stream of several processes, which comes round."""


@dataclass(frozen=True)
class Setting:
    """Sizes.

    Attributes:
        entries: Of the word list.
        captions: Per step.
        turns: Steps per contender.
        rows: Per batch of a stream.
        batches: That one and several processes match; many, so that how full their queues are when the clock starts and stops does not show.
        processes: Several.
        streams: Captions of the streams whose memory is measured, each in a process of its own.
    """

    entries: int = 500_000
    captions: int = 20_000
    turns: int = 7
    rows: int = 1 << 16
    batches: int = 128
    processes: int = 2
    streams: tuple[int, ...] = (1_000_000, 10_000_000)


QUICK = Setting(entries=2000, captions=100, turns=1, rows=200, batches=4, streams=(1000, 4000))


def measure(setting: Setting, anchors: Anchors) -> Finding:
    """Return captions per second of one core, the speed of several processes, and peak memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_entries(folder, setting.entries)
        speeds = measure_speed(folder, setting, anchors)
        faster = measure_processes(folder, setting)
        peaks = [(count, fresh(stream_memory, name, setting.rows, count)) for count in setting.streams]
    over = {row["name"]: row["over"].value for row in speeds}
    return Finding(
        f"Every one of {setting.entries:,} entries (words, pairs and triples of words) in captions {origin()}. All contenders find the same "
        "matches; that is checked first.",
        setting,
        (
            Table(
                f"One core, {setting.turns} turns of {setting.captions:,} captions",
                (
                    Column("name", "search"),
                    Column("rate", "captions/s", ",.0f"),
                    Column("over", "ratio to ours", ",.1f"),
                    Column("matches", "matches per caption", ".1f"),
                ),
                tuple(speeds),
            ),
            Table(
                f"{setting.processes} processes instead of one, batches of {setting.rows:,} captions",
                (Column("name", "who"), Column("faster", "times as fast")),
                tuple(faster),
            ),
            Table(
                "Memory of a stream, each in a process of its own",
                (
                    Column("captions", "captions", ",.0f"),
                    Column("mb", "MB at the peak", ".0f"),
                    Column("held", "MB at the end", ".0f"),
                ),
                tuple({"captions": count, "mb": peak, "held": held} for count, (peak, held) in peaks),
            ),
        ),
        (
            Bar(f"{LOOP} / ours", 1000, True, over[LOOP]),
            *(Bar(f"{name} / ours", 1.2, True, over.get(name)) for name in ANCHORS),
            Bar(f"{setting.processes} processes / one, speed", 1.8, True, faster[0]["faster"].value),
            Bar("MB more for the longest stream than for the shortest", 20, False, peaks[-1][1][0] - peaks[0][1][0]),
        ),
        (
            f"The loop is timed on {LOOPED} captions per turn. Automata give Python lists of ids, sorted, each once; ours gives Arrow lists.",
            "Several processes: the clock starts when all of them are at work. Those that share nothing match batches of their own, which is "
            "what the machine can give; of ours one reads the stream, sends texts, receives matches, and matches too.",
            "Streams are the captions again and again with a number at their ends. Memory is beyond what was there after two batches, with the "
            "allocator of the system, since Arrow's own gives back late.",
        ),
    )


def measure_speed(folder: Path, setting: Setting, anchors: Anchors) -> list[dict[str, Any]]:
    """Return captions per second of one core and contender, after a comparison of what they find."""
    entries, patterns = read(folder, "entries"), read(folder, "patterns")
    texts = list(islice(endless(), setting.captions))
    (folder / "captions.json").write_text(json.dumps(texts))
    matcher, column, find = Matcher(entries), pa.array(texts), loop(patterns)
    expected = matcher(column).to_pylist()
    if [find(space(text)) for text in texts[:LOOPED]] != expected[:LOOPED]:
        raise DiptychError("The loop over substrings finds other matches.")
    contenders = [timed(OWN, lambda: matcher(column))]
    for name in ANCHORS:
        found = anchors.ask(name, name, f"curate-{name}", folder=str(folder), whole=True)
        if found not in (None, expected):
            raise DiptychError(f"{name} finds other matches.")
        contenders += anchors.start(name, name, f"curate-{name}", folder=str(folder), whole=False)
    contenders.append(Contender(LOOP, timed(LOOP, lambda: [find(space(text)) for text in texts[:LOOPED]]).step))
    each = {
        name: [seconds / (LOOPED if name == LOOP else len(texts)) for seconds in own]
        for name, own in take_turns(contenders, setting.turns, skip=1).items()
    }
    return [
        {
            "name": name,
            "rate": 1 / statistics.median(own),
            "over": ratio(own, each[OWN]),
            "matches": sum(map(len, expected)) / len(texts),
        }
        for name, own in each.items()
    ]


def measure_processes(folder: Path, setting: Setting) -> list[dict[str, Any]]:
    """Return how many times as fast several processes are: ours, and those that share nothing."""
    batches, number = list(stream(setting.rows, setting.rows * min(DISTINCT, setting.batches))), setting.processes
    matcher, shares = Matcher(read(folder, "entries")), [setting.batches // number or 1] * number
    ours, bound = list[float](), list[float]()
    with ProcessPoolExecutor(number, get_context("spawn"), _begin, (str(folder), setting.rows)) as pool:
        list(pool.map(_match_own, [1] * number))
        for _ in range(max(1, setting.turns // 2)):
            one, several = (stream_seconds(matcher, batches, setting.batches, count) for count in (1, number))
            ours.append(one / several)
            (alone,) = pool.map(_match_own, shares[:1])
            bound.append(number * alone / max(pool.map(_match_own, shares)))
    return [
        {"name": "diptych", "faster": median(ours)},
        {"name": "processes that share nothing", "faster": median(bound)},
    ]


class Counted:
    """A matcher that knows how often it was asked in this process; copies in others count for themselves."""

    def __init__(self, matcher: Matcher) -> None:
        self.matcher, self.calls = matcher, 0

    def __call__(self, texts: pa.Array) -> pa.ListArray:
        """Return what the matcher gives."""
        self.calls += 1
        return self.matcher(texts)


def stream_seconds(matcher: Matcher, batches: list[pa.RecordBatch], count: int, processes: int) -> float:
    """Return the time that `count` batches take, those given again and again, once others have matched two for each of them."""
    here = Counted(matcher)
    done = match_batches(here, cycle(batches), "text", processes=processes)
    for number, _ in enumerate(done, 1):
        if number - here.calls >= 2 * (processes - 1):
            break
    began = time.perf_counter()
    for _ in islice(done, count):
        pass
    taken = time.perf_counter() - began
    done.close()
    return taken


_own: tuple[Matcher, list[pa.Array]]  # of a worker that shares nothing


def _begin(folder: str, rows: int) -> None:
    global _own
    _own = Matcher(read(Path(folder), "entries")), [batch["text"] for batch in stream(rows, 4 * rows)]


def _match_own(count: int) -> float:
    matcher, texts = _own
    began = time.perf_counter()
    for number in range(count):
        matcher(texts[number % len(texts)])
    return time.perf_counter() - began


def stream_memory(folder: str, rows: int, count: int) -> tuple[float, float]:
    """Return the megabytes that matching a stream takes beyond the entries, at its peak and at its end; only right in a fresh process."""
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own keeps what is freed for a while
    matcher = Matcher(read(Path(folder), "entries"))
    for _ in match_batches(matcher, stream(rows, 2 * rows), "text"):
        pass
    forget_peak()
    before = resident("VmRSS")
    for _ in match_batches(matcher, stream(rows, count), "text"):
        pass
    return resident("VmHWM") - before, resident("VmRSS") - before


def write_entries(folder: Path, count: int) -> None:
    """Write entries.json and patterns.json, what a spaced caption must hold for each entry to be in it."""
    entries = make_entries(count)
    (folder / "entries.json").write_text(json.dumps(entries))
    (folder / "patterns.json").write_text(json.dumps([pattern(entry) for entry in entries]))


def read(folder: Path, name: str) -> list[str]:
    """Return a list that `write_entries` wrote."""
    found: list[str] = json.loads((folder / f"{name}.json").read_text())
    return found


def make_entries(count: int) -> list[str]:
    """Return words and pairs of the captions, the most frequent first, and random pairs and triples that hardly ever match."""
    counts = count_ngrams(raw_captions())
    found = [entry for entry, _ in (counts.words + counts.pairs).most_common(count * 2 // 5)]
    rng, words, known = np.random.default_rng(1), list(counts.words), set(found)
    while len(found) < count:
        entry = " ".join(words[i] for i in rng.integers(len(words), size=rng.integers(2, 4)))
        if entry not in known:
            known.add(entry)
            found.append(entry)
    return found


def origin() -> str:
    """Return where the captions come from, for a sentence."""
    return (
        "of the bundle raw-captions"
        if os.environ.get("DIPTYCH_DATA")
        else "that are made, since `DIPTYCH_DATA` is unset"
    )


@lru_cache(maxsize=1)
def raw_captions() -> list[str]:
    """Return the captions of the bundle in a fixed random order; made ones where there is no bundle."""
    rng, found = np.random.default_rng(0), list[str]()
    if not os.environ.get("DIPTYCH_DATA"):
        lengths = rng.integers(5, 16, 50_000)
        return [" ".join(f"word{i}" for i in rng.zipf(1.3, length).clip(max=50_000)) for length in lengths]
    for name in ("cc3m_validation.txt", "web_alt_text.txt"):
        found += bundle_file("raw-captions", name).read_text(encoding="utf-8").splitlines()
    with gzip.open(bundle_file("raw-captions", "multi30k_train.jsonl.gz"), "rt", encoding="utf-8") as lines:
        found += [caption for line in lines for caption in json.loads(line)["en"]]
    return [found[i] for i in rng.permutation(len(found))]


def endless() -> Iterator[str]:
    """Yield captions without end; later rounds are told apart by a number, so that no two are equal."""
    round_ = 0
    while True:
        yield from (text if round_ == 0 else f"{text} {round_}" for text in raw_captions())
        round_ += 1


def stream(rows: int, count: int) -> Iterator[pa.RecordBatch]:
    """Yield captions in batches."""
    texts = endless()
    for begin in range(0, count, rows):
        yield pa.RecordBatch.from_pydict({"text": list(islice(texts, min(rows, count - begin)))})
