import pickle

import numpy as np
import pyarrow as pa
import pytest

from diptych.curate import verdicts
from diptych.curate.verdicts import Verdicts, in_drawn_order


@pytest.fixture
def found():
    return pa.table(
        {"group": ["b", "c", "d"], "reason": ["near", None, "dark"], "score": pa.array([0.5, 0.7, None], pa.float32())}
    )


@pytest.fixture
def table():
    return pa.table({"group": ["a", "b", "b", "c", "d", "d"], "reason": [None, None, "short", None, None, None]})


def test_rows_get_what_was_found_of_their_name(found, table):
    said = Verdicts(found).curate(table)
    assert said["reason"].to_pylist() == [None, "near", "short", None, "dark", "dark"]
    assert said["score"].to_pylist() == [None, 0.5, None, pytest.approx(0.7), None, None]
    assert said["group"] == table["group"]


def test_what_an_earlier_step_said_of_other_rows_stays(found, table):
    scored = table.append_column("score", pa.array([0.1, None, 0.2, None, None, None], pa.float32()))
    assert Verdicts(found).curate(scored)["score"].to_pylist() == pytest.approx([0.1, 0.5, 0.2, 0.7, None, None])


def test_tables_always_get_the_same_columns(found, table):
    columns = {
        tuple(Verdicts(found).curate(part).column_names) for part in (table, table.slice(0, 1), table.slice(0, 0))
    }
    assert columns == {("group", "reason", "score")}
    bare = Verdicts(found.slice(0, 0)).curate(table.select(["group"]))
    assert bare["reason"].null_count == 6 and bare["score"].null_count == 6


def test_a_copy_works_in_another_process(found, table):
    assert pickle.loads(pickle.dumps(Verdicts(found))).curate(table) == Verdicts(found).curate(table)


def test_equal_hashes_do_not_decide(found, table, monkeypatch):
    monkeypatch.setattr(verdicts, "row_hashes", lambda ids: np.zeros(len(ids), np.uint64))
    assert Verdicts(found).curate(table)["reason"].to_pylist() == [None, "near", "short", None, "dark", "dark"]
    names = in_drawn_order([found.slice(2), found.slice(0, 2)])["group"].to_pylist()
    assert names == ["b", "c", "d"]  # then the names do


def test_an_order_that_follows_from_the_names_alone(found):
    rng, names = np.random.default_rng(0), [f"n{number}" for number in range(50)]
    parts = [pa.table({"key": rng.permutation(names), "other": np.zeros(50)}) for _ in range(3)]
    orders = {tuple(in_drawn_order(some)["key"].to_pylist()) for some in (parts, parts[:1], parts[::-1])}
    assert len(orders) == 1 and orders != {tuple(names)} and len(set(*orders)) == 50
