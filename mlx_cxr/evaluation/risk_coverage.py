"""Risk against coverage: how wrong the calls are if only the most confident share of them is made.

Coverage here is the share of studies that get a call, risk the share of wrong ones among those calls (El-Yaniv and
Wiener, JMLR 2010; Geifman and El-Yaniv, arXiv:1705.08500). Two confidences rank the calls of a finding:

- `probability`: that of the call, p or 1 - p. With calibrated probabilities no other ranking has less risk. Of a rare
  finding it gives up the positive calls first, as most of the errors that can be saved are theirs.
- `conformal`: one minus the conformal p-value of the class that is not called. Following its curve is what changing
  alpha does; positives and negatives are given up alike.

Studies of equal confidence enter a curve in random order, of which the expectation is taken.
"""

from __future__ import annotations

import numpy as np

from mlx_cxr.core.labels import SCORING_PROTOCOLS
from mlx_cxr.evaluation.conformal import conformal_p_values
from mlx_cxr.evaluation.operating_points import OperatingPoints
from mlx_cxr.evaluation.predictions import Predictions

RANKINGS: tuple[str, ...] = ("probability", "conformal")


def call_confidences(
    validation: Predictions, probabilities: np.ndarray, points: OperatingPoints
) -> dict[str, np.ndarray]:
    """`RANKINGS` to float64 (N, 14) in [0, 1]: the confidence in what the threshold calls, the higher the surer.

    Args:
        validation: the studies that the points were fitted to.
        probabilities: (N, 14), calibrated, of the studies to judge.
        points: thresholds, calibration and protocol.
    """
    targets = SCORING_PROTOCOLS[points.protocol].apply(validation.raw_labels)
    calibration = points.calibration.probabilities(validation.logits)
    present, absent = conformal_p_values(probabilities, calibration, targets)
    above = probabilities >= points.thresholds.values
    return {
        "probability": np.where(above, probabilities, 1 - probabilities),
        "conformal": 1 - np.where(above, absent, present),
    }


def risk_coverage(wrong: np.ndarray, confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The curve of one finding.

    Args:
        wrong: (N,), N > 0, 1 where the call is wrong, else 0.
        confidence: (N,), the higher the earlier a call is made.

    Returns:
        float64 (N,) coverages 1/N, 2/N, ..., 1 and float64 (N,) risks there.
    """
    n = len(wrong)
    order = np.argsort(-confidence, kind="stable")
    starts = _group_starts(confidence[order])
    sizes = np.diff(np.r_[starts, n])
    expected = np.repeat(np.add.reduceat(wrong[order].astype(np.float64), starts) / sizes, sizes)
    made = np.arange(1, n + 1)
    return made / n, np.cumsum(expected) / made


def weighted_aurc(wrong: np.ndarray, confidence: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the curve of `risk_coverage` on many resamples at once: the mean of its N risks.

    Calls in random order have the risk of all calls as their expected area; lower is better.

    Args:
        wrong: (N,), 1 where the call is wrong, else 0.
        confidence: (N,).
        weights: (B, N), whole numbers: how often each study was drawn.

    Returns:
        float64 (B,) in [0, 1]; NaN where nothing is drawn.
    """
    if not len(wrong):
        return np.full(len(weights), np.nan)
    order = np.argsort(-confidence, kind="stable")
    starts, drawn = _group_starts(confidence[order]), weights[:, order].astype(np.float64)
    size, errors = (np.add.reduceat(x, starts, axis=1) for x in (drawn, drawn * wrong[order]))
    made, erred = np.cumsum(size, axis=1), np.cumsum(errors, axis=1)
    before, erred_before = made - size, erred - errors
    rate = np.divide(errors, size, out=np.zeros(size.shape), where=size > 0)
    # A group adds the sum over j = 1 ... size of (erred_before + rate j) / (before + j), in closed form.
    harmonic = np.r_[0.0, np.cumsum(1 / np.arange(1, made.max() + 1))]
    steps = harmonic[made.astype(np.intp)] - harmonic[before.astype(np.intp)]
    area = (rate * size + (erred_before - rate * before) * steps).sum(axis=1)
    return np.divide(area, made[:, -1], out=np.full(len(area), np.nan), where=made[:, -1] > 0)


def _group_starts(ordered: np.ndarray) -> np.ndarray:
    """Indices at which runs of equal values begin."""
    return np.flatnonzero(np.r_[True, np.diff(ordered) != 0])
