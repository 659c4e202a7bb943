"""Conformal prediction, class by class: "present" and "absent", as far as a probability leaves them plausible.

Each finding is a problem of two classes of its own, and each class has its own quantile (label-conditional or Mondrian
split conformal prediction: Vovk, Gammerman and Shafer, 2005, section 4.5; Vovk, "Conditional validity of inductive
conformal predictors", 2012; Sadinle, Lei and Wasserman, 2019; Angelopoulos and Bates, arXiv:2107.07511). The
non-conformity of a class is one minus its probability. A class stays plausible as long as its conformal p-value is
above alpha; for a study that is exchangeable with the calibration studies of its class, its true class stays plausible
with probability at least 1 - alpha, for positives and for negatives alike, however rare they are and however badly the
model ranks them. A model that ranks badly pays in studies of which both classes stay plausible.

Only the order of the probabilities matters, so that temperature scaling changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy.stats import betabinom

from mlx_cxr.evaluation.bootstrap import LEVEL


@dataclass(frozen=True)
class ConformalBands:
    """Bounds beyond which a probability rules a class out, one pair per label.

    `lower` may lie below `upper` (between them both classes are plausible) or above it (between them neither is).

    Attributes:
        alpha: share of each class for which the true class may be ruled out, in (0, 1).
        lower: float64 (L,) in [0, 1]; a probability < this rules "present" out. 0, so that nothing is, where there
            are too few positives.
        upper: float64 (L,) in [0, 1]; a probability > this rules "absent" out. 1, so that nothing is, where there are
            too few negatives.
        positives: int64 (L,), calibration studies that have the finding.
        negatives: int64 (L,), those that have not.
    """

    alpha: float
    lower: np.ndarray
    upper: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray

    @property
    def needed(self) -> int:
        """Calibration studies of a class needed for the class to be ruled out at all: ceil(1/alpha) - 1."""
        return math.ceil(1 / _exact(self.alpha)) - 1

    @property
    def fitted(self) -> np.ndarray:
        """bool (L,): there are enough studies of both classes for either to be ruled out."""
        return np.minimum(self.positives, self.negatives) >= self.needed

    def present_plausible(self, probabilities: np.ndarray) -> np.ndarray:
        """bool (N, L): the conformal sets of probabilities (N, L) hold "present"."""
        return probabilities >= self.lower

    def absent_plausible(self, probabilities: np.ndarray) -> np.ndarray:
        """bool (N, L): the conformal sets of probabilities (N, L) hold "absent"."""
        return probabilities <= self.upper


def fit_bands(probabilities: np.ndarray, targets: np.ndarray, alpha: float) -> ConformalBands:
    """Bands of each column from the calibration studies: validation, never test.

    Args:
        probabilities: (N, L) in [0, 1].
        targets: (N, L), each 1, 0 or NaN (left out).
        alpha: in (0, 1).

    Raises:
        ValueError: shapes differ, or alpha, a target or a probability is out of range.
    """
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if p.ndim != 2 or p.shape != y.shape:
        raise ValueError(f"probabilities {p.shape} and targets {y.shape}: both must be (N, L)")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; it lies between 0 and 1")
    if not (np.isnan(y) | (y == 0) | (y == 1)).all():
        raise ValueError("a target is not 1, 0 or NaN; apply one of labels.SCORING_PROTOCOLS to raw labels first")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("a probability is outside [0, 1] or NaN; pass probabilities, not logits")
    ordered = [(np.sort(x[t == 1]), np.sort(x[t == 0])) for x, t in zip(p.T, y.T, strict=True)]
    positives, negatives = (np.array([len(pair[i]) for pair in ordered], dtype=np.int64) for i in (0, 1))
    lower, upper = np.zeros(len(ordered)), np.ones(len(ordered))
    for k, (with_it, without) in enumerate(ordered):
        if (rank := quantile_rank(len(with_it), alpha)) <= len(with_it):
            lower[k] = with_it[-rank]
        if (rank := quantile_rank(len(without), alpha)) <= len(without):
            upper[k] = without[rank - 1]
    return ConformalBands(alpha, lower, upper, positives, negatives)


def quantile_rank(count: int, alpha: float) -> int:
    """ceil((count + 1) (1 - alpha)) for the decimal that alpha is written as; above `count` where that is too small.

    In floating point (249 + 1) (1 - 0.18) is above 205, and its ceiling one too many.
    """
    return count + 1 - math.floor((count + 1) * _exact(alpha))


def coverage_range(count: int, alpha: float, tested: int) -> tuple[float, float]:
    """Central 95 % range of the share of `tested` studies of a class that keep their true class.

    Over draws of `count` calibration studies and of those tested, the number that keeps it is beta-binomial with
    parameters k and count + 1 - k, k = `quantile_rank`, if all are exchangeable and no probabilities are equal (Vovk,
    2012; Angelopoulos and Bates, section 3.2). Equal ones only raise it. (1, 1) where the class is never ruled out;
    NaN without a study tested.
    """
    rank = quantile_rank(count, alpha)
    if not tested:
        return math.nan, math.nan
    if rank > count:
        return 1.0, 1.0
    low, high = betabinom.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2], tested, rank, count + 1 - rank) / tested
    return float(low), float(high)


def conformal_p_values(
    probabilities: np.ndarray, calibration_probabilities: np.ndarray, calibration_targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Conformal p-values: the rank of each probability among the calibration studies of either class.

    Args:
        probabilities: (N, L), the studies to judge.
        calibration_probabilities: (M, L) of the calibration studies.
        calibration_targets: (M, L), each 1, 0 or NaN (left out).

    Returns:
        float64 (N, L) for "present", the share of positives (the judged study counted as one) with a probability that
        is not higher; and the same for "absent", of negatives with one that is not lower. In (0, 1]; a class is
        plausible at alpha, as `fit_bands` has it, where its p-value is > alpha.
    """
    present, absent = np.empty(probabilities.shape), np.empty(probabilities.shape)
    for k, (p, y) in enumerate(zip(calibration_probabilities.T, calibration_targets.T, strict=True)):
        with_it, without = np.sort(p[y == 1]), np.sort(p[y == 0])
        not_higher = np.searchsorted(with_it, probabilities[:, k], side="right")
        lower = np.searchsorted(without, probabilities[:, k], side="left")
        present[:, k] = (1 + not_higher) / (1 + len(with_it))
        absent[:, k] = (1 + len(without) - lower) / (1 + len(without))
    return present, absent


def _exact(alpha: float) -> Fraction:
    return Fraction(str(float(alpha)))
