"""Predictions with a known structure: several studies per patient, correlated within the patient."""

import numpy as np

from mlx_cxr.core.labels import LABELS
from mlx_cxr.evaluation.predictions import Predictions


def simulated(patients: int, split: str, seed: int) -> Predictions:
    """One to three studies per patient; prevalences from about 5 to 50 %, all four raw values, logits too steep."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), rng.integers(1, 4, patients))
    n, k = len(patient), len(LABELS)
    truth = rng.normal(size=(patients, k))[patient] + 0.5 * rng.normal(size=(n, k)) + np.linspace(-2.2, 0.0, k)
    present = truth + rng.normal(size=(n, k)) > 0
    raw = np.where(present, np.where(rng.random((n, k)) < 0.9, 1, -1), np.where(rng.random((n, k)) < 0.4, 0, np.nan))
    return Predictions(
        split=np.repeat(split, n),
        patient_ids=np.array([f"{split}-p{p:04d}" for p in patient]),
        study_ids=np.array([f"{split}-s{i:05d}" for i in range(n)]),
        views=np.where(rng.random(n) < 0.6, "AP", "PA"),
        raw_labels=raw.astype(np.float32),
        logits=(2.5 * truth + rng.normal(size=(n, k))).astype(np.float32),
    )
