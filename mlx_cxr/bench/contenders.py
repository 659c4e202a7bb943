"""A comparison: contenders whose outputs are held against a reference before any of them is timed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any, Literal

import numpy as np

from mlx_cxr.bench.timing import LEAST_ROUNDS, Timing, alternate, seconds_of
from mlx_cxr.ops.switch import fast_ops

log = logging.getLogger("mlx_cxr")

PRECISIONS = ("float32", "float16", "bfloat16")
_FEW_CALLS = 1 + LEAST_ROUNDS

stock_operations = partial(fast_ops, False)
"""Context: graphs that are built inside take MLX's own operations, not this package's paths for the CPU."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Attributes:
        name: unlike any other's of the section.
        framework: `mlx` or `torch`; `none` where neither does the work.
        device: such as `cpu`, `metal`, `cuda`, `mps`.
        precision: one of `PRECISIONS`, or of the data.
        call: does it once and returns when it is done on the device.
        difference: runs it once and returns how far its output is from the reference, which `tolerance` bounds; None
            where there is nothing to compare.
        tolerance: largest difference that is accepted.
        samples: images or studies of one call.
    """

    name: str
    framework: Literal["mlx", "torch", "none"]
    device: str
    precision: str
    call: Callable[[], object]
    difference: Callable[[], float] | None
    tolerance: float
    samples: int
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A contender's result.

    Attributes:
        status: `timed`; `wrong`, its output is off and it was not timed; `failed`, it raised; `left out`, it would have
            taken too long.
        note: the reason, or the contender's remark.
        flops: floating-point operations of one call, None where they are not counted.
        peak_gflops: measured peak of the same framework and precision.
        bound_seconds: least time of one call by the measured peak and bandwidth.
    """

    section: str
    name: str
    framework: str
    device: str
    precision: str
    samples: int
    status: Literal["timed", "wrong", "failed", "left out"]
    note: str = ""
    difference: float | None = None
    tolerance: float | None = None
    timing: Timing | None = None
    flops: float | None = None
    peak_gflops: float | None = None
    bound_seconds: float | None = None

    @property
    def ms_per_sample(self) -> float | None:
        """Median milliseconds per image or study."""
        return None if self.timing is None else 1000 * self.timing.median / self.samples

    @property
    def gflops(self) -> float | None:
        """GFLOP/s at the median."""
        return None if self.timing is None or self.flops is None else self.flops / self.timing.median / 1e9

    @property
    def share_of_peak(self) -> float | None:
        """`gflops` over the peak that a matrix product reached in the same run."""
        return None if self.gflops is None or not self.peak_gflops else self.gflops / self.peak_gflops

    def plain(self) -> dict[str, Any]:
        """Flat, JSON-ready; times in milliseconds per sample."""
        timing, scale = self.timing, 1000 / self.samples
        return {
            "section": self.section,
            "contender": self.name,
            "framework": self.framework,
            "device": self.device,
            "precision": self.precision,
            "batch": self.samples,
            "status": self.status,
            "ms_per_sample": self.ms_per_sample,
            "ms_lower_quartile": None if timing is None else scale * timing.lower,
            "ms_upper_quartile": None if timing is None else scale * timing.upper,
            "samples_per_second": None if timing is None else self.samples / timing.median,
            "rounds": None if timing is None else timing.rounds,
            "warmups": None if timing is None else timing.warmups,
            "gflops": self.gflops,
            "share_of_peak": self.share_of_peak,
            "bound_ms_per_sample": None if self.bound_seconds is None else scale * self.bound_seconds,
            "difference": self.difference,
            "tolerance": self.tolerance,
            "note": self.note,
        }


@dataclass(frozen=True)
class Work:
    """The work in one call of a section's contenders, for rates and bounds.

    Attributes:
        flops: floating-point operations of one call; None where they are not counted.
        peaks: (framework, precision) -> measured GFLOP/s.
        bound: (framework, precision) -> least seconds of one call; None where there is no bound.
    """

    flops: float | None = None
    peaks: dict[tuple[str, str], float] = field(default_factory=dict)
    bound: Callable[[str, str], float | None] = lambda framework, precision: None


def compare(
    section: str,
    contenders: Sequence[Contender],
    budget: float,
    work: Work | None = None,
    known: dict[str, float] | None = None,
    seed: int = 0,
) -> list[Row]:
    """Hold each contender against the reference, then time those that are right, in turn.

    Args:
        contenders: in the order of the table.
        budget: seconds of timing for all of them. One that needs more than half of it for a warm-up and three rounds
            is left out; whether it does is told from `known` before it is run at all, else from its first runs.
        known: contender -> seconds per sample in a smaller comparison of the same kind; updated with those timed here.

    Returns:
        A row per contender, in their order.
    """
    work, known = work or Work(), {} if known is None else known
    rows: dict[str, Row] = {}
    ready: dict[str, Contender] = {}
    for contender in contenders:
        row = _checked(section, contender, budget, work, known)
        rows[contender.name] = row
        if row.status == "timed":
            ready[contender.name] = contender
        else:
            log.info("%s: %s, batch %d: %s. %s", section, contender.name, contender.samples, row.status, row.note)
    timings = alternate({name: contender.call for name, contender in ready.items()}, budget, seed)
    for name, timing in timings.items():
        known[name] = timing.median / ready[name].samples
        rows[name] = replace(rows[name], timing=timing)
    return list(rows.values())


def _checked(section: str, contender: Contender, budget: float, work: Work, known: dict[str, float]) -> Row:
    kind = (contender.framework, contender.precision)
    facts = {
        "section": section,
        **{key: getattr(contender, key) for key in ("name", "framework", "device", "precision", "samples")},
        "flops": work.flops,
        "peak_gflops": work.peaks.get(kind),
        "bound_seconds": work.bound(*kind),
        "tolerance": None if contender.difference is None else contender.tolerance,
    }
    expected = known.get(contender.name, 0.0) * contender.samples
    if reason := _too_slow(expected, budget):
        return Row(**facts, status="left out", note=reason)
    began = perf_counter()
    try:
        difference = None
        if contender.difference is None:
            contender.call()
        else:
            difference = contender.difference()
    except Exception as error:  # one that does not work here must not take the others' figures with it
        message = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        return Row(**facts, status="failed", note=f"{type(error).__name__}: {message[:200]}")
    once = perf_counter() - began
    if difference is not None and not difference <= contender.tolerance:
        note = f"differs by {difference:.2g}, more than {contender.tolerance:.2g}: not timed"
        return Row(**facts, status="wrong", note=note, difference=difference)
    if _too_slow(once, budget):
        # The first run may have compiled for longer than the work takes.
        once = seconds_of(contender.call)
    if reason := _too_slow(once, budget):
        return Row(**facts, status="left out", note=reason, difference=difference)
    return Row(**facts, status="timed", note=contender.note, difference=difference)


def _too_slow(seconds: float, budget: float) -> str:
    if _FEW_CALLS * seconds <= budget / 2:
        return ""
    return f"one call takes about {seconds:.1f} s; more time (--minutes) would let it in"


def largest_difference(output: np.ndarray, reference: np.ndarray) -> float:
    """Largest absolute difference, as a share of the reference's largest value or of 1, whichever is larger.

    Returns:
        Infinity where the output is not finite or has another shape.
    """
    if output.shape != reference.shape or not np.isfinite(output).all():
        return float("inf")
    return float(np.abs(output - reference).max() / max(1.0, np.abs(reference).max()))


def fastest(rows: Sequence[Row], **wanted: object) -> Row | None:
    """The timed row with the least time per sample whose attributes are as wanted; None where there is none."""
    fitting = [
        row
        for row in rows
        if row.timing is not None and all(getattr(row, key) == value for key, value in wanted.items())
    ]
    return min(fitting, key=lambda row: row.ms_per_sample, default=None)
