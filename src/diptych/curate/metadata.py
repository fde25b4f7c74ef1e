"""Word lists to match texts against: built from text dumps, or ready from packages and files.

A list that covers what can be seen and named comes from four places: the synsets of WordNet, frequent words, pairs of words that belong together,
and titles that are looked up. Case stays as it is, so `Image` and `image` are two entries.

Source: Xu et al. 2024, "Demystifying CLIP Data", section 3, and its official code.
"""

import hashlib
import json
import math
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from diptych.curate.match import spaced
from diptych.data.bundles import bundle_file
from diptych.data.openmoji import emoji_names
from diptych.errors import ConfigError, DataError, nearest, require
from diptych.files import atomic_file

NUMBERS = tuple(map(str, range(100)))
"""`0` to `99`, which the paper adds."""
_PUNCTUATION = frozenset(string.punctuation)


@dataclass(frozen=True)
class Metadata:
    """A word list, sorted, so that the same words have the same ids in every run.

    Attributes:
        entries: Each once; an entry's id is its place.
        origins: Name of the first source that gave each.
    """

    entries: tuple[str, ...]
    origins: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Return a hash of the entries, which counts and matches belong to."""
        return hashlib.blake2b("\n".join(self.entries).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return len(self.entries)


def build_metadata(sources: Mapping[str, Iterable[str]], *, budget: int | None = None) -> Metadata:
    """Return the words of several sources as one list. Empty words and single punctuation marks are left out.

    Args:
        sources: Words by name of the source, the most important first: a word belongs to the first that has it, and later ones lose where
            the budget ends.
        budget: Most entries; 500,000 in the paper. None for all.

    Raises:
        ConfigError: If nothing is left.
    """
    found: dict[str, str] = {}
    for origin, words in sources.items():
        for word in words:
            if len(found) == budget:
                break
            if word and word not in _PUNCTUATION:
                found.setdefault(word, origin)
    if not found:
        raise ConfigError(f"No words are left of the sources {', '.join(sources) or '(none)'}. Name one that has some.")
    entries = sorted(found)
    return Metadata(tuple(entries), tuple(found[entry] for entry in entries))


@dataclass(frozen=True)
class NgramCounts:
    """How often words and pairs of neighbours stand in a dump.

    Attributes:
        words: Single words; those of punctuation only are not counted.
        pairs: Two words with one space between; not across punctuation, nor from text to text.
    """

    words: Counter[str]
    pairs: Counter[str]


def count_ngrams(texts: Iterable[str]) -> NgramCounts:
    """Return the counts of a dump, read once. Words are cut as matching cuts them, so that each can be found again.

    Args:
        texts: Lines, paragraphs or articles.
    """
    words, pairs = Counter[str](), Counter[str]()
    for text in texts:
        cut = spaced(text).split()
        kept = [None if _PUNCTUATION.issuperset(word) else word for word in cut]
        words.update(word for word in kept if word)
        pairs.update(f"{one} {other}" for one, other in pairwise(kept) if one and other)
    return NgramCounts(words, pairs)


def frequent_words(counts: NgramCounts, *, least: int = 100) -> list[str]:
    """Return the words that stand `least` times or more, the most frequent first. Paper: 251,465 words of Wikipedia."""
    return [word for word, _ in _by_rank({word: n for word, n in counts.words.items() if n >= least})]


def joined_words(counts: NgramCounts, *, least_pmi: float = 30.0, least: int = 1) -> list[str]:
    """Return the pairs of words that belong together, the closest first: PMI = log2(n(a b) N / (n(a) n(b))).

    Args:
        counts: N is the sum of the words'.
        least_pmi: In bits. The paper's 30 gives 100,646 pairs of Wikipedia; no pair has more than log2 N, so small dumps need less.
        least: How often the pair must stand there.
    """
    total, found = sum(counts.words.values()), {}
    for pair, number in counts.pairs.items():
        one, other = pair.split(" ")
        pmi = math.log2(number * total / (counts.words[one] * counts.words[other]))
        if number >= least and pmi >= least_pmi:
            found[pair] = pmi
    return [pair for pair, _ in _by_rank(found)]


def viewed_titles(
    lines: Iterable[str], *, project: str = "en", least_views: int = 70, least_hourly: int = 50
) -> list[str]:
    """Return titles from hourly page-view dumps, the most viewed first. Paper: 61,235 titles, 26 days between 2018 and 2022.

    Args:
        lines: `project title views bytes`, of all files one after another.
        project: First word of the lines that count.
        least_views: Over all hours.
        least_hourly: Lines with fewer views are passed over.
    """
    views = Counter[str]()
    for line in lines:
        match line.split(" "):
            case [language, title, number, *_] if language == project and ":" not in title and number.isdecimal():
                if int(number) >= least_hourly:
                    views[title.replace("_", " ")] += int(number)
    return [title for title, _ in _by_rank({title: n for title, n in views.items() if n >= least_views})]


def wordnet_names(folder: Path) -> list[str]:
    """Return the names of WordNet's synsets: the first word of each, lower case. With `NUMBERS`, WordNet 3.0 gives the paper's 86,654 entries.

    Args:
        folder: Holds data.noun, data.verb, data.adj and data.adv: `dict` of a WordNet release, `wordnet` of NLTK's corpora, or
            /usr/share/wordnet of Debian's package wordnet-base.

    Raises:
        DataError: If one of the files is missing.
    """
    found: dict[str, None] = {}
    for part in ("noun", "verb", "adj", "adv"):
        file = folder / f"data.{part}"
        if not file.is_file():
            raise DataError(f"{folder} has no {file.name}. Name the folder of a WordNet release that holds data.noun.")
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):  # the licence does
                word = line.split(" ")[4].partition("(")[0]  # (a), (p), (ip): where an adjective may stand
                found[word.lower().partition(".")[0].replace("_", " ")] = None
    return list(found)


def words_of(spec: str) -> list[str]:
    """Return a ready list of words.

    Args:
        spec: `emoji:ja` (names of emoji, extra `demo`), `words:de` (frequent words of some forty languages, the most frequent first, extra
            `curate`), `class-names:en` (classes of common data sets, from `DIPTYCH_DATA`), `wordnet:FOLDER`, or a file: .txt with one entry
            a line, or .json with a list.

    Raises:
        ConfigError: If there is no such list; names the nearest.
        DataError: If the file is not what it should be.
    """
    kind, _, which = spec.partition(":")
    if kind in _READY and which:
        return _READY[kind](which)
    path = Path(spec)
    if path.suffix not in (".txt", ".json") or not path.is_file():
        raise ConfigError(
            f"There is no word list {spec!r}: it is neither a .txt or .json file nor a ready one with its part, such as emoji:en. "
            f"{nearest(kind, _READY)}"
        )
    text = path.read_text(encoding="utf-8")
    words = json.loads(text) if path.suffix == ".json" else text.splitlines()
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise DataError(f"{path} must hold a JSON list of strings, one per entry.")
    return words


def _emoji(language: str) -> list[str]:
    names = list(emoji_names().values())
    found = dict.fromkeys(of_one[language] for of_one in names if language in of_one)
    if not found:
        raise ConfigError(f"No emoji has a name in {language!r}. {nearest(language, set(chain(*names)))}")
    return list(found)


def _frequent(language: str) -> list[str]:
    wordfreq = require("wordfreq", "curate")
    known = wordfreq.available_languages("best")
    if language not in known:
        raise ConfigError(f"There are no frequent words of {language!r}. {nearest(language, known)}")
    return list(wordfreq.iter_wordlist(language))


def _class_names(language: str) -> list[str]:
    sets = json.loads(bundle_file("class-names", f"{language}_classnames.json").read_text(encoding="utf-8"))
    return list(dict.fromkeys(chain.from_iterable(sets.values())))


_READY: Mapping[str, Callable[[str], list[str]]] = {
    "emoji": _emoji,
    "words": _frequent,
    "class-names": _class_names,
    "wordnet": lambda folder: wordnet_names(Path(folder)),
}


def write_metadata(metadata: Metadata, path: Path) -> None:
    """Write a word list as a parquet file, whole or not at all."""
    with atomic_file(path) as file:
        pq.write_table(pa.table({"entry": list(metadata.entries), "origin": list(metadata.origins)}), file)


def read_metadata(path: Path) -> Metadata:
    """Return the word list that `write_metadata` wrote.

    Raises:
        DataError: If it is no such file.
    """
    columns = _columns(path, ("entry", "origin"))
    return Metadata(tuple(columns["entry"].to_pylist()), tuple(columns["origin"].to_pylist()))


def write_counts(counts: Int64[np.ndarray, " entries"], metadata: Metadata, path: Path) -> None:
    """Write in how many texts each entry stands, beside the entries, as a parquet file, whole or not at all."""
    table = pa.table({"entry": list(metadata.entries), "count": counts})
    with atomic_file(path) as file:
        pq.write_table(table.replace_schema_metadata({"metadata": metadata.digest}), file)


def read_counts(path: Path, metadata: Metadata) -> Int64[np.ndarray, " entries"]:
    """Return the counts that `write_counts` wrote.

    Raises:
        DataError: If they are of another word list, or it is no such file.
    """
    columns = _columns(path, ("entry", "count"))
    digest = (columns.schema.metadata or {}).get(b"metadata", b"").decode()
    if digest != metadata.digest:
        raise DataError(
            f"{path} holds counts of the word list {digest or 'unknown'}; this one is {metadata.digest}. Count again with this one."
        )
    return np.asarray(columns["count"], np.int64)


def _columns(path: Path, names: tuple[str, ...]) -> pa.Table:
    try:
        return pq.read_table(path, columns=list(names))
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} is no parquet file with the columns {', '.join(names)}: {error}") from error


def _by_rank(values: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Yield the highest first, equals in alphabetical order."""
    return iter(sorted(values.items(), key=lambda item: (-item[1], item[0])))
