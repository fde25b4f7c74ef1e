"""What a survey of all rows found out about some of them, brought back to the rows."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diptych.curate.balance import row_hashes
from diptych.curate.reasons import kept, with_column
from diptych.curate.similar import spans
from diptych.verbs import AbstractCurator


class Verdicts(AbstractCurator):
    """Gives rows the reason that was found for their key, and what else was found as further columns."""

    def __init__(self, found: pa.Table) -> None:
        """Make the curator.

        Args:
            found: First a column of unique strings that has the name of one in the tables to come; then `reason`, null for rows that stay, and
                any others, which are null for rows nothing was found about.
        """
        hashes = row_hashes(found[0])
        order = np.argsort(hashes)
        self._found, self._hashes = found.take(pa.array(order)), hashes[order]

    def curate(self, table: pa.Table) -> pa.Table:
        """Return the table with reasons and columns; rows that have a reason already get neither."""
        by, alive = self._found.column_names[0], kept(table)
        # Only what can be in this table: making a hash table of all that was found for each of many small tables would cost more.
        wanted = np.unique(row_hashes(table[by]))
        low, high = (np.searchsorted(self._hashes, wanted, side=side) for side in ("left", "right"))
        near = self._found.take(pa.array(spans(low, high)))
        place = pc.index_in(table[by], near[by].combine_chunks())
        place = pc.if_else(pa.array(alive), place, pa.scalar(None, pa.int32())).combine_chunks()
        for name in self._found.column_names[1:]:
            values = near[name].take(place)
            earlier = table[name] if name in table.column_names else pa.nulls(table.num_rows, values.type)
            table = with_column(table, name, pc.coalesce(values, earlier))
        return table


def in_drawn_order(surveys: Iterable[pa.Table]) -> pa.Table:
    """Return the rows of surveys in an order that follows from the names in their first column alone, each name once."""
    parts = list(surveys)
    if not parts:
        return pa.table({"key": pa.array([], pa.string())})
    whole = pa.concat_tables(parts)
    by = whole.column_names[0]
    whole = whole.append_column("drawn", pa.array(row_hashes(whole[by])))
    whole = whole.sort_by([("drawn", "ascending"), (by, "ascending")])
    names = whole[by].combine_chunks()
    again = np.concatenate([[False], pc.equal(names[1:], names[:-1])]).astype(np.bool_)[: len(names)]
    return whole.filter(pa.array(~again)).drop_columns("drawn")
