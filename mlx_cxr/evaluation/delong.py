"""Is one model's ROC-AUC different from another's on the same studies? DeLong's test by patient, and Holm's correction.

DeLong, DeLong and Clarke-Pearson (Biometrics 1988) give the variance of a difference of correlated AUCs when studies
are independent of each other. Those of one patient are not; Obuchowski (Biometrics 1997) adds up DeLong's components
within each patient first. With one study per patient the two are the same. Components come from midranks, as Sun and
Xu (IEEE Signal Processing Letters 2014) showed, in O(N log N).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, rankdata

_ROUNDING = 1e-12
"""A standard error below this is that of components which are all alike, up to rounding."""


@dataclass(frozen=True)
class PairedTest:
    """A difference of two ROC-AUCs, and how surprising it would be if there were none.

    Attributes:
        difference: first minus second, in [-1, 1].
        standard_error: of the difference.
        p_value: two-sided, by the normal approximation, which is rough with few patients of a class; 1 where both
            models rank alike; NaN where undefined.
    """

    difference: float
    standard_error: float
    p_value: float


def paired_delong(targets: np.ndarray, first: np.ndarray, second: np.ndarray, patient_ids: np.ndarray) -> PairedTest:
    """Test the difference of two models' ROC-AUCs for one label.

    Args:
        targets: (N,), each 1, 0 or NaN (left out).
        first: (N,) scores of one model, finite; ranked, so logits do.
        second: (N,) scores of the other, on the same studies.
        patient_ids: (N,), whose studies may depend on each other. All different: DeLong's own test.

    Returns:
        The test. All NaN where a class is missing; error and p-value NaN where fewer than two patients have a class,
        and the p-value where the components do not vary although the AUCs differ.

    Raises:
        ValueError: lengths differ, a target is not 1, 0 or NaN, or a score is not finite.
    """
    targets = np.asarray(targets, dtype=np.float64)
    scores = [np.asarray(x, dtype=np.float64) for x in (first, second)]
    patient_ids = np.asarray(patient_ids)
    if {x.shape for x in (*scores, patient_ids)} != {targets.shape} or targets.ndim != 1:
        shapes = ", ".join(str(x.shape) for x in (targets, *scores, patient_ids))
        raise ValueError(f"targets, first, second and patient_ids have shapes {shapes}; all must be (N,)")
    kept = ~np.isnan(targets)
    y = targets[kept]
    if not np.isin(y, (0, 1)).all() or not all(np.isfinite(x).all() for x in scores):
        raise ValueError("a target is not 1, 0 or NaN, or a score is not finite")
    positive = y == 1
    if positive.all() or not positive.any():
        return PairedTest(math.nan, math.nan, math.nan)
    (v10, v01), (w10, w01) = (_components(x[kept], positive) for x in scores)
    difference = float(v10.mean() - w10.mean())
    error = _clustered_error(v10 - w10, v01 - w01, positive, patient_ids[kept])
    if math.isnan(error):
        p_value = math.nan
    elif error < _ROUNDING:
        p_value = 1.0 if abs(difference) < _ROUNDING else math.nan
    else:
        p_value = float(2 * norm.sf(abs(difference) / error))
    return PairedTest(difference, error, p_value)


def holm(p_values: np.ndarray) -> np.ndarray:
    """P-values adjusted for how many there are (Holm, Scandinavian Journal of Statistics 1979).

    Rejecting those below 0.05 keeps the chance of any false rejection at 0.05, however the tests depend on each other.

    Args:
        p_values: (K,) in [0, 1]; NaN stands for no test, is not counted and stays NaN.

    Returns:
        float64 (K,) in [0, 1], in the order given.
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p_values.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p_values))
    order = tested[np.argsort(p_values[tested], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p_values[order]), 1.0)
    return adjusted


def _components(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each positive's share of negatives below it (m,), each negative's share of positives above it (n,); ties half."""
    ranks = rankdata(scores)
    m, n = int(positive.sum()), int((~positive).sum())
    v10 = (ranks[positive] - rankdata(scores[positive])) / n
    v01 = 1 - (ranks[~positive] - rankdata(scores[~positive])) / m
    return v10, v01


def _clustered_error(v10: np.ndarray, v01: np.ndarray, positive: np.ndarray, patient_ids: np.ndarray) -> float:
    """Obuchowski's standard error from components of the difference, which is linear in them."""
    patient_of_row = np.unique(patient_ids, return_inverse=True)[1]
    patients = int(patient_of_row.max()) + 1
    # Both classes' components have the same mean, the difference itself.
    sums = []
    for values, rows in ((v10, patient_of_row[positive]), (v01, patient_of_row[~positive])):
        centred = np.bincount(rows, weights=values - values.mean(), minlength=patients)
        sums.append((centred / len(values), len(np.unique(rows))))
    (a, with_positive), (b, with_negative) = sums
    if min(with_positive, with_negative) < 2:
        return math.nan

    def unbiased(count: int) -> float:
        return count / (count - 1)

    variance = unbiased(with_positive) * (a @ a) + unbiased(with_negative) * (b @ b) + unbiased(patients) * 2 * (a @ b)
    return math.sqrt(max(variance, 0.0))
