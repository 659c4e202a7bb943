"""Turns, warm-ups and quartiles, by a clock that only the calls move."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_cxr.bench.timing import LEAST_ROUNDS, WARMUPS, Timing, alternate, summary


class Workshop:
    """Calls that take a set time each, and a record of who was called when."""

    def __init__(self, **seconds: float) -> None:
        self.now, self.log = 0.0, []
        self.calls = {name: lambda name=name, each=each: self.work(name, each) for name, each in seconds.items()}

    def work(self, name: str, seconds: float) -> None:
        self.log.append(name)
        self.now += seconds

    def clock(self) -> float:
        return self.now


def test_quartiles_are_those_of_the_rounds():
    timing = summary([5.0, 1.0, 2.0, 4.0, 3.0], 7)
    assert (timing.lower, timing.median, timing.upper) == (2.0, 3.0, 4.0)
    assert (timing.rounds, timing.warmups) == (5, 7)
    assert summary([2.0]) == Timing(median=2.0, lower=2.0, upper=2.0, rounds=1, warmups=0)


def test_ten_warm_ups_then_everyone_in_every_round():
    shop = Workshop(a=1 / 64, b=1 / 64, c=1 / 64)
    timings = alternate(shop.calls, 3.0, clock=shop.clock)
    assert {timing.warmups for timing in timings.values()} == {WARMUPS}
    assert [timing.median for timing in timings.values()] == [1 / 64] * 3
    rounds = np.array(shop.log[3 * WARMUPS :]).reshape(-1, 3)
    assert len(rounds) == timings["a"].rounds >= 50
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) == 6, "each order of turns comes up"
    assert shop.now == pytest.approx(3.0, rel=0.05)


def test_a_slow_one_takes_part_in_fewer_rounds_spread_over_all_of_them():
    shop = Workshop(fast=0.01, slow=1.0)
    timings = alternate(shop.calls, 16.0, clock=shop.clock)
    assert timings["slow"].rounds == 5
    assert timings["slow"].warmups == 3, "ten would take more than its share"
    assert timings["fast"].warmups == WARMUPS
    assert timings["fast"].rounds > 100
    turns = np.flatnonzero(np.array(shop.log[WARMUPS + 3 :]) == "slow")
    assert np.diff(turns).min() > timings["fast"].rounds // 10
    assert turns[-1] > timings["fast"].rounds // 2


def test_three_rounds_at_least_even_without_time():
    shop = Workshop(a=2.0, b=3.0)
    timings = alternate(shop.calls, 0.1, clock=shop.clock)
    assert {timing.rounds for timing in timings.values()} == {LEAST_ROUNDS}
    assert {timing.warmups for timing in timings.values()} == {1}
    assert alternate({}, 1.0) == {}
