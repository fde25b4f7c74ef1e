"""Which entries of a word list stand in which texts: all of them, exactly, for any number of entries, batch by batch.

A text is spaced: one space before it and one behind it, spaces around each of , . ; : ? ! ` and one in place of a tab or a line end. An entry
is in a text if the spaced text holds it between two spaces. So `T-shirt` is an entry of its own, `cat` is not in `concatenate`, case counts,
and two spaces are not one. Scripts written without spaces: see `pattern`.

How: the spaced texts of some hundred kilobytes are one array of bytes, cut into units: words, or characters for patterns that need not begin and
end at a space. A polynomial hash gives every run of units in constant time. Runs that start at each unit grow by one unit at a
time, all of them at once, for as long as the hash is that of the beginning of some pattern. What ends as a pattern is compared byte by byte,
so a hash never decides. This is what an automaton such as Aho-Corasick's finds, in whole-array steps instead of one state after another.
"""

import pickle
import string
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64, UInt8, UInt64

from diptych.errors import ColumnError, ConfigError, DataError

SEPARATORS, BLANKS = ",.;:?!`", "\t\n\r"
_CHUNK = 1 << 18  # bytes of text per pass; the arrays of one pass then stay in a processor's cache
_AT_ONCE = 1 << 12  # patterns whose hashes are made in one pass
_SPACE = ord(" ")
_IS_SEPARATOR = np.isin(np.arange(256), [*SEPARATORS.encode()])
_MAPPED = np.arange(256, dtype=np.uint8)
_MAPPED[[*BLANKS.encode()]] = _SPACE
_BASES = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93)  # odd, so that they have inverses modulo 2**64
_MIX = np.uint64(0xFF51AFD7ED558CCD)

_NO_SPACES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x2FDF),  # radicals
    (0x2FF0, 0x2FFF),
    (0x3400, 0x4DBF),  # ideographs, here and below
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2EBEF),
)
_MARKS = frozenset(string.punctuation + "，。、；：？！“”‘’（）【】《》〈〉「」『』～—")


def spaced(text: str) -> str:
    """Return a text as matching sees it."""
    for separator in SEPARATORS:
        text = text.replace(separator, f" {separator} ")
    return f" {text.translate(dict.fromkeys(map(ord, BLANKS), ' '))} "


def pattern(entry: str, *, unspaced: bool = False) -> str:
    """Return what a spaced text must hold for an entry to be in it: the entry between two spaces.

    Args:
        entry: Not empty.
        unspaced: For scripts written without spaces. No space is asked for on a side where the entry ends in an ideograph, in Thai, Lao,
            Burmese, Khmer or Tibetan, or in a punctuation mark, so `-shirt` is in `t-shirt`. Kana and Hangul keep theirs.

    Source: official code of MetaCLIP 2 (Chuang et al. 2025).
    """
    before, behind = (not (unspaced and _needs_no_space(side)) for side in (entry[0], entry[-1]))
    return f"{' ' * before}{entry}{' ' * behind}"


def _needs_no_space(character: str) -> bool:
    return character in _MARKS or any(first <= ord(character) <= last for first, last in _NO_SPACES)


class Matcher:
    """Finds all entries of a list in texts. A copy works in any process.

    Attributes:
        size: How many entries there are.
    """

    def __init__(self, entries: Sequence[str], *, unspaced: bool = False) -> None:
        """Make the matcher; half a million entries take about a second.

        Args:
            entries: An entry's id is its place here.
            unspaced: See `pattern`.

        Raises:
            ConfigError: If there is no entry, one is empty, or one is there twice.
        """
        if not entries or "" in entries:
            raise ConfigError("Matching needs at least one entry, and none may be empty; remove empty lines.")
        if len(set(entries)) < len(entries):
            ((twice, _),) = Counter(entries).most_common(1)
            raise ConfigError(f"The entry {twice!r} is there twice, so its matches would have two ids. Remove one.")
        self.size = len(entries)
        patterns = [pattern(entry, unspaced=unspaced) for entry in entries]
        words = [one.startswith(" ") and one.endswith(" ") and len(one) > 2 for one in patterns]
        self._words = _Index([(id_, one) for id_, one in enumerate(patterns) if words[id_]], words=True)
        self._others = _Index([(id_, one) for id_, one in enumerate(patterns) if not words[id_]], words=False)

    def __call__(self, texts: pa.Array) -> pa.ListArray:
        """Return the ids of the entries in each text, ascending and each once; none for a null.

        Args:
            texts: Strings; bytes that are not UTF-8 are matched as bytes.

        Raises:
            DataError: If these are no strings, or match too often for one array.
        """
        data, offsets = text_bytes(texts)
        counts, ids, start = [], [], 0
        while start < len(texts):
            fit = int(np.searchsorted(offsets, offsets[start] + _CHUNK, side="right")) - 1
            stop = max(start + 1, min(fit, start + _CHUNK // 8, len(texts)))
            rows, found = self._find(data, offsets[start : stop + 1])
            counts.append(np.bincount(rows, minlength=stop - start))
            ids.append(found)
            start = stop
        ends = np.concatenate([[0], *counts]).cumsum()
        if ends[-1] >= 2**31:
            raise DataError(
                f"{len(texts):,} texts have {ends[-1]:,} matches, more than one array holds. Match fewer at once."
            )
        values = np.concatenate([np.empty(0, np.int64), *ids]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values))

    def _find(
        self, data: UInt8[np.ndarray, " _all"], offsets: Int64[np.ndarray, " n_plus_1"]
    ) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]:
        """Return (row, id) of every match in some texts, in order, each once."""
        text, starts = space_out(data, offsets)
        found = [part for index in (self._words, self._others) for part in index.find(text, starts)]
        rows, ids = (np.concatenate(parts) for parts in zip(*found, strict=True))
        pairs = np.sort(rows * self.size + ids)
        pairs = pairs[np.diff(pairs, prepend=-1) > 0]
        return pairs // self.size, pairs % self.size


def text_bytes(texts: pa.Array) -> tuple[UInt8[np.ndarray, " b"], Int64[np.ndarray, " n_plus_1"]]:
    """Return the bytes of strings, and where in them each begins and the last ends; a null has none.

    Raises:
        DataError: If these are no strings.
    """
    if pa.types.is_string_view(texts.type) or pa.types.is_dictionary(texts.type):
        texts = texts.cast(pa.large_string())
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        raise DataError(f"Matching needs strings; these are {texts.type}. Name a column of texts, one text per row.")
    texts = texts.fill_null("") if texts.null_count else texts
    _, places, data = texts.buffers()
    width = np.int32 if pa.types.is_string(texts.type) else np.int64
    if not len(texts):
        return np.empty(0, np.uint8), np.zeros(1, np.int64)
    offsets = np.frombuffer(places, width, len(texts) + 1, texts.offset * np.dtype(width).itemsize)
    return np.frombuffer(data or b"", np.uint8), offsets.astype(np.int64)


def space_out(
    data: UInt8[np.ndarray, " _all"], offsets: Int64[np.ndarray, " n_plus_1"]
) -> tuple[UInt8[np.ndarray, " b"], Int64[np.ndarray, " n_plus_1"]]:
    """Return the bytes of spaced texts, one text behind the other, and where each begins and the last ends; equal to `spaced`.

    Args:
        data: Bytes that hold the texts.
        offsets: Where each begins and the last ends.
    """
    inside, starts = data[offsets[0] : offsets[-1]], offsets - offsets[0]
    marks = np.flatnonzero(_IS_SEPARATOR[inside])
    before, row = np.searchsorted(marks, starts), np.searchsorted(starts, marks, side="right") - 1
    begin = starts + 2 * before + 2 * np.arange(len(starts))
    mark = marks + 2 * (np.arange(len(marks)) + row + 1)  # where the separators come to stand
    kept = np.ones(begin[-1], np.bool_)
    for places in (begin[:-1], begin[1:] - 1, mark - 1, mark + 1):
        kept[places] = False
    text = np.full(begin[-1], _SPACE, np.uint8)
    text[kept] = _MAPPED[inside]
    return text, begin


@dataclass(frozen=True)
class _Units:
    """Texts cut into what a match is made of.

    Attributes:
        text: Bytes.
        begin: Where each unit begins.
        end: Where it ends, exclusive.
        last: Number of the last unit of the same text.
        row: Number of the text.
        real: Numbers of the units inside a text; others lie between two.
    """

    text: UInt8[np.ndarray, " b"]
    begin: Int64[np.ndarray, " u"]
    end: Int64[np.ndarray, " u"]
    last: Int64[np.ndarray, " u"]
    row: Int64[np.ndarray, " u"]
    real: Int64[np.ndarray, " r"]


def _words_of(text: UInt8[np.ndarray, " b"], starts: Int64[np.ndarray, " n_plus_1"]) -> _Units:
    """Return what lies between two spaces of one text, empty words too."""
    spaces = np.flatnonzero(text == _SPACE)
    first = np.searchsorted(spaces, starts)
    units = np.diff(first)
    between = first[1:] - 1  # from the last space of a text to the first of the next
    real = np.ones(len(spaces), np.bool_)
    real[between[units > 0]] = False  # windows of a long text may have no space at all
    end = np.append(spaces, len(text))[1:]
    row = np.repeat(np.arange(len(units)), units)
    return _Units(text, spaces + 1, end, np.repeat(between - 1, units), row, np.flatnonzero(real))


def _characters_of(text: UInt8[np.ndarray, " b"], starts: Int64[np.ndarray, " n_plus_1"]) -> _Units:
    """Return single characters, the spaces too."""
    begin = np.flatnonzero((text & 0xC0) != 0x80)  # the first byte of each
    first = np.searchsorted(begin, starts)
    units = np.diff(first)
    row, end = np.repeat(np.arange(len(units)), units), np.append(begin, len(text))[1:]
    return _Units(text, begin, end, np.repeat(first[1:] - 1, units), row, np.arange(len(begin)))


class _Index:
    """Patterns with all their beginnings, by hash."""

    def __init__(self, patterns: Sequence[tuple[int, str]], *, words: bool) -> None:
        self._cut = _words_of if words else _characters_of
        self._ids = np.array([id_ for id_, _ in patterns], np.int64)
        encoded = [one.encode("utf-8", "surrogatepass") for _, one in patterns]
        self._text = np.frombuffer(b"".join(encoded), np.uint8)
        lengths = np.array([len(one) for one in encoded], np.int64)
        starts = np.concatenate([[0], lengths.cumsum()])
        outer = int(words)  # words are compared without their outer spaces
        self._begin, self._length = starts[:-1] + outer, lengths - 2 * outer
        if not patterns:
            return
        for self._base in _BASES:
            parts = [self._beginnings(starts[i : i + _AT_ONCE + 1]) for i in range(0, len(patterns), _AT_ONCE)]
            hashes, whole = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            keys, node = np.unique(hashes, return_inverse=True)
            if len(np.unique(node[whole])) == len(patterns):
                break
        else:  # made to measure: long patterns of two letters in the order of Thue and Morse
            raise ConfigError("Two entries have equal hashes, three times over. Remove very long entries.")
        self._pattern, self._deeper = np.full(len(keys), -1, np.int32), np.zeros(len(keys), np.bool_)
        self._pattern[node[whole]] = np.arange(len(patterns))
        self._deeper[node[~whole]] = True
        bits = len(keys).bit_length() + 1
        self._shift, self._keys = np.uint64(64 - bits), np.append(keys, np.uint64(2**64 - 1))
        self._near = np.searchsorted(keys, np.arange(2**bits, dtype=np.uint64) << self._shift).astype(np.int32)

    def _beginnings(
        self, starts: Int64[np.ndarray, " n_plus_1"]
    ) -> tuple[UInt64[np.ndarray, " b"], Bool[np.ndarray, " b"]]:
        """Return the hash of every beginning of some patterns, and whether it is the pattern itself."""
        units = self._cut(self._text[starts[0] : starts[-1]], starts - starts[0])
        row = units.row[units.real]
        first = units.real[np.searchsorted(row, row)]
        return _Hashes(units, self._base)(first, units.real), units.real == units.last[units.real]

    def find(
        self, text: UInt8[np.ndarray, " b"], starts: Int64[np.ndarray, " n_plus_1"]
    ) -> Iterator[tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]]:
        """Yield (row, id) of every occurrence of a pattern, in no order.

        A single text of any length is searched in windows that overlap by more than the longest pattern, so some are found twice.
        """
        if not len(self._ids):
            return
        if len(starts) > 2 or len(text) <= _CHUNK:
            yield self._find(text, starts)
            return
        size = _CHUNK + int(self._length.max()) + 8
        for begin in range(0, len(text), _CHUNK):
            window = text[begin : begin + size]
            yield self._find(window, np.array([0, len(window)]))

    def _find(
        self, text: UInt8[np.ndarray, " b"], starts: Int64[np.ndarray, " n_plus_1"]
    ) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]:
        units = self._cut(text, starts)
        hashes = _Hashes(units, self._base)
        begins, found, alive, more = [], [], units.real, 0
        while len(alive):
            node = self._nodes(hashes(alive, alive + more))
            alive, node = alive[node >= 0], node[node >= 0]
            one = self._pattern[node]
            hit = (one >= 0) & (units.end[alive + more] - units.begin[alive] == self._length[one])
            begins.append(alive[hit])
            found.append(one[hit])
            alive = alive[self._deeper[node]]
            alive = alive[alive + more < units.last[alive]]
            more += 1
        begin, one = (np.concatenate([np.empty(0, np.int64), *parts]) for parts in (begins, found))
        same = _equal(text, units.begin[begin], self._text, self._begin[one], self._length[one])
        return units.row[begin[same]], self._ids[one[same]]

    def _nodes(self, hashes: UInt64[np.ndarray, " a"]) -> Int64[np.ndarray, " a"]:
        """Return the place of each hash among the keys, -1 for those that are not there."""
        place = self._near[hashes >> self._shift].astype(np.int64)
        key = self._keys[place]
        node = np.where(key == hashes, place, -1)
        left = np.flatnonzero(key < hashes)  # others with the same leading bits stand before it
        while len(left):
            place[left] += 1
            key, wanted = self._keys[place[left]], hashes[left]
            node[left[key == wanted]] = place[left[key == wanted]]
            left = left[key < wanted]
        return node


class _Hashes:
    """Hashes of runs of units: sum of byte[i] * base**i modulo 2**64, divided by base**begin, then mixed."""

    def __init__(self, units: _Units, base: int) -> None:
        powers, inverse = _powers(base, _rounded(len(units.text)))
        sums = np.zeros(len(units.text) + 1, np.uint64)
        np.cumsum((units.text.astype(np.uint64) + np.uint64(1)) * powers[: len(units.text)], out=sums[1:])
        self._begin, self._end, self._inverse = sums[units.begin], sums[units.end], inverse[units.begin]

    def __call__(self, first: Int64[np.ndarray, " a"], last: Int64[np.ndarray, " a"]) -> UInt64[np.ndarray, " a"]:
        """Return the hash of what lies from unit `first` to unit `last`, inclusive."""
        found: UInt64[np.ndarray, " a"] = (self._end[last] - self._begin[first]) * self._inverse[first] * _MIX
        return found


@lru_cache(maxsize=4)
def _powers(base: int, count: int) -> tuple[UInt64[np.ndarray, " _n"], UInt64[np.ndarray, " _n"]]:
    """Return base**i and base**-i modulo 2**64 for i from 0 to count."""
    both = []
    for factor in (base, pow(base, -1, 2**64)):
        powers = np.full(count + 1, factor, np.uint64)
        powers[0] = 1
        both.append(np.multiply.accumulate(powers, out=powers))
    return both[0], both[1]


def _rounded(count: int) -> int:
    """Return the next power of two, so that few tables are made; no smaller than most passes need."""
    return max(4 * _CHUNK, 1 << count.bit_length())


def _equal(
    text: UInt8[np.ndarray, " b"],
    begin: Int64[np.ndarray, " m"],
    other: UInt8[np.ndarray, " c"],
    other_begin: Int64[np.ndarray, " m"],
    length: Int64[np.ndarray, " m"],
) -> Bool[np.ndarray, " m"]:
    """Return which pieces of two texts are equal; pieces of length 0 are."""
    ends = length.cumsum()
    steps = np.arange(ends[-1] if len(ends) else 0)
    place = np.repeat(begin - ends + length, length) + steps
    differ = text[place] != other[np.repeat(other_begin - begin, length) + place]
    if not differ.any():
        return np.ones(len(begin), np.bool_)
    sums = np.concatenate([[0], differ.cumsum()])
    same: Bool[np.ndarray, " m"] = sums[ends] == sums[ends - length]
    return same


def match_batches(
    matcher: Callable[[pa.Array], pa.ListArray], batches: Iterable[pa.RecordBatch], column: str, *, processes: int = 1
) -> Generator[pa.RecordBatch, None, None]:
    """Yield each batch with a column `matches` behind its own, in order. No more than three batches per process are held.

    Args:
        matcher: Gives the matches of texts, as `Matcher` does; goes to each process once.
        batches: Of tens of thousands of rows, so that sending them costs little.
        column: Holds one text per row.
        processes: That match, this one among them: it matches alone until others are there, and then what they have no hand free for. Others
            are started anew (`spawn`), so a script needs its `if __name__ == "__main__":`.

    Raises:
        ColumnError: If there is no such column, or a column `matches` is there already.
        DataError: If it holds no strings.
    """
    if processes == 1:
        yield from (_with_matches(batch, matcher(_text_column(batch, column))) for batch in batches)
        return
    others = processes - 1
    folder = TemporaryDirectory()
    saved = Path(folder.name) / "matcher"
    saved.write_bytes(pickle.dumps(matcher))  # as an argument, this process would wait until others have read it
    pool = ProcessPoolExecutor(others, get_context("spawn"), _adopt, (saved,))
    waiting: deque[tuple[pa.RecordBatch, Future[Path | pa.ListArray]]] = deque()
    try:
        ready = pool.submit(len, "")
        for number, batch in enumerate(batches):
            texts = _text_column(batch, column)
            if ready.done() and sum(not matches.done() for _, matches in waiting) < 2 * others:
                waiting.append((batch, pool.submit(_match_file, _to_file(texts, saved.with_name(f"{number}.arrow")))))
            else:
                waiting.append((batch, Future()))
                waiting[-1][1].set_result(matcher(texts))
            while waiting and (len(waiting) == 3 * processes or waiting[0][1].done()):
                yield _received(*waiting.popleft())
        for sent in waiting:
            yield _received(*sent)
    finally:
        pool.shutdown(cancel_futures=True)
        folder.cleanup()


def _text_column(batch: pa.RecordBatch, column: str) -> pa.Array:
    if column not in batch.schema.names or "matches" in batch.schema.names:
        raise ColumnError(
            f"Matching reads the column {column!r} and adds the column 'matches'; the table has {', '.join(batch.schema.names)}. "
            "Name a column of texts, and drop an old 'matches'."
        )
    return batch.column(column)


def _with_matches(batch: pa.RecordBatch, matches: pa.ListArray) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([*batch.columns, matches], [*batch.schema.names, "matches"])


_adopted: Callable[[pa.Array], pa.ListArray]  # of a worker process


def _adopt(saved: Path) -> None:
    global _adopted
    _adopted = pickle.loads(saved.read_bytes())


def _match_file(path: Path) -> Path:
    """Put the matches in the place of the texts."""
    return _to_file(_adopted(_from_file(path)), path)


# Batches go through files, and through pipes only their names: a pipe holds 64 kilobytes, so whoever writes megabytes into one waits for a
# reader, and this process, which is matching, would have to be interrupted a hundred times to read them.
def _to_file(array: pa.Array, path: Path) -> Path:
    batch = pa.record_batch([array], ["array"])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    return path


def _from_file(path: Path) -> pa.Array:
    return pa.ipc.open_file(pa.py_buffer(path.read_bytes())).get_batch(0).column(0)


def _received(batch: pa.RecordBatch, matches: "Future[Path | pa.ListArray]") -> pa.RecordBatch:
    found = matches.result()
    if isinstance(found, Path):
        path, found = found, _from_file(found)
        path.unlink()
    return _with_matches(batch, found)
