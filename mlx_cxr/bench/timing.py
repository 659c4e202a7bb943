"""Fair clocks: every contender is warmed up, then all take turns in an order drawn anew each round.

A machine that is slowed by heat or by neighbours slows all of them, so ratios hold where single figures do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

WARMUPS = 10
LEAST_ROUNDS = 3
_MOST_ROUNDS = 300
_SHARE_OF_WARMUPS = 0.4


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and quartiles over `rounds` timed calls, after `warmups` that were not counted."""

    median: float
    lower: float
    upper: float
    rounds: int
    warmups: int


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def summary(seconds: list[float] | np.ndarray, warmups: int = 0) -> Timing:
    """Median and quartiles (linear interpolation) of timed calls."""
    lower, median, upper = np.percentile(np.asarray(seconds), [25, 50, 75])
    return Timing(float(median), float(lower), float(upper), len(seconds), warmups)


def alternate(
    calls: Mapping[str, Callable[[], object]],
    budget: float,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time calls in turn.

    Each call gets an equal share of the time. Slow ones take part in fewer rounds (three at least), spread over the
    whole time, and are warmed up less often than ten times where ten would take most of their share; what was done
    stands in the result.

    Args:
        calls: name -> something that returns when its work is done on the device.
        budget: seconds for all of them, warm-ups included; overrun where three rounds of each take longer.

    Returns:
        Name -> timing, in the order given.
    """
    share = budget / max(len(calls), 1)
    warmups, turns = {}, {}
    for name, call in calls.items():
        began = clock()
        call()
        once = clock() - began
        affordable = int(_SHARE_OF_WARMUPS * share / max(once, 1e-9))
        warmups[name] = min(WARMUPS, max(1, affordable))
        for _ in range(warmups[name] - 1):
            call()
        # The first call may have compiled something, so the last ones say what a turn takes.
        each = (clock() - began - once) / (warmups[name] - 1) if warmups[name] > 1 else once
        left = share - (clock() - began)
        turns[name] = min(_MOST_ROUNDS, max(LEAST_ROUNDS, int(left / max(each, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    rounds, names, rng = max(turns.values(), default=0), list(calls), np.random.default_rng(seed)
    for number in range(rounds):
        for place in rng.permutation(len(names)):
            name = names[place]
            if (number + 1) * turns[name] // rounds > number * turns[name] // rounds:
                began = clock()
                calls[name]()
                seconds[name].append(clock() - began)
    return {name: summary(seconds[name], warmups[name]) for name in calls}
