"""Metrics per label, thresholds, and the same metrics under resampling weights.

Arrays are (N studies, L labels); a NaN target is left out, label by label. A column whose targets are all of
one class has no ROC-AUC: it is NaN, left out of a macro mean, and counted by whoever reports the mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from sklearn.metrics import average_precision_score, brier_score_loss, confusion_matrix, roc_auc_score

METRICS = ("roc_auc", "average_precision", "f1", "sensitivity", "specificity", "precision", "brier")
"""Order of the last axis of `weighted_metrics`; keys of `label_metrics`."""

DEFAULT_THRESHOLD = 0.5
_MOST_PAIRS = 2_000_000
"""Pairs of a positive and a negative beyond which sorting is quicker than comparing each, and takes less memory."""


@dataclass(frozen=True)
class Thresholds:
    """Operating points, one per label.

    Attributes:
        values: float64 (L,), in [0, 1]; a study is called positive at a probability >= its label's value.
        sources: per label `validation`, or `default` where validation lacked a class and 0.5 was taken.
        rule: `youden` or `f1`.
    """

    values: np.ndarray
    sources: tuple[str, ...]
    rule: str


def roc_auc_per_label(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """ROC-AUC of each column.

    Args:
        targets: (N, L), each 1, 0 or NaN (left out).
        scores: (N, L), any increasing function of the probability.

    Returns:
        float64 (L,) in [0, 1]; NaN where a column lacks a class.

    Raises:
        ValueError: shapes differ, a target is not 1, 0 or NaN, or a score is not finite; names row and column.
    """
    targets, scores = _checked(targets, scores)
    return np.array([_roc_auc(*_scored(y, s)) for y, s in zip(targets.T, scores.T, strict=True)])


def macro_auc(per_label: np.ndarray) -> float:
    """Unweighted mean over labels of (L,) values, those that are NaN left out; NaN when all are."""
    defined = np.asarray(per_label, dtype=np.float64)
    defined = defined[~np.isnan(defined)]
    return float(defined.mean()) if defined.size else math.nan


def both_classes(targets: np.ndarray) -> np.ndarray:
    """bool (L,): which columns of (N, L) targets hold both a 1 and a 0."""
    targets = np.asarray(targets)
    return (targets == 1).any(axis=0) & (targets == 0).any(axis=0)


def label_metrics(
    targets: np.ndarray, scores: np.ndarray, probabilities: np.ndarray, threshold: float
) -> dict[str, float]:
    """Every metric of one label, by scikit-learn.

    Args:
        targets: (N,), each 1, 0 or NaN (left out).
        scores: (N,), what ROC-AUC and average precision rank by: the logits, which do not saturate.
        probabilities: (N,) in [0, 1]; a study is called positive where this is >= `threshold`.
        threshold: operating point in [0, 1].

    Returns:
        `METRICS` to value. NaN where undefined: ROC-AUC, average precision, F1 and precision unless both
        classes are there; precision also without a positive call; sensitivity without a positive; specificity
        without a negative; Brier score without any target.

    Raises:
        ValueError: as `roc_auc_per_label`, or a probability outside [0, 1].
    """
    y, s, p = _checked_label(targets, scores, probabilities)
    if y.size == 0:
        return dict.fromkeys(METRICS, math.nan)
    (tn, fp), (fn, tp) = confusion_matrix(y, p >= threshold, labels=[0, 1])
    both = tp + fn > 0 and tn + fp > 0
    return {
        "roc_auc": _roc_auc(y, s),
        "average_precision": float(average_precision_score(y, s)) if both else math.nan,
        "f1": 2 * tp / float(2 * tp + fp + fn) if both else math.nan,
        "sensitivity": tp / float(tp + fn) if tp + fn else math.nan,
        "specificity": tn / float(tn + fp) if tn + fp else math.nan,
        "precision": tp / float(tp + fp) if both and tp + fp else math.nan,
        "brier": float(brier_score_loss(y, p, pos_label=1)),
    }


def weighted_metrics(
    targets: np.ndarray, scores: np.ndarray, probabilities: np.ndarray, threshold: float, weights: np.ndarray
) -> np.ndarray:
    """`label_metrics` of one label on many resamples at once, each given as how often every row was drawn.

    Equal to repeating row i `weights[b, i]` times and calling `label_metrics`, at a small part of the cost:
    one sort serves all resamples, and tied scores are one group (the Mann-Whitney form of ROC-AUC).

    Args:
        targets, scores, probabilities, threshold: as `label_metrics`.
        weights: (B, N), not negative.

    Returns:
        float64 (B, 7) in the order of `METRICS`, NaN where a resample leaves a metric undefined.

    Raises:
        ValueError: as `label_metrics`, or weights of another length.
    """
    targets = np.asarray(targets, dtype=np.float64)
    if weights.ndim != 2 or weights.shape[1] != len(targets):
        raise ValueError(f"weights have shape {weights.shape}, expected (B, {len(targets)})")
    y, s, p = _checked_label(targets, scores, probabilities)
    out = np.full((len(weights), len(METRICS)), np.nan)
    if y.size == 0:
        return out
    drawn = weights[:, ~np.isnan(targets)].astype(np.float64)
    above = p >= threshold
    columns = np.stack([y, 1 - y, y * above, (1 - y) * above, np.square(p - y)], axis=1)
    n1, n0, tp, fp, squared = (drawn @ columns).T
    auc, ap = _rank_metrics(y, s, drawn)
    both = (n1 > 0) & (n0 > 0)
    out[:, 0] = np.where(both, auc, np.nan)
    out[:, 1] = np.where(both, ap, np.nan)
    out[:, 2] = np.where(both, _ratio(2 * tp, tp + fp + n1), np.nan)
    out[:, 3] = _ratio(tp, n1)
    out[:, 4] = _ratio(n0 - fp, n0)
    out[:, 5] = np.where(both, _ratio(tp, tp + fp), np.nan)
    out[:, 6] = _ratio(squared, n1 + n0)
    return out


def weighted_auc(targets: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The ROC-AUC of `weighted_metrics` alone, at a seventh of its cost for a few hundred studies.

    Returns:
        float64 (B,), NaN where a resample lacks a class.

    Raises:
        ValueError: as `roc_auc_per_label`.
    """
    targets, scores = (column[:, 0] for column in _checked(targets[:, None], scores[:, None]))
    positives, negatives = np.flatnonzero(targets == 1), np.flatnonzero(targets == 0)
    if len(positives) * len(negatives) > _MOST_PAIRS:
        return weighted_metrics(targets, scores, np.zeros(len(targets)), DEFAULT_THRESHOLD, weights)[:, 0]
    above, below = scores[positives, None], scores[None, negatives]
    won = (above > below) + 0.5 * (above == below)
    n1, n0 = weights[:, positives].astype(np.float64), weights[:, negatives].astype(np.float64)
    return _ratio(((n1 @ won) * n0).sum(axis=1), n1.sum(axis=1) * n0.sum(axis=1))


def choose_thresholds(targets: np.ndarray, probabilities: np.ndarray, rule: Literal["youden", "f1"]) -> Thresholds:
    """Operating points from the validation split, never from test.

    Args:
        targets: (N, L) of validation, each 1, 0 or NaN (left out).
        probabilities: (N, L) in [0, 1], calibrated as they will be when the thresholds are used.
        rule: `youden` maximizes sensitivity + specificity - 1 (Youden, Cancer 1950); `f1` maximizes F1. Of
            equal ones the highest threshold is taken. Candidates are the validation probabilities themselves.

    Returns:
        One per label; where validation lacks a class, 0.5 with source `default`.

    Raises:
        ValueError: an unknown rule, or as `roc_auc_per_label`.
    """
    if rule not in ("youden", "f1"):
        raise ValueError(f"threshold rule {rule!r}: choose 'youden' or 'f1'")
    targets, probabilities = _checked(targets, probabilities)
    values = np.full(targets.shape[1], DEFAULT_THRESHOLD)
    tuned = both_classes(targets)
    for k in np.flatnonzero(tuned):
        values[k] = _operating_point(*_scored(targets[:, k], probabilities[:, k]), rule)
    return Thresholds(values, tuple("validation" if there else "default" for there in tuned), rule)


def _operating_point(y: np.ndarray, p: np.ndarray, rule: str) -> float:
    """The best of the distinct probabilities as a threshold, on whole counts, so that equal ones are equal."""
    candidates = np.unique(p)[::-1]
    called, found = (len(x) - np.searchsorted(np.sort(x), candidates) for x in (p, p[y == 1]))
    positives, negatives = int((y == 1).sum()), int((y == 0).sum())
    youden, f1 = found * negatives - (called - found) * positives, 2 * found / (called + positives)
    return float(candidates[np.argmax(youden if rule == "youden" else f1)])


def _roc_auc(y: np.ndarray, s: np.ndarray) -> float:
    return float(roc_auc_score(y, s)) if 0 < y.sum() < len(y) else math.nan


def _rank_metrics(y: np.ndarray, s: np.ndarray, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ROC-AUC and average precision, (B,) each; garbage where a class is missing, which the caller masks."""
    order = np.argsort(-s, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(s[order]) != 0])
    drawn = drawn[:, order]
    positive = np.add.reduceat(drawn * y[order], starts, axis=1)
    negative = np.add.reduceat(drawn * (1 - y[order]), starts, axis=1)
    n1, n0 = positive.sum(axis=1), negative.sum(axis=1)
    tp, fp = np.cumsum(positive, axis=1), np.cumsum(negative, axis=1)
    below = n0[:, None] - fp
    auc = _ratio((positive * (below + 0.5 * negative)).sum(axis=1), n1 * n0)
    precision = np.nan_to_num(_ratio(tp, tp + fp))
    return auc, _ratio((positive * precision).sum(axis=1), n1)


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """Elementwise quotient, NaN where the denominator is 0."""
    return np.divide(over, under, out=np.full(np.shape(under), np.nan), where=under != 0)


def _scored(y: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    kept = ~np.isnan(y)
    return (y[kept], *(x[kept] for x in others))


def _checked_label(targets: np.ndarray, scores: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, ...]:
    y, s, p = (np.asarray(x)[:, None] for x in (targets, scores, probabilities))
    y, s = _checked(y, s)
    _, p = _checked(y, p)
    if p.size and (p.min() < 0 or p.max() > 1):
        row = int(np.argmax((p[:, 0] < 0) | (p[:, 0] > 1)))
        raise ValueError(f"row {row}: probability {p[row, 0]} is outside [0, 1]; pass probabilities, not logits")
    return _scored(y[:, 0], s[:, 0], p[:, 0])


def _checked(targets: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    targets, scores = np.asarray(targets, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if targets.ndim != 2 or targets.shape != scores.shape:
        raise ValueError(f"targets {targets.shape} and scores {scores.shape}: both must be (N, L)")
    bad = ~(np.isnan(targets) | (targets == 0) | (targets == 1))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(
            f"row {row}, column {column}: target {targets[row, column]} is not 1, 0 or NaN; "
            "apply one of labels.SCORING_PROTOCOLS to raw labels first"
        )
    if not np.isfinite(scores).all():
        row, column = np.argwhere(~np.isfinite(scores))[0]
        raise ValueError(f"row {row}, column {column}: score {scores[row, column]} is not finite")
    return targets, scores
