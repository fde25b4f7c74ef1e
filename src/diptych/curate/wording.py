"""What a caption speaks of, and whether a rewrite still does. Rules and small word lists; English, no tagger is needed."""

import re
from dataclasses import dataclass

from diptych.errors import ConfigError

_WORD = re.compile(r"[a-z]+(?:['-][a-z]+)*")
_BEFORE_NOUNS = frozenset(
    "a an the this that these those his her its their my your our some any many several few two three four five six seven eight nine ten "
    "in on at of with by near over under above below behind beside between through across into onto from along around against for to "
    "inside outside toward towards down up off while wearing holding riding carrying and or no one another other each".split()
)
"""Words after which a noun, perhaps with adjectives before it, is to be expected."""
_JOINING = frozenset("and or while to off for".split())
"""Those of them after which a verb may come as well."""
_FUNCTION = _BEFORE_NOUNS | frozenset(
    "is are was were be been being am has have had do does did will would can could may might must should he she it they them him we us i "
    "you who whom which what where when as than then there here not very too so but if because just also out away together front back "
    "something someone somebody anything everything nothing before after next each both all way left right top".split()
)
_VERBS = frozenset(
    "run jump walk sit stand play hold wear look ride eat swim climb throw catch swing slide lie sleep watch wait fly drive carry smile "
    "leap race chase kick hit dance sing talk pose bite lick drink push pull cross splash dig bark perform work read fall rest point lean "
    "stare wade surf ski skate sled paddle row bounce tumble crawl make take get go come give show have use try wave hang float sniff".split()
)
_LIKE_VERBS = frozenset(
    "thing string spring building wedding ceiling railing crossing morning evening clothing painting sled shed swing king wing".split()
)
"""Nouns that end like participles."""
_REFUSALS = re.compile(
    r"\b(as an ai|language model|i('m| am) (sorry|unable|not able)|i (can ?not|can't|won't)|sorry,|cannot (help|assist|provide))",
    re.I,
)


@dataclass(frozen=True)
class QualityConfig:
    """What a rewrite must be to be kept.

    Attributes:
        min_nouns: Share of the caption's nouns that the rewrite must name, in [0, 1].
        max_new_nouns: How many nouns of its own it may have; synonyms count, things that the image does not show are most of the rest.
        min_words: Fewest words.
        max_words: Most words.
        max_growth: Most words as a multiple of the caption's, counting at least eight; long additions are mostly made up.
    """

    min_nouns: float = 0.6
    max_new_nouns: int = 1
    min_words: int = 2
    max_words: int = 40
    max_growth: float = 2.0

    def __post_init__(self) -> None:
        if (
            not 0 <= self.min_nouns <= 1
            or self.max_new_nouns < 0
            or not 1 <= self.min_words <= self.max_words
            or self.max_growth < 1
        ):
            raise ConfigError(
                f"min_nouns must be in [0, 1], max_new_nouns >= 0, 1 <= min_words <= max_words, max_growth >= 1; this is {self}."
            )


def nouns(caption: str) -> tuple[str, ...]:
    """Return what are probably the nouns of an English caption, singular, lower case, in order.

    The last word of each run of content words that an article, a number or a preposition opens, or that begins the caption; verbs end a
    run. Good enough to see what a rewrite has lost, wrong for some captions.
    """
    found: list[str] = []
    for clause in re.split(r"[^\w\s'-]+", caption.lower()):
        run: list[str] = []
        before = "the"  # a clause may begin with a noun
        for word in [*_WORD.findall(clause), "the"]:  # a last word that closes the last run
            inside = bool(run) or before in _BEFORE_NOUNS
            first = inside and not run and before not in _JOINING
            adjective = first and word.endswith(("ing", "ed")) and word not in _LIKE_VERBS
            if word in _FUNCTION or (_is_verb(word) and not first):  # a surf, the swing are nouns
                found += run[-1:]
                run, before = [], word
            elif inside and not adjective and not word.endswith("ly"):
                run.append(word)
    return tuple(dict.fromkeys(map(singular, found)))


def fault(
    caption: str, rewrite: str, *, others: tuple[str, ...] = (), config: QualityConfig = QualityConfig()
) -> str | None:
    """Return what is wrong with a rewrite in a few words, or None.

    Args:
        caption: What was rewritten.
        rewrite: The answer of a model, read by `FewShot.parse`.
        others: Texts that the sample has already, the caption's other rewrites among them.
        config: Limits.
    """
    words, most = rewrite.split(), config.max_growth * max(8, len(caption.split()))
    if not _WORD.search(rewrite.lower()) and not any(map(str.isalpha, rewrite)):
        return "empty"
    if _REFUSALS.search(rewrite):
        return "refusal"
    if "=>" in rewrite:
        return "part of a prompt"
    if len(words) < config.min_words:
        return f"too short ({len(words)} words)"
    if len(words) > min(config.max_words, most):
        return f"too long ({len(words)} words)"
    if plain(rewrite) == plain(caption):
        return "copy of the caption"
    if plain(rewrite) in map(plain, others):
        return "duplicate"
    named = nouns(caption)
    said = {singular(word) for word in _WORD.findall(rewrite.lower())}
    lost = [noun for noun in named if noun not in said]
    if named and 1 - len(lost) / len(named) < config.min_nouns:
        return f"lost {', '.join(lost)}"
    known = set(map(singular, _WORD.findall(caption.lower())))
    new = [noun for noun in nouns(rewrite) if noun not in known]
    return f"new {', '.join(new)}" if len(new) > config.max_new_nouns else None


def plain(text: str) -> str:
    """Return a text as two are compared: words only, lower case."""
    return " ".join(re.findall(r"\w+", text.lower()))


def singular(word: str) -> str:
    """Return an English noun without its plural ending; words that only look like plurals are cut alike everywhere."""
    irregular = {
        "men": "man",
        "women": "woman",
        "children": "child",
        "people": "person",
        "mice": "mouse",
        "feet": "foot",
        "teeth": "tooth",
    }
    if word in irregular:
        return irregular[word]
    if word.endswith("ies") and len(word) > 4:
        return f"{word[:-3]}y"
    if word.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3 else word


def _is_verb(word: str) -> bool:
    participle = len(word) > 4 and word.endswith(("ing", "ed")) and word not in _LIKE_VERBS
    return participle or word in _VERBS or singular(word) in _VERBS
