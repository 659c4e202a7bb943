"""Intervals by resampling patients, whose images and studies are not independent of each other.

Resampling is separate from what is measured: two models that are scored on the same patients with the same
seed see the same resamples, so that their difference can be taken replicate by replicate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TypedDict

import numpy as np

from mlx_cxr.evaluation.metrics import roc_auc_per_label, weighted_auc

LEVEL = 0.95
MIN_REPLICATES = 40
"""Fewer give no interval: a 2.5 % percentile of fewer than 40 values lies beyond the outermost of them."""

_BLOCK_BYTES = 64 * 2**20


class IntervalEntry(TypedDict):
    """An interval in a result file."""

    value: float | None
    low: float | None
    high: float | None
    """The estimate, and its 95 % percentile interval from resampling patients."""
    replicates: int
    drawn: int
    """Number of valid resamples, and of all: one without a positive, say, has no ROC-AUC."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its percentile interval.

    Attributes:
        value: the estimate on the data themselves.
        low: 2.5 % percentile of the replicates; NaN with fewer than `MIN_REPLICATES` valid ones.
        high: 97.5 % percentile.
        replicates: number of valid ones (not NaN).
        drawn: number of all.
    """

    value: float
    low: float
    high: float
    replicates: int
    drawn: int

    def plain(self) -> IntervalEntry:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class PatientResamples:
    """Number of times that each patient is drawn in each of B resamples with replacement.

    Attributes:
        patients: (P,) str, sorted; so the draws depend on the set of patients and the seed, not on row order.
        patient_of_row: int64 (N,), index into `patients`.
        counts: uint16 (B, P); each row sums to P.
        seed: of the draws.
    """

    patients: np.ndarray
    patient_of_row: np.ndarray
    counts: np.ndarray
    seed: int

    def row_weights(self) -> Iterator[np.ndarray]:
        """Yield float64 (b, N) blocks, in order: how often each row is drawn, as often as its patient is."""
        rows = max(1, _BLOCK_BYTES // (8 * max(1, len(self.patient_of_row))))
        for start in range(0, len(self.counts), rows):
            yield self.counts[start : start + rows].astype(np.float64)[:, self.patient_of_row]


def patient_resamples(patient_ids: np.ndarray, samples: int, seed: int) -> PatientResamples:
    """Draw the resamples that any number of statistics and models can share.

    Args:
        patient_ids: (N,) str, the patient of each row.
        samples: B; 0 gives none, and every interval is then NaN.
        seed: of `numpy.random.default_rng`.

    Raises:
        ValueError: no rows, or a negative number of samples.
    """
    if samples < 0:
        raise ValueError(f"{samples} bootstrap samples; take 0 (no intervals) or more")
    patients, patient_of_row = np.unique(np.asarray(patient_ids, dtype=str), return_inverse=True)
    if not len(patients):
        raise ValueError("there are no rows to resample; is the split empty?")
    rng = np.random.default_rng(seed)
    counts = np.empty((samples, len(patients)), dtype=np.uint16)
    for row in counts:
        row[:] = np.bincount(rng.integers(len(patients), size=len(patients)), minlength=len(patients))
    return PatientResamples(patients, patient_of_row, counts, seed)


def patient_bootstrap(statistic: Callable[[np.ndarray], np.ndarray], resamples: PatientResamples) -> np.ndarray:
    """Replicates of a statistic.

    Args:
        statistic: from row weights (b, N) to values (b, ...), one per resample, NaN where undefined.
        resamples: of the patients of the N rows.

    Returns:
        float64 (B, ...).
    """
    blocks = [np.asarray(statistic(weights), dtype=np.float64) for weights in resamples.row_weights()]
    if blocks:
        return np.concatenate(blocks)
    one = np.asarray(statistic(np.ones((1, len(resamples.patient_of_row)))))
    return np.empty((0, *one.shape[1:]))


def percentile_interval(value: float, replicates: np.ndarray) -> Interval:
    """95 % percentile interval (Efron and Tibshirani 1993, chapter 13) from (B,) replicates.

    Replicates that are NaN are dropped and counted. An undefined value has no interval, whatever its
    replicates.
    """
    valid = replicates[~np.isnan(replicates)]
    if math.isnan(value) or len(valid) < MIN_REPLICATES:
        return Interval(value, math.nan, math.nan, len(valid), len(replicates))
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(valid, [tail, 100 - tail])
    return Interval(value, float(low), float(high), len(valid), len(replicates))


def macro_interval(values: np.ndarray, replicates: np.ndarray) -> Interval:
    """Mean over the labels whose value is defined, with its interval.

    A replicate in which one of those labels is undefined is left out (and counted): without it, the mean would
    be over other labels.

    Args:
        values: (L,), NaN where undefined.
        replicates: (B, L).
    """
    defined = ~np.isnan(values)
    if not defined.any():
        return percentile_interval(math.nan, np.empty(0))
    return percentile_interval(float(values[defined].mean()), replicates[:, defined].mean(axis=1))


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(b,) means of values (N,) under weights (b, N), NaN values left out; NaN where nothing is drawn."""
    kept = ~np.isnan(values)
    total = weights[:, kept].sum(axis=1)
    return np.divide(weights[:, kept] @ values[kept], total, out=np.full(len(weights), np.nan), where=total > 0)


def auc_intervals(
    targets: np.ndarray, scores: np.ndarray, resamples: PatientResamples
) -> tuple[np.ndarray, np.ndarray]:
    """ROC-AUC per label (L,), and its replicates (B, L); NaN where a column, or a resample of it, lacks a class."""

    def statistic(weights: np.ndarray) -> np.ndarray:
        return np.stack([weighted_auc(y, s, weights) for y, s in zip(targets.T, scores.T, strict=True)], axis=1)

    return roc_auc_per_label(targets, scores), patient_bootstrap(statistic, resamples)
