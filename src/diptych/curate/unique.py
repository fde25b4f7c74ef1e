"""Rows with a key that an earlier row has: copies are dropped, different pairs get a key of their own.

A key decides the draws of a row, and names its files in a tar shard, so it must be the row's own. Keys and captions are compared by hashes of 64
bits: among ten billion rows a few keys are made longer without need, and no pair is dropped that differs in both.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diptych.curate.balance import row_hashes
from diptych.curate.reasons import kept, with_column, with_reason
from diptych.verbs import AbstractCurator, AbstractSurveyor

COPY = "key and caption of an earlier row"

AT_ONCE = 8_000_000  # rows whose hashes are held together, some 400 MB


@dataclass(frozen=True)
class UniqueConfig:
    """Whether keys are compared.

    Attributes:
        on: One more pass over texts. Without it keys must be unique, or rows with equal ones share their fate.
    """

    on: bool = True


class UniqueKeys(AbstractSurveyor):
    """Finds rows whose key an earlier row has. Memory does not grow with the rows, only with the number of repeated keys.

    The table needs the columns `number`, `row`, `place` and `group`, and all captions of a row, as `diptych.curate.pairs.PAIRS` has them.
    """

    def survey(self, table: pa.Table) -> pa.Table:
        """Return number, hash of the key and hash of the caption of each row."""
        table = table.filter(pa.array(kept(table)))
        return pa.table(
            {
                "number": table["number"],
                "key": row_hashes(table["key"]),
                "caption": row_hashes(table["caption"].fill_null("")),
            }
        )

    def merge(self, surveys: Iterable[pa.Table]) -> pa.Table:
        """Return the rows that repeat a key, and whether they repeat the caption of the same key, too."""
        rounds = max(1, -(-sum(survey.num_rows for survey in surveys) // AT_ONCE))
        found = []
        for this in range(rounds):
            parts = []
            for survey in surveys:
                here = survey["key"].to_numpy() % np.uint64(rounds) == this
                parts.append(survey.filter(pa.array(here)))
            if parts:
                found.append(_repeated(pa.concat_tables(parts)))
        empty = pa.table({"number": pa.array([], pa.int64()), "copy": pa.array([], pa.bool_())})
        return pa.concat_tables([empty, *found])

    def informed(self, merged: pa.Table) -> AbstractCurator:
        """Return the curator that drops copies and renames the others."""
        return _Renamer(merged.sort_by("number"))


def _repeated(rows: pa.Table) -> pa.Table:
    """Return the rows behind the first of each key; a copy has key and caption of any earlier one."""
    number, key, caption = (rows[name].to_numpy() for name in ("number", "key", "caption"))
    order = np.lexsort((number, key))
    later = np.zeros(len(order), np.bool_)
    later[order[1:]] = key[order][1:] == key[order][:-1]
    order = np.lexsort((number, caption, key))
    same = np.zeros(len(order), np.bool_)
    same[order[1:]] = (key[order][1:] == key[order][:-1]) & (caption[order][1:] == caption[order][:-1])
    return pa.table({"number": number[later], "copy": same[later]})


class _Renamer(AbstractCurator):
    def __init__(self, repeated: pa.Table) -> None:
        self._number, self._copy = repeated["number"].to_numpy(), repeated["copy"].to_numpy(zero_copy_only=False)

    def curate(self, table: pa.Table) -> pa.Table:
        number = table["number"].to_numpy()
        place = np.searchsorted(self._number, number)
        known = np.zeros(len(number), np.bool_)
        inside = place < len(self._number)
        known[inside] = self._number[place[inside]] == number[inside]
        copies = np.zeros(len(number), np.bool_)
        copies[known] = self._copy[place[known]]
        table = with_reason(table, copies, COPY)
        if not known.any():
            return table
        # All captions of such a row leave the group of the earlier one: its image is another.
        row, first = table["row"].to_numpy(), number - table["place"].to_numpy()
        table = _lengthened(table, "group", np.isin(row, row[known]), first)
        return _lengthened(table, "key", known & ~copies & kept(table), number)


def _lengthened(table: pa.Table, column: str, rows: np.ndarray, number: np.ndarray) -> pa.Table:
    """Return the table with numbers behind some names."""
    longer = pc.binary_join_element_wise(table[column], pa.array(number).cast(pa.string()), "+")
    return with_column(table, column, pc.if_else(pa.array(rows), longer, table[column]))
