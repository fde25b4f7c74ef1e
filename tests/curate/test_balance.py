import json
import math
import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from diptych.curate.balance import (
    count_entries,
    entry_probabilities,
    expected_size,
    keep_by_entries,
    keep_probabilities,
    language_thresholds,
    row_uniforms,
    tail_share,
    threshold_for_share,
    threshold_for_size,
)
from diptych.errors import ConfigError, DataError

ENTRIES = 6
LISTS = st.lists(st.lists(st.integers(0, ENTRIES - 1), unique=True).map(sorted), max_size=30)


def lists(rows: list[list[int]]) -> pa.ListArray:
    return pa.array(rows, pa.list_(pa.int32()))


@pytest.mark.data
class TestOfficialNumbers:
    @pytest.fixture
    def numbers(self, golden):
        return golden("metaclip", "v1")

    @pytest.fixture
    def matches(self, numbers):
        return pa.ListArray.from_arrays(
            pa.array(numbers["match_offsets"], pa.int32()), pa.array(numbers["match_ids"], pa.int32())
        )

    def test_counts_shares_and_thresholds(self, numbers, matches):
        counts = count_entries(matches, 128)
        assert_array_equal(counts, numbers["entry_count"])
        for threshold in numbers["t_values"].tolist():
            assert_array_equal(entry_probabilities(counts, threshold), numbers[f"prob_t{threshold}"])
            assert tail_share(counts, threshold) == numbers[f"tail_share_t{threshold}"]
        found = [threshold_for_share(counts, share) for share in numbers["shares"].tolist()]
        assert found == numbers["t_from_share"].tolist()

    @pytest.mark.parametrize("seed", [0, 1])
    @pytest.mark.parametrize("threshold", [1, 5, 20, 1000])
    def test_draws(self, numbers, matches, threshold, seed):
        probabilities = entry_probabilities(count_entries(matches, 128), threshold)
        # As the official loop draws: entry by entry, and no further once one of them keeps the text.
        draws = random.Random(seed)
        kept = [any(draws.random() < probabilities[entry] for entry in ids) for ids in matches.to_pylist()]
        assert kept == numbers[f"keep_t{threshold}_seed{seed}"].tolist()
        assert draws.random() == numbers[f"next_uniform_t{threshold}_seed{seed}"]
        # As its vectorised form does: one draw for every match.
        uniforms = np.random.RandomState(seed).random_sample(len(matches.values))
        found = np.flatnonzero(keep_by_entries(matches, probabilities, uniforms))
        assert_array_equal(found, numbers[f"kept_numpy_t{threshold}_seed{seed}"])

    def test_without_a_threshold_all_that_match_are_kept(self, numbers, matches):
        probabilities = entry_probabilities(count_entries(matches, 128), math.inf)
        assert_array_equal(np.flatnonzero(keep_probabilities(matches, probabilities)), numbers["kept_numpy_inf"])

    def test_the_script(self, golden, data, numbers, matches):
        texts = json.loads((data.parent / "golden" / "metaclip.json").read_text(encoding="utf-8"))["v1"]
        script = texts["script"]
        draws = random.Random(script["seed"])
        probabilities = entry_probabilities(count_entries(matches, 128), script["t"])
        owner = [key for key, count in texts["records"] for _ in range(count)]
        kept = [any(draws.random() < probabilities[entry] for entry in ids) for ids in matches.to_pylist()]
        assert [key for key, stays in zip(owner, kept, strict=True) if stays] == script["curated_uuids"]


def test_two_entries_by_hand():
    assert_allclose(
        keep_probabilities(lists([[0, 1], [0], [], [1], [2]]), np.array([0.5, 0.2, 1.0])), [0.6, 0.5, 0, 0.2, 1]
    )


@given(LISTS, st.floats(1, 40))
def test_chances_are_the_product_over_entries(rows, threshold):
    counts = count_entries(lists(rows), ENTRIES)
    assert counts.tolist() == [sum(entry in row for row in rows) for entry in range(ENTRIES)]
    probabilities = entry_probabilities(counts, threshold)
    assert_allclose(probabilities, [min(1, threshold / max(n, 1e-9)) for n in counts])
    expected = [1 - math.prod(1 - probabilities[entry] for entry in row) for row in rows]
    assert_allclose(keep_probabilities(lists(rows), probabilities), expected, atol=1e-15)
    assert expected_size([lists(rows)], counts, threshold) <= np.minimum(counts, threshold).sum() + 1e-9


@given(LISTS, st.integers(0, 30))
def test_shards_add_up_and_slices_are_their_rows(rows, cut):
    whole, first, second = (
        count_entries(part, ENTRIES) for part in (lists(rows), lists(rows)[:cut], lists(rows)[cut:])
    )
    assert_array_equal(first + second, whole)
    probabilities = entry_probabilities(whole, 2)
    both = pa.chunked_array([lists(rows)[:cut], lists(rows)[cut:]])
    assert_array_equal(keep_probabilities(both, probabilities), keep_probabilities(lists(rows), probabilities))


def test_no_rows_at_all():
    for empty in (lists([]), pa.chunked_array([], pa.list_(pa.int32()))):
        assert count_entries(empty, 2).tolist() == [0, 0]
        assert len(keep_probabilities(empty, np.ones(2))) == 0


def test_one_draw_per_text_and_one_per_match_keep_equally_many():
    rows, probabilities, n = lists([[0, 1]] * 100_000), np.array([0.5, 0.2]), 100_000
    per_match = keep_by_entries(rows, probabilities, np.random.default_rng(0).random(2 * n)).mean()
    per_text = (row_uniforms(np.arange(n), 0) < keep_probabilities(rows, probabilities)).mean()
    sigma = math.sqrt(0.6 * 0.4 / n)
    assert abs(per_match - 0.6) < 4 * sigma and abs(per_text - 0.6) < 4 * sigma


class TestThresholds:
    COUNTS = np.array([1, 2, 3, 4, 90])

    def test_share_and_threshold_are_two_views_of_one_knob(self):
        assert tail_share(self.COUNTS, 4) == 0.06
        assert threshold_for_share(self.COUNTS, 0.06) == 3  # 1 + 2 + 3 of 100 come to 6 %
        assert tail_share(self.COUNTS, 91) == 1 and threshold_for_share(self.COUNTS, 1.0) == 90

    def test_a_size_is_solved_for(self):
        rng = np.random.default_rng(0)
        rows = lists([sorted(set(rng.zipf(1.5, 3).clip(max=ENTRIES) - 1)) for _ in range(500)])
        counts = count_entries(rows, ENTRIES)
        for size in (40.0, 123.4, 300.0, 500.0):
            threshold = threshold_for_size([rows[:100], rows[100:]], counts, size)
            assert_allclose(expected_size([rows], counts, threshold), size, rtol=1e-12)
        with pytest.raises(ConfigError, match=r"between .* texts \(threshold 1\) and 500 .*, not 501"):
            threshold_for_size([rows], counts, 501)

    def test_other_languages_take_the_tail_share_of_the_anchor(self):
        counts = {"en": self.COUNTS, "de": 2 * self.COUNTS, "fr": np.zeros(5, np.int64)}
        assert language_thresholds(counts, 4) == {"en": 4.0, "de": 6.0, "fr": 4.0}
        assert language_thresholds(counts, 1) == {"en": 1.0, "de": 1.0, "fr": 1.0}  # no tail at all
        with pytest.raises(ConfigError, match="'it', which is not among en, de, fr"):
            language_thresholds(counts, 4, anchor="it")

    def test_what_cannot_be(self):
        with pytest.raises(ConfigError, match=r"at least 1, not 0\.5"):
            entry_probabilities(self.COUNTS, 0.5)
        with pytest.raises(ConfigError, match="at least 1, not nan"):
            entry_probabilities(self.COUNTS, math.nan)
        with pytest.raises(ConfigError, match=r"in \(0, 1\], not at 0"):
            threshold_for_share(self.COUNTS, 0)
        with pytest.raises(DataError, match="No text has an entry"):
            threshold_for_share(np.zeros(3, np.int64), 0.06)
        with pytest.raises(DataError, match="entries 0 to 7; there are 6"):
            count_entries(lists([[0, 7]]), ENTRIES)


class TestRowUniforms:
    KEYS = pa.array([f"https://example.org/{'x' * (i % 11)}{i}.jpg" for i in range(4096)])

    def test_order_and_shards_change_nothing(self):
        whole = row_uniforms(self.KEYS, 7)
        order = np.random.default_rng(0).permutation(len(whole))
        assert_array_equal(row_uniforms(self.KEYS.take(pa.array(order)), 7), whole[order])
        shards = pa.chunked_array([self.KEYS[:1000], self.KEYS[1000:]])
        assert_array_equal(row_uniforms(shards, 7), whole)
        assert_array_equal(row_uniforms(self.KEYS.cast(pa.large_string()), 7), whole)
        assert_array_equal(row_uniforms(pa.array(range(9)), 7), row_uniforms(np.arange(9), 7))

    def test_they_stay_what_they_are(self):
        found = [row_uniforms(pa.array(ids), 7)[0] for ids in ([0], [123], ["a"], ["longer than eight bytes"])]
        assert found == [0.7916042979842841, 0.9475584404235953, 0.41797480981004975, 0.142910207783709]

    @pytest.mark.parametrize("ids", [np.arange(4096), KEYS], ids=["numbers", "strings"])
    def test_they_are_uniform_and_know_nothing_of_each_other(self, ids):
        one, again, other = row_uniforms(ids, 0), row_uniforms(ids, 0, draw=1), row_uniforms(ids, 1)
        assert one.min() >= 0 and one.max() < 1 and len(np.unique(one)) == 4096
        chi = sum((np.histogram(one, 64, (0, 1))[0] - 64) ** 2 / 64)
        assert 29 < chi < 115  # 63 degrees of freedom, 1 in 10,000 each way
        for second in (again, other, np.roll(one, 1)):
            assert abs(np.corrcoef(one, second)[0, 1]) < 4 / 64

    def test_strings_that_differ_in_little(self):
        near = ["", "\0", "\0\0", "a", "a\0", "12345678", "12345678\0", "123456789"]
        assert len(set(row_uniforms(pa.array(near), 0).tolist())) == len(near)

    def test_a_higher_threshold_keeps_what_a_lower_one_keeps(self):
        rows = lists([[0], [1], [0, 1]] * 300)
        counts = count_entries(rows, 2)
        kept = [
            row_uniforms(np.arange(900), 0) < keep_probabilities(rows, entry_probabilities(counts, t)) for t in (5, 80)
        ]
        assert (kept[0] <= kept[1]).all() and 0 < kept[0].sum() < kept[1].sum()

    def test_ids_that_are_missing(self):
        with pytest.raises(DataError, match="1 rows have no id"):
            row_uniforms(pa.array(["a", None]), 0)
