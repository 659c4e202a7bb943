"""Temperature scaling, and how far probabilities are from observed rates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

TEMPERATURE_RANGE = (0.05, 20.0)
"""Fitted temperatures stay within; a perfectly separated validation split would otherwise ask for 0."""

Binning = Literal["equal_width", "equal_mass"]


@dataclass(frozen=True)
class Calibration:
    """One temperature per label.

    Attributes:
        temperatures: float64 (L,), > 0; the calibrated probability is sigmoid(logit / temperature).
        sources: per label `validation`; `bound` where the optimum lies outside `TEMPERATURE_RANGE` and its
            nearest end was taken; `default` where validation lacked a class and 1 was taken.
    """

    temperatures: np.ndarray
    sources: tuple[str, ...]

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated probabilities, float64 (N, L) in [0, 1], of logits (N, L)."""
        return expit(np.asarray(logits, dtype=np.float64) / self.temperatures)


@dataclass(frozen=True)
class ReliabilityBins:
    """A reliability diagram of one label's probability of being positive.

    Attributes:
        edges: float64 (bins + 1,), increasing from 0 to 1.
        counts: int64 (bins,), targets per bin.
        mean_probability: float64 (bins,), NaN for an empty bin.
        observed_rate: float64 (bins,), share of positives, NaN for an empty bin.
    """

    edges: np.ndarray
    counts: np.ndarray
    mean_probability: np.ndarray
    observed_rate: np.ndarray

    @property
    def ece(self) -> float:
        """Mean distance of probability and rate, weighted by count, in [0, 1]; NaN without targets."""
        filled = self.counts > 0
        if not filled.any():
            return math.nan
        gaps = np.abs(self.mean_probability[filled] - self.observed_rate[filled])
        return float(np.average(gaps, weights=self.counts[filled]))


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> tuple[float, str]:
    """The temperature that minimizes the negative log-likelihood of one label (Guo et al., arXiv:1706.04599).

    The likelihood is concave in 1 / T, so its derivative has one root, which is found to machine precision.

    Args:
        logits: (N,) of the validation split.
        targets: (N,), each 1, 0 or NaN (left out).

    Returns:
        Temperature and its source, as `Calibration` describes them.
    """
    targets, logits = np.asarray(targets, dtype=np.float64), np.asarray(logits, dtype=np.float64)
    kept = ~np.isnan(targets)
    y, z = targets[kept], logits[kept]
    if len(np.unique(y)) < 2 or not z.any():
        return 1.0, "default"

    def slope(inverse: float) -> float:
        return float(np.dot(z, expit(inverse * z) - y))

    low, high = 1 / TEMPERATURE_RANGE[1], 1 / TEMPERATURE_RANGE[0]
    if slope(low) >= 0:
        return TEMPERATURE_RANGE[1], "bound"
    if slope(high) <= 0:
        return TEMPERATURE_RANGE[0], "bound"
    return 1 / brentq(slope, low, high, xtol=1e-14), "validation"


def fit_temperatures(logits: np.ndarray, targets: np.ndarray) -> Calibration:
    """`fit_temperature` of each column of logits and targets (N, L).

    Raises:
        ValueError: shapes differ, or a logit is not finite.
    """
    logits, targets = np.asarray(logits, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if logits.shape != targets.shape or logits.ndim != 2:
        raise ValueError(f"logits {logits.shape} and targets {targets.shape}: both must be (N, L)")
    if not np.isfinite(logits).all():
        row, column = np.argwhere(~np.isfinite(logits))[0]
        raise ValueError(f"row {row}, column {column}: logit {logits[row, column]} is not finite")
    fits = [fit_temperature(z, y) for z, y in zip(logits.T, targets.T, strict=True)]
    return Calibration(np.array([t for t, _ in fits]), tuple(source for _, source in fits))


def reliability(
    probabilities: np.ndarray, targets: np.ndarray, bins: int = 15, binning: Binning = "equal_width"
) -> ReliabilityBins:
    """Mean probability against observed rate, bin by bin (Naeini et al., AAAI 2015, for one label).

    Bins are on the probability of the finding, not on the confidence in the likelier answer: a label with 2 %
    positives is then judged by its positives too.

    Args:
        probabilities: (N,) in [0, 1].
        targets: (N,), each 1, 0 or NaN (left out).
        bins: at least 1. With `equal_mass` and tied probabilities fewer come back.
        binning: `equal_width` cuts [0, 1] in equal parts; `equal_mass` at the quantiles of these
            probabilities. A value on an edge belongs to the bin above, 1 to the last.

    Raises:
        ValueError: shapes differ, bins < 1, an unknown binning, or a probability outside [0, 1].
    """
    probabilities, targets = np.asarray(probabilities, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if probabilities.shape != targets.shape or probabilities.ndim != 1:
        raise ValueError(f"probabilities {probabilities.shape} and targets {targets.shape}: both must be (N,)")
    if bins < 1:
        raise ValueError(f"bins is {bins}; take at least 1")
    kept = ~np.isnan(targets)
    p, y = probabilities[kept], targets[kept]
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("a probability is outside [0, 1] or NaN; pass probabilities, not logits")
    edges = _edges(p, bins, binning)
    bin_of = np.clip(np.searchsorted(edges, p, side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(bin_of, minlength=len(edges) - 1)
    sums = [np.bincount(bin_of, weights=x, minlength=len(counts)) for x in (p, y)]
    means = [np.divide(x, counts, out=np.full(len(counts), np.nan), where=counts > 0) for x in sums]
    return ReliabilityBins(edges, counts, *means)


def expected_calibration_error(
    probabilities: np.ndarray, targets: np.ndarray, bins: int = 15, binning: Binning = "equal_width"
) -> float:
    """`reliability(...).ece`: in [0, 1], NaN without targets; biased upwards when bins hold few."""
    return reliability(probabilities, targets, bins, binning).ece


def _edges(p: np.ndarray, bins: int, binning: str) -> np.ndarray:
    if binning == "equal_width" or not p.size:
        return np.linspace(0, 1, bins + 1)
    if binning != "equal_mass":
        raise ValueError(f"binning {binning!r}: choose 'equal_width' or 'equal_mass'")
    inner = np.quantile(p, np.arange(1, bins) / bins, method="inverted_cdf")
    return np.unique(np.r_[0.0, inner, 1.0])
