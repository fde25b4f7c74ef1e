"""The column `reason`: what dropped a row, null while it is kept."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

REASON = "reason"


def kept(table: pa.Table) -> Bool[np.ndarray, " rows"]:
    """Return which rows have no reason; all, where there is no such column."""
    if REASON not in table.column_names:
        return np.ones(table.num_rows, np.bool_)
    found: Bool[np.ndarray, " rows"] = pc.is_null(table[REASON]).to_numpy()
    return found


def kept_rows(table: pa.Table) -> pa.Table:
    """Return the rows that have no reason."""
    return table.filter(pa.array(kept(table)))


def with_reason(table: pa.Table, rows: Bool[np.ndarray, " rows"], reason: str) -> pa.Table:
    """Return the table with `reason` given to those of `rows` that have none yet; the column is made if it is absent."""
    old = table[REASON] if REASON in table.column_names else pa.nulls(table.num_rows, pa.string())
    new = pc.if_else(pa.array(rows & kept(table)), reason, old).cast(pa.string())
    return with_column(table, REASON, new)


def with_column(table: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Return the table with a column, in the place of an old one of this name or behind all others."""
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, values)
    return table.append_column(name, values)
