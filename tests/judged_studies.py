"""Calls and labels as arrays, without runs: studies judged at a threshold of 0.5 unless told otherwise."""

from __future__ import annotations

import numpy as np
from scipy.special import logit

from mlx_cxr.core.labels import LABELS, SCORING_PROTOCOLS
from mlx_cxr.evaluation.failures import Calls, Judged

K = len(LABELS)


def judged(raw, probabilities, thresholds=0.5, patients=None) -> Judged:
    """Args are (N, 14), (N, 14), a number or (14,), and (N,) or None for one study a patient."""
    raw = np.asarray(raw, dtype=np.float32)
    thresholds = np.broadcast_to(np.asarray(thresholds, dtype=np.float64), K)
    targets = SCORING_PROTOCOLS["empty_negative"].apply(raw).astype(np.float64)
    targets[:, np.isnan(thresholds)] = np.nan
    ids = np.array([f"s{i:04d}" for i in range(len(raw))])
    patient_ids = np.array([f"p{i:04d}" for i in range(len(raw))]) if patients is None else np.asarray(patients, str)
    probabilities = np.asarray(probabilities, dtype=np.float64)
    return Judged(ids, patient_ids, raw, targets, logit(probabilities), Calls(probabilities, thresholds))


def random_judged(studies: int, seed: int, accuracy: float = 0.8, positives: float = 0.3) -> Judged:
    """Labels of all four raw values, two studies a patient; calls that are right with a chance of `accuracy`."""
    rng = np.random.default_rng(seed)
    present = rng.random((studies, K)) < positives
    raw = np.where(present, 1.0, rng.choice([0.0, -1.0, np.nan], (studies, K), p=[0.4, 0.1, 0.5]))
    call = present ^ (rng.random((studies, K)) > accuracy)
    probabilities = np.where(call, rng.uniform(0.5, 0.99, raw.shape), rng.uniform(0.01, 0.49, raw.shape))
    return judged(raw, probabilities, patients=[f"p{i // 2:04d}" for i in range(studies)])
