from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from diptych.curate.entries import Balance, BalanceConfig
from diptych.curate.forecast import Seen, forecast, survey_rows

SEEN = Seen(
    1000,
    10,
    800,
    200_000,
    (90_000, 120_000, 130_000),
    24_000,
    20_000,
    30_000,
    4,
    dict.fromkeys(("keys", "counts", "draws", "shards"), 3.6),
)
COUNTS = np.array([800, 400, 8, 1])


def test_rows_of_a_survey_by_hand():
    assert survey_rows(np.array([4, 2, 0]), 4, 1) == pytest.approx(1.5)
    assert survey_rows(np.array([4, 2, 0]), 4, 2) == pytest.approx(1 + 0.75)
    assert survey_rows(np.array([4, 2, 1]), 4, 1_000_000) == pytest.approx(3)  # never more than there are


def test_rows_of_a_survey_are_those_that_balancing_makes():
    """Entries by Zipf's law, three of them per pair: what batches report together is the expectation."""
    rng, entries = np.random.default_rng(0), 400
    weights = 1 / np.arange(1, entries + 1)
    ids = [sorted(set(rng.choice(entries, 3, p=weights / weights.sum()).tolist())) for _ in range(4000)]
    table = pa.table({"matches": pa.array(ids, pa.list_(pa.int32()))})
    surveyor = Balance({"en": entries}, BalanceConfig())
    counts = np.bincount(np.concatenate(ids), minlength=entries)
    for batch in (100, 500, 4000):
        rows = sum(surveyor.survey(table.slice(start, batch)).num_rows for start in range(0, 4000, batch))
        if batch < 4000:  # batches of one small pool share its pairs out, so they differ a little less than drawn ones
            assert rows == pytest.approx(survey_rows(counts, 4000, batch) * 4000 / batch, rel=0.05)
    assert rows == np.count_nonzero(counts)


def test_a_forecast_for_the_pairs_that_were_seen_is_what_was_seen():
    keys, counts, draws, shards = forecast(SEEN, COUNTS, 1000)
    assert [stage.core_hours * 3600 for stage in (keys, counts, draws, shards)] == pytest.approx([3.6] * 4)
    assert (keys.read, keys.written) == (200_000, 90_000 + 24_000)
    assert keys.gathered == 2 * 24_000 and keys.told == 90  # counted once, then one round
    assert (counts.read, counts.gathered, counts.main_memory) == (90_000, 20_000, 32)
    assert (draws.read, draws.written) == (120_000, 130_000)
    assert (shards.read, shards.written) == (330_000, 30_000)


def test_what_grows_and_what_does_not():
    small, large = (forecast(SEEN, COUNTS, pairs) for pairs in (8_000_000, 80_000_000))
    for one, other in zip(small, large, strict=True):
        assert other.core_hours == pytest.approx(10 * one.core_hours) and other.read == pytest.approx(10 * one.read)
    assert large[0].gathered == pytest.approx(10 * small[0].gathered * 11 / 2)  # ten rounds instead of one
    assert large[0].main_memory == small[0].main_memory and large[1].told == small[1].told
    assert large[1].gathered == pytest.approx(10 * small[1].gathered, rel=0.001)
    unbatched = forecast(SEEN, COUNTS, 8_000_000, batch=800_000)
    assert unbatched[1].gathered < small[1].gathered / 10  # an entry is named once per batch


def test_without_keys_there_is_a_pass_less():
    stages = forecast(replace(SEEN, keys=0), COUNTS, 1000)
    assert [stage.name for stage in stages] == ["counts", "draws", "shards"] and stages[0].read == SEEN.source
