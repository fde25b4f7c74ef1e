"""Random changes of a training text that leave most of its meaning: stop words dropped, words replaced, swapped or deleted.

The word lists are ours and small. Unlike the usual lists of stop words they hold no negations, numbers, or words of place and direction
(above, under, left), which change what an image shows.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from diptych.errors import ConfigError

STOP_WORDS: Mapping[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "en": "a an the this that these those some any each every such i me my mine we us our you your he him his she her hers it its they "
        "them their theirs who whom whose which what there here am is are was were be been being has have had having do does did doing "
        "will would shall should can could may might must and or but nor so if then than as while because of at by for with about to from "
        "into onto upon in on too very just also only own same other",
        "de": "der die das den dem des ein eine einen einem einer eines dieser diese dieses diesen diesem jener jene jenes ich mich mir mein "
        "meine wir uns unser unsere du dich dir dein deine er ihn ihm sein seine seinen seinem seiner sie ihr ihre ihren ihrem ihrer es man "
        "sich wer wen wem was welcher welche welches bin ist sind war waren sei gewesen wird werden wurde wurden hat haben hatte hatten kann "
        "können soll sollen muss müssen will wollen darf und oder aber denn sondern dass weil wenn als wie während von vom mit bei beim für "
        "zu zum zur aus im in ins an am ans auf auch nur sehr so noch schon da dort hier",
        "es": "el la los las lo un una unos unas este esta estos estas ese esa esos esas aquel aquella yo me mi mis nosotros nos nuestro "
        "nuestra tú te tu tus él ella ellos ellas le les se su sus que quien cual cuyo es son era eran fue fueron ser sido siendo está están "
        "estaba estaban estar ha han había haber hay y e o u pero pues si como cuando mientras porque de del a al en con por para muy más "
        "también ya aquí allí",
        "fr": "le la les l un une des du de d ce cet cette ces je me m moi mon ma mes nous notre nos tu te t toi ton ta tes vous votre vos il "
        "elle on ils elles lui leur leurs se s son sa ses qui que quoi dont où y en est sont était étaient être été étant a ont avait avaient "
        "avoir ayant et ou mais donc or ni car si comme quand tandis parce à au aux avec par pour dans sur chez très aussi déjà ici là",
        "it": "il lo la i gli le l un uno una questo questa questi queste quello quella quelli quelle io mi me mio mia noi ci nostro nostra tu "
        "ti tuo tua lui lei egli ella loro gli ne si suo sua suoi sue che chi cui è sono era erano essere stato stata stanno sta ha hanno "
        "aveva avevano avere e ed o ma però se come quando mentre perché di del dello della dei degli delle d a al allo alla ai agli alle da "
        "dal dalla in nel nello nella nei con per su sul sulla molto anche già qui lì",
        "pt": "o a os as um uma uns umas este esta estes estas esse essa esses essas aquele aquela eu me meu minha nós nos nosso nossa tu te "
        "teu tua você ele ela eles elas lhe lhes se seu sua seus suas que quem qual cujo é são era eram foi foram ser sido sendo está estão "
        "estava estavam estar há tem têm tinha ter e ou mas pois se como quando enquanto porque de do da dos das ao à aos às em no na nos nas "
        "num numa com por pelo pela para muito também já aqui ali",
    }.items()
}
"""Words that say nothing about an image by themselves, lower case, by language (ISO 639-1)."""

SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "en": tuple(
        (
            "photo picture photograph image snapshot,drawing sketch,man guy gentleman,men guys gentlemen,woman lady,women ladies,"
            "child kid,children kids,boy lad,boys lads,baby infant,babies infants,person individual,people persons folks,"
            "friend pal,friends pals,crowd throng,dog hound,dogs hounds,rabbit bunny,rabbits bunnies,horse steed,pig hog,pigs hogs,"
            "car automobile,cars automobiles,bicycle bike,bicycles bikes,motorcycle motorbike,motorcycles motorbikes,ship vessel,"
            "ships vessels,airplane plane aeroplane,airplanes planes aeroplanes,taxi cab,taxis cabs,street road,streets roads,"
            "path trail,sofa couch,house home,houses homes,shop store,shops stores,rock stone,rocks stones,ocean sea,forest woods,"
            "hill slope,field meadow,beach shore,river stream,cup mug,cups mugs,hat cap,hats caps,jacket coat,jackets coats,"
            "trousers pants,shirt top,shoes footwear,bag sack,gifts presents,ball sphere,small little tiny,large big huge,"
            "tall high,quick fast rapid,happy cheerful joyful,sad unhappy,angry furious,old aged elderly,young youthful,"
            "beautiful lovely pretty,colorful colourful vivid,gray grey,purple violet,bright brilliant,dark dim,empty vacant,"
            "wet damp,snowy snow-covered,upside-down inverted,tilted slanted inclined,faded pale,several various,many numerous,"
            "run sprint,runs sprints,running sprinting,walk stroll,walks strolls,walking strolling,jump leap,jumps leaps,"
            "jumping leaping,sitting seated,look gaze,looks gazes,looking gazing,watch observe,watches observes,watching observing,"
            "smile grin,smiles grins,smiling grinning,talk speak chat,talks speaks chats,talking speaking chatting,throw toss,"
            "throws tosses,throwing tossing,catch grab,catches grabs,catching grabbing,carry haul,carries hauls,carrying hauling,"
            "show depict,shows depicts,showing depicting"
        ).split(",")
    )
}
"""Groups of words that can stand for each other in a caption, lower case, separated by spaces, by language."""

WORD = re.compile(r"\w(?:\S*\w)?")
"""A word: what white space separates, without the punctuation around it."""


@dataclass(frozen=True)
class TextChange:
    """Random changes of a training text. The defaults change nothing.

    First all stop words are dropped, with probability `stop_word_rate`. Then exactly one edit is made, drawn by weight; none if all weights
    are 0. A change that would leave no word is not made.

    Attributes:
        stop_word_rate: Probability of dropping the stop words.
        synonym_weight: Of replacing `edits` words by a synonym, as far as there are any.
        swap_weight: Of exchanging two random words, `edits` times.
        delete_weight: Of deleting each word with probability `delete_rate`.
        edits: Words replaced, or exchanges made.
        delete_rate: Probability per word.
        language: Of texts that do not say theirs, ISO 639-1.
        stop_words: Used instead of the list of the text's language.
        synonyms: Groups of words, separated by spaces within a group, used instead of those of the text's language.

    Source: Wei and Zou 2019 (EDA), section 2, for the three edits.
    """

    stop_word_rate: float = 0.0
    synonym_weight: float = 0.0
    swap_weight: float = 0.0
    delete_weight: float = 0.0
    edits: int = 1
    delete_rate: float = 0.1
    language: str = "en"
    stop_words: tuple[str, ...] | None = None
    synonyms: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        rates, weights = (
            (self.stop_word_rate, self.delete_rate),
            (self.synonym_weight, self.swap_weight, self.delete_weight),
        )
        if not all(0 <= rate <= 1 for rate in rates) or min(weights) < 0 or self.edits < 1:
            raise ConfigError(f"Rates must be in [0, 1], weights >= 0 and edits >= 1; this is {self}.")


def change_text(text: str, change: TextChange, rng: np.random.Generator, *, language: str | None = None) -> str:
    """Return a random variant of a text; the text itself when `change` is `TextChange()`.

    Args:
        text: Words with spaces between them.
        change: What may happen.
        rng: Equal generators give equal variants.
        language: Of the text, if known.

    Raises:
        ConfigError: If a list of words is needed that its language does not have.
    """
    language = (language or change.language).split("-")[0].lower()
    words = before = text.split()
    if change.stop_word_rate > 0:
        stop_words = _stop_words(change, language)
        if rng.random() < change.stop_word_rate:
            words = _unless_empty([word for word in words if _core(word) not in stop_words], words)
    weights = np.array([change.synonym_weight, change.swap_weight, change.delete_weight])
    if weights.any():
        synonyms = _synonyms(change, language) if change.synonym_weight > 0 else {}
        kind = rng.choice(3, p=weights / weights.sum())
        if kind == 0:
            words = _replaced(words, synonyms, change.edits, rng)
        elif kind == 1:
            words = _swapped(words, change.edits, rng)
        else:
            words = _unless_empty([word for word in words if rng.random() >= change.delete_rate], words)
    return text if words == before else " ".join(words)


def stop_words(language: str, advice: str = "Name one of those.") -> frozenset[str]:
    """Return the stop words of a language (ISO 639-1).

    Raises:
        ConfigError: If there are none; ends with the advice.
    """
    if language not in STOP_WORDS:
        raise ConfigError(
            f"There are no stop words for the language {language!r}, only for {', '.join(STOP_WORDS)}. {advice}"
        )
    return STOP_WORDS[language]


def _replaced(
    words: list[str], synonyms: Mapping[str, Sequence[str]], edits: int, rng: np.random.Generator
) -> list[str]:
    """Return the words with up to `edits` of them replaced by a synonym; case of the first letter and punctuation stay."""
    places = [place for place, word in enumerate(words) if _core(word) in synonyms]
    changed = list(words)
    for place in rng.permutation(places)[:edits].tolist():
        choices = synonyms[_core(words[place])]
        new = choices[int(rng.integers(len(choices)))]
        found = WORD.search(words[place])
        assert found is not None
        new = new.capitalize() if found[0][0].isupper() else new
        changed[place] = words[place].replace(found[0], new, 1)
    return changed


def _swapped(words: list[str], edits: int, rng: np.random.Generator) -> list[str]:
    changed = list(words)
    for _ in range(edits if len(words) > 1 else 0):
        i, j = rng.choice(len(words), size=2, replace=False)
        changed[i], changed[j] = changed[j], changed[i]
    return changed


def _unless_empty(words: list[str], before: list[str]) -> list[str]:
    return words if any(map(_core, words)) else before


def _core(word: str) -> str:
    """Return a word in lower case without the punctuation around it; empty if there is nothing else."""
    found = WORD.search(word)
    return found[0].lower() if found else ""


def _stop_words(change: TextChange, language: str) -> frozenset[str]:
    if change.stop_words is not None:
        return frozenset(change.stop_words)
    return stop_words(language, "Give your own in change.stop_words, or set change.stop_word_rate to 0.")


def _synonyms(change: TextChange, language: str) -> Mapping[str, Sequence[str]]:
    """Return every word that has synonyms with them."""
    if change.synonyms is not None:
        return _table(change.synonyms)
    if language not in SYNONYMS:
        raise ConfigError(
            f"There are no synonyms for the language {language!r}, only for {', '.join(SYNONYMS)}. Give your own in "
            "change.synonyms, or set change.synonym_weight to 0."
        )
    return _table(SYNONYMS[language])


@lru_cache(maxsize=32)
def _table(groups: tuple[str, ...]) -> Mapping[str, Sequence[str]]:
    split = map(str.split, groups)
    return {word: [other for other in group if other != word] for group in split for word in group}
