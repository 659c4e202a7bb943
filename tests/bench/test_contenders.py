"""Who is timed and who is not, and what a row says."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from mlx_cxr.bench.contenders import Contender, Row, Work, compare, fastest, largest_difference
from mlx_cxr.bench.timing import summary


class Counted:
    """A call that takes `seconds`, the first time `more` than that, and counts itself."""

    def __init__(self, seconds: float = 0.0, more: float = 0.0) -> None:
        self.seconds, self.more, self.count = seconds, more, 0

    def __call__(self) -> None:
        time.sleep(self.seconds + (self.more if self.count == 0 else 0))
        self.count += 1


def contender(name: str, call: Counted, difference: object = 0.0, samples: int = 4) -> Contender:
    def compared() -> float:
        if isinstance(difference, Exception):
            raise difference
        call()
        return difference

    return Contender(name, "mlx", "cpu", "float32", call, compared, 1e-3, samples, "as it is")


def test_only_what_is_right_is_timed():
    right, off, no_number, broken = Counted(), Counted(), Counted(), Counted()
    rows = compare(
        "s",
        [
            contender("right", right, 1e-3),
            contender("off", off, 2e-3),
            contender("nan", no_number, math.nan),
            contender("broken", broken, RuntimeError("\n no kernel for this\nmore")),
        ],
        0.05,
    )
    assert [row.name for row in rows] == ["right", "off", "nan", "broken"]
    assert [row.status for row in rows] == ["timed", "wrong", "wrong", "failed"]
    assert rows[0].timing.rounds >= 3
    assert rows[0].note == "as it is"
    assert (off.count, no_number.count, broken.count) == (1, 1, 0)
    assert rows[1].timing is None
    assert "0.002, more than 0.001" in rows[1].note
    assert rows[3].note == "RuntimeError: no kernel for this"


def test_what_would_take_too_long_is_left_out():
    slow, hopeless, compiled = Counted(0.06), Counted(), Counted(0.0, more=0.2)
    known = {"hopeless": 10.0}
    three = [contender("slow", slow), contender("hopeless", hopeless), contender("compiled", compiled)]
    rows = compare("s", three, 0.2, None, known)
    assert [row.status for row in rows] == ["left out", "left out", "timed"]
    assert hopeless.count == 0, "its time in a smaller batch told"
    assert slow.count == 2, "a second run decides"
    assert "40.0 s" in rows[1].note
    assert rows[1].difference is None
    assert set(known) == {"hopeless", "compiled"}
    assert known["compiled"] < 0.01


def test_what_has_nothing_to_compare_is_run_once_before_it_is_let_in():
    slow = Counted(0.1)
    made = compare("s", [Contender("slow", "mlx", "cpu", "float32", slow, None, 0.0, 1)], 0.2)[0]
    assert (made.status, made.difference, made.tolerance) == ("left out", None, None)
    assert slow.count == 2


def row(seconds: list[float], **facts: object) -> Row:
    given = {"section": "s", "name": "n", "framework": "mlx", "device": "cpu", "precision": "float32", "samples": 8}
    return Row(**{**given, "status": "timed", "timing": summary(seconds, 10), **facts})


def test_a_row_gives_rates_per_sample():
    made = row([0.02, 0.04, 0.03], flops=6e9, peak_gflops=400.0, bound_seconds=0.01)
    assert made.ms_per_sample == pytest.approx(3.75)
    assert made.gflops == pytest.approx(200)
    assert made.share_of_peak == pytest.approx(0.5)
    plain = made.plain()
    assert plain["ms_lower_quartile"] == pytest.approx(25 / 8)
    assert plain["ms_upper_quartile"] == pytest.approx(35 / 8)
    assert plain["samples_per_second"] == pytest.approx(8 / 0.03)
    assert plain["bound_ms_per_sample"] == pytest.approx(1.25)
    assert (plain["rounds"], plain["warmups"], plain["batch"]) == (3, 10, 8)
    untimed = row([1.0], timing=None, status="wrong", flops=6e9).plain()
    assert [untimed[key] for key in ("ms_per_sample", "gflops", "share_of_peak", "rounds")] == [None] * 4


def test_work_is_given_by_framework_and_precision():
    work = Work(2e9, {("mlx", "float32"): 100.0}, lambda framework, precision: 0.5 if framework == "mlx" else None)
    made = compare("s", [contender("a", Counted())], 0.02, work)[0]
    assert (made.flops, made.peak_gflops, made.bound_seconds) == (2e9, 100.0, 0.5)


def test_differences_are_in_multiples_of_the_largest_value():
    reference, small = np.array([[0.5, -4.0]]), np.array([[0.1, -0.4]])
    assert largest_difference(reference + np.array([[0.0, 0.2]]), reference) == pytest.approx(0.05)
    assert largest_difference(small + np.array([[0.1, 0.0]]), small) == pytest.approx(0.1), "of 1 where all is small"
    assert largest_difference(np.array([[0.5, np.nan]]), reference) == math.inf
    assert largest_difference(reference[0], reference) == math.inf


def test_the_fastest_of_those_that_were_timed():
    rows = [
        row([0.5], name="slow"),
        row([0.1], name="fast"),
        row([0.01], name="other", framework="torch"),
        row([0.001], name="untimed", timing=None),
    ]
    assert fastest(rows, framework="mlx").name == "fast"
    assert fastest(rows, name="untimed") is None
