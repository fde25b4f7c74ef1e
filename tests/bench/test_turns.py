import math

import numpy as np
import pytest

from diptych.bench.turns import Contender, Turn, best, median, ratio, take_turns, timed


def test_contenders_take_turns_and_every_second_round_is_reversed():
    order: list[str] = []

    def contender(name: str) -> Contender:
        def step() -> Turn:
            order.append(name)
            return Turn(float(len(order)))

        return Contender(name, step)

    seconds = take_turns([contender("a"), contender("b")], 2, skip=1)
    assert "".join(order) == "abbaab"
    assert seconds == {"a": [4.0, 5.0], "b": [3.0, 6.0]}  # the first round does not count


def test_a_timed_step_gives_time_and_value():
    turn = timed("x", lambda: sum(range(100_000))).step()
    assert turn.value == 4_999_950_000 and 0 < turn.seconds < 1


def test_ratio_is_taken_within_a_turn():
    busy = [1.0, 1.0, 10.0, 1.0, 10.0, 1.0, 1.0]  # a machine that is slow for two turns
    found = ratio([2 * t for t in busy], busy)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(("count", "low", "high"), [(1, 0, 0), (5, 0, 4), (6, 0, 5), (9, 1, 7), (20, 5, 14)])
def test_median_interval_by_order_statistics(count, low, high):
    found = median([float(i) for i in range(count)])  # values are ranks; ends from tables of the sign test
    assert (found.low, found.high) == (low, high) and found.value == (count - 1) / 2


def test_median_interval_covers():
    rng = np.random.default_rng(0)
    hits = [median(rng.exponential(size=15).tolist()) for _ in range(2000)]
    covered = np.mean([found.low <= math.log(2) <= found.high for found in hits])
    assert 0.95 <= covered <= 0.99


def test_best_has_the_smallest_median():
    assert best({"a": [3.0, 1.0, 2.0], "b": [1.9, 1.9, 9.0]}, ["a", "b"]) == "b"
    assert best({"a": [1.0]}, []) is None


def test_a_slow_contender_takes_part_in_some_turns_only():
    asked: list[str] = []

    def contender(name: str, seconds: float, every: int) -> Contender:
        return Contender(name, lambda: Turn((asked.append(name), seconds)[1]), every)

    seconds = take_turns([contender("quick", 1.0, 1), contender("slow", 8.0, 3)], 6, skip=3)
    assert asked.count("quick") == 9 and asked.count("slow") == 3
    assert [math.isnan(taken) for taken in seconds["slow"]] == [False, True, True, False, True, True]
    assert ratio(seconds["slow"], seconds["quick"]).value == 8.0
    assert best(seconds, ["slow", "quick"]) == "quick"
