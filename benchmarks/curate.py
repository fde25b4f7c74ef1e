"""Matching captions against half a million entries: ours, ahocorasick-rs and pyahocorasick caption by caption, and the substring loop.

Captions are those of the raw-captions bundle, or made ones where `DIPTYCH_DATA` is unset, repeated as needed; entries are their words and pairs of
words, filled up with random ones. All contenders must find the same matches, which is checked before anything is timed; they take turns on one
core, and ratios are taken within a turn. Then the same captions with one and with more processes, and the peak memory of streams of growing length,
each in a process of its own. Writes benchmarks/results/curate.json and curate.md. The two packages are installed by hand; what is missing is
left out.

    python benchmarks/curate.py [--entries 500000] [--captions 20000] [--turns 7] [--processes 2] [--stream 1000000 10000000]
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from diptych.bench.resident import resident
from diptych.bench.turns import ratio, take_turns, timed
from diptych.curate.match import BLANKS, SEPARATORS, Matcher, match_batches, pattern
from diptych.curate.metadata import count_ngrams
from diptych.data.bundles import bundle_file

RESULTS = Path(__file__).parent / "results"
BATCH = 1 << 16
Find = Callable[[list[str]], list[list[int]]]


@lru_cache(maxsize=1)
def captions() -> list[str]:
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


def make_entries(count: int) -> list[str]:
    """Return words and pairs of the captions, the most frequent first, and random pairs and triples that hardly ever match."""
    counts = count_ngrams(captions())
    found = [entry for entry, _ in (counts.words + counts.pairs).most_common(count * 2 // 5)]
    rng, words, known = np.random.default_rng(1), list(counts.words), set(found)
    while len(found) < count:
        entry = " ".join(words[i] for i in rng.integers(len(words), size=rng.integers(2, 4)))
        if entry not in known:
            known.add(entry)
            found.append(entry)
    return found


def space(text: str) -> str:
    """Return the spaced text by the fastest way in Python that we know of."""
    for separator in SEPARATORS:
        text = text.replace(separator, f" {separator} ")
    for blank in BLANKS:
        text = text.replace(blank, " ")
    return f" {text} "


def with_ahocorasick_rs(patterns: list[str]) -> Find:
    """Return a finder that asks ahocorasick-rs for every caption."""
    import ahocorasick_rs

    find = ahocorasick_rs.AhoCorasick(patterns).find_matches_as_indexes
    return lambda texts: [sorted({id_ for id_, _, _ in find(space(text), overlapping=True)}) for text in texts]


def with_pyahocorasick(patterns: list[str]) -> Find:
    """Return a finder that asks pyahocorasick for every caption."""
    import ahocorasick

    automaton = ahocorasick.Automaton()
    for id_, one in enumerate(patterns):
        automaton.add_word(one, id_)
    automaton.make_automaton()
    return lambda texts: [sorted({id_ for _, id_ in automaton.iter(space(text))}) for text in texts]


ANCHORS = {
    "ahocorasick-rs": ("ahocorasick_rs", with_ahocorasick_rs),
    "pyahocorasick": ("ahocorasick", with_pyahocorasick),
}


def loop(patterns: list[str], text: str) -> list[int]:
    """Return the matches of one caption as the reference finds them."""
    held = space(text)
    return [id_ for id_, one in enumerate(patterns) if one in held]


def measure_speed(entries: list[str], count: int, turns: int) -> list[dict[str, object]]:
    """Return captions per second of one core, and ours over each, after a comparison of what they find."""
    patterns, texts = [pattern(entry) for entry in entries], list(islice(stream_texts(), count))
    matcher, column = Matcher(entries), pa.array(texts)
    expected = matcher(column).to_pylist()
    finders = {name: make(patterns) for name, (module, make) in ANCHORS.items() if find_spec(module)}
    for name, find in finders.items():
        assert find(texts) == expected, f"{name} finds other matches"
    few = texts[:3]
    assert [loop(patterns, text) for text in few] == expected[:3], "the loop finds other matches"
    contenders = [timed("diptych", lambda: matcher(column))]
    contenders += [timed(name, lambda find=find: find(texts)) for name, find in finders.items()]
    contenders.append(timed("substring loop", lambda: [loop(patterns, text) for text in few]))
    seconds = take_turns(contenders, turns, skip=1)
    per_caption = {n: [s / (3 if n == "substring loop" else count) for s in own] for n, own in seconds.items()}
    return [
        {
            "contender": name,
            "captions_per_second": 1 / statistics.median(own),
            "ours_over": ratio(own, per_caption["diptych"]).value,
            "matches_per_caption": sum(map(len, expected)) / count,
        }
        for name, own in per_caption.items()
    ]


def stream_texts() -> Iterator[str]:
    """Yield captions without end; later rounds are told apart by a number, so that no two are equal."""
    round_ = 0
    while True:
        yield from (text if round_ == 0 else f"{text} {round_}" for text in captions())
        round_ += 1


def stream(count: int) -> Iterator[pa.RecordBatch]:
    """Yield captions in batches."""
    texts = stream_texts()
    for begin in range(0, count, BATCH):
        yield pa.RecordBatch.from_pydict({"text": list(islice(texts, min(BATCH, count - begin)))})


def measure_processes(matcher: Matcher, processes: int, turns: int) -> dict[str, object]:
    """Return how much faster several processes are, once all of them have begun."""
    batches = list(stream(48 * BATCH))

    def seconds(number: int) -> float:
        done = match_batches(matcher, batches, "text", processes=number)
        for _ in islice(done, 16):
            pass
        began = time.perf_counter()
        for _ in done:
            pass
        return time.perf_counter() - began

    pairs = [(seconds(1), seconds(processes)) for _ in range(turns)]
    return {"processes": processes, "faster": statistics.median(one / more for one, more in pairs)}


def memory(entries: int, count: int) -> float:
    """Return the megabytes that matching a stream takes beyond the matcher; only right in a fresh process."""
    matcher = Matcher(make_entries(entries))
    for _ in match_batches(matcher, stream(2 * BATCH), "text"):
        pass
    before = resident("VmRSS")
    for _ in match_batches(matcher, stream(count), "text"):
        pass
    return resident("VmHWM") - before


def memory_in_child(entries: int, count: int) -> float:
    """Return `memory`, measured in a process of its own."""
    command = [sys.executable, __file__, "--memory", str(entries), str(count)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure everything, or (`--memory`) one stream for the process that asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=500_000)
    parser.add_argument("--captions", type=int, default=20_000)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--stream", type=int, nargs="*", default=[1_000_000, 10_000_000])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--memory", type=int, nargs=2, metavar=("ENTRIES", "CAPTIONS"))
    given = parser.parse_args()
    if given.memory:
        print(memory(*given.memory))
        return
    entries = make_entries(given.entries)
    speed = measure_speed(entries, given.captions, given.turns)
    several = measure_processes(Matcher(entries), given.processes, max(1, given.turns // 2))
    peaks = [{"captions": count, "mb": memory_in_child(given.entries, count)} for count in given.stream]
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    packages = {"python": platform.python_version()} | {
        name: version(name)
        for name in ("numpy", "pyarrow", *(n for n, (module, _) in ANCHORS.items() if find_spec(module)))
    }
    source = "raw-captions" if os.environ.get("DIPTYCH_DATA") else "made"
    setting = {"source": source, "entries": given.entries, "captions": given.captions, "turns": given.turns}
    record = {
        "setting": setting,
        "machine": machine,
        "packages": packages,
        "speed": speed,
        "several": several,
        "memory": peaks,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "curate.json").write_text(json.dumps(record, indent=2) + "\n")
    lines = [
        f"{given.entries:,} entries, {given.captions:,} captions per step, {speed[0]['matches_per_caption']:.1f} matches per caption, one core; "
        f"medians of {given.turns} turns. Matches are identical.",
        "",
        "| | captions/s | ours over it |",
        "|---|---|---|",
        *(f"| {r['contender']} | {r['captions_per_second']:,.0f} | {r['ours_over']:,.1f} |" for r in speed),
        "",
        f"{several['processes']} processes are {several['faster']:.2f} times as fast as one.",
        *(f"A stream of {r['captions']:,} captions takes {r['mb']:.0f} MB beyond the entries." for r in peaks),
    ]
    (given.out / "curate.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
