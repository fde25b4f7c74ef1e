"""Which language a caption is in: by CLD2, whose tables are inside its package, or by its script alone.

Captions are short, and a detector that always answers is often wrong about `red car`. An answer that CLD2 itself does not call reliable is none,
unless `guess` is set. Scripts tell a language only where one language is written in them; Latin, Cyrillic, Arabic and Han are not of that kind.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from diptych.curate.reasons import kept, with_column, with_reason
from diptych.errors import ConfigError, require
from diptych.verbs import AbstractCurator

NOT_WANTED, UNKNOWN = "language not wanted", "language unknown"

_SCRIPTS = {
    "ja": r"[\x{3041}-\x{30fa}]",  # kana come first: Japanese has Han as well
    "ko": r"\p{Hangul}",
    "th": r"\p{Thai}",
    "el": r"\p{Greek}",
    "he": r"\p{Hebrew}",
    "ka": r"\p{Georgian}",
    "hy": r"\p{Armenian}",
    "ta": r"\p{Tamil}",
    "te": r"\p{Telugu}",
    "bn": r"\p{Bengali}",
    "gu": r"\p{Gujarati}",
    "kn": r"\p{Kannada}",
    "ml": r"\p{Malayalam}",
    "pa": r"\p{Gurmukhi}",
    "km": r"\p{Khmer}",
    "lo": r"\p{Lao}",
    "my": r"\p{Myanmar}",
    "si": r"\p{Sinhala}",
}
_TODAY = {"iw": "he", "jw": "jv", "in": "id", "nb": "no"}
_MOST = 4096  # characters that are looked at


@dataclass(frozen=True)
class LanguageConfig:
    """Which languages are kept.

    Attributes:
        on: Whether languages are found out at all; those that the source names are taken without it.
        keep: ISO 639-1 codes; empty for all.
        unknown: Whether captions of unknown language are kept, too.
        guess: Take CLD2's best guess even where it is not sure.
        detector: `cld2` (extra `curate`), `scripts`, or `auto`: CLD2 where it is installed.
    """

    on: bool = True
    keep: tuple[str, ...] = ()
    unknown: bool = True
    guess: bool = False
    detector: Literal["auto", "cld2", "scripts"] = "auto"

    @property
    def chosen(self) -> Literal["cld2", "scripts"]:
        """Return the detector that is used on this machine."""
        if self.detector == "auto":
            return "cld2" if find_spec("pycld2") else "scripts"
        return self.detector


class LanguageFilter(AbstractCurator):
    """Fills the column `language` where it is null, and drops rows in other languages than those wanted."""

    def __init__(self, config: LanguageConfig = LanguageConfig()) -> None:
        """Make the curator.

        Raises:
            ConfigError: If a code is not ISO 639-1, or only scripts are there and languages without one of their own are wanted.
            MissingExtraError: If CLD2 is asked for and not installed.
        """
        if wrong := [code for code in config.keep if not (len(code) == 2 and code.isalpha() and code.islower())]:
            raise ConfigError(f"Languages are ISO 639-1 codes such as en, de, zh; {', '.join(wrong)} came.")
        unseen = sorted(set(config.keep) - set(_SCRIPTS))
        if config.chosen == "scripts" and unseen and not config.unknown:
            raise ConfigError(
                f"By scripts alone {', '.join(unseen)} cannot be told. Install CLD2 with pip install 'diptych[curate]', or keep unknown ones."
            )
        if config.chosen == "cld2":
            require("pycld2", "curate")
        self.config = config

    def curate(self, table: pa.Table) -> pa.Table:
        """Return the table with languages, rows in others dropped."""
        spoken = table["language"] if "language" in table.column_names else pa.nulls(table.num_rows, pa.string())
        spoken = pc.cast(spoken, pa.string())
        asked = pa.array(kept(table) & pc.is_null(spoken).to_numpy(zero_copy_only=False))
        found = detect(table["caption"].filter(asked), self.config.chosen, guess=self.config.guess)
        spoken = pc.replace_with_mask(_whole(spoken), asked, found)
        table = with_column(table, "language", spoken)
        unknown = pc.is_null(spoken).to_numpy(zero_copy_only=False)
        if self.config.keep:
            wanted = pc.is_in(spoken, value_set=pa.array(self.config.keep)).to_numpy(zero_copy_only=False)
            table = with_reason(table, ~wanted & ~unknown, NOT_WANTED)
        return table if self.config.unknown else with_reason(table, unknown, UNKNOWN)


def detect(
    texts: pa.Array | pa.ChunkedArray, detector: Literal["cld2", "scripts"] = "cld2", *, guess: bool = False
) -> pa.Array:
    """Return the ISO 639-1 code of each text, null where the language is unknown.

    Args:
        texts: Strings; only the first few thousand characters are looked at.
        detector: By what.
        guess: Take CLD2's best guess even where it is not sure.
    """
    short = _whole(pc.utf8_slice_codeunits(texts, 0, _MOST))
    if detector == "scripts":
        conditions = [pc.fill_null(pc.match_substring_regex(short, script), False) for script in _SCRIPTS.values()]
        return pc.case_when(pc.make_struct(*conditions), *map(pa.scalar, _SCRIPTS)).cast(pa.string())
    cld2 = require("pycld2", "curate")
    return pa.array([_by_cld2(text or "", cld2.detect, cld2.error, guess) for text in short.to_pylist()], pa.string())


def _by_cld2(
    text: str,
    find: Callable[..., tuple[bool, int, tuple[tuple[str, str, int, float], ...]]],
    error: type[Exception],
    guess: bool,
) -> str | None:
    try:
        _, _, answers = find(text, bestEffort=guess)
    except error:  # it takes some rare characters for damaged text
        return None
    code = answers[0][1].partition("-")[0].lower()
    return None if code == "un" or len(code) != 2 else _TODAY.get(code, code)


def _whole(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
