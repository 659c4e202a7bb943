"""Confusion between findings: those present where another one is called wrongly, as lifts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_cxr.core.labels import LABELS
from mlx_cxr.evaluation.bootstrap import PatientResamples, patient_bootstrap
from mlx_cxr.evaluation.failures import Judged, plain_interval

MIN_COUNT = 5
"""A lift wants so many false positives, and so many studies with the other finding among those that could be one."""


def confusions(judged: Judged, resamples: PatientResamples) -> dict[str, Any]:
    """Share of each finding among the false positives of another, against its share anyway.

    Returns:
        Each of the 14 to `false_positives` and `present`: each other finding to `count` (false positives with it),
        `base_rate` (its share among all studies whose label of the first is 0, from which its false positives come) and
        the interval `lift`, the share among the false positives over the base rate. The lift is undefined with fewer
        than `MIN_COUNT` false positives, or fewer than that many studies with the other finding in the base.
    """
    present = (judged.raw_labels == 1).astype(np.float64)
    result = {}
    for a, label in enumerate(LABELS):
        wrong = judged.false_positive[:, a].astype(np.float64)
        base = (judged.targets[:, a] == 0).astype(np.float64)

        def lifts(weights: np.ndarray, wrong: np.ndarray = wrong, base: np.ndarray = base) -> np.ndarray:
            return _share(weights * wrong, present) / _positive(_share(weights * base, present))

        counts, in_base = wrong @ present, base @ present
        enough = (wrong.sum() >= MIN_COUNT) & (in_base >= MIN_COUNT)
        values = np.where(enough, lifts(np.ones((1, len(wrong))))[0], np.nan)
        replicates = patient_bootstrap(lifts, resamples)
        result[label] = {
            "false_positives": int(wrong.sum()),
            "present": {
                other: {
                    "count": int(counts[b]),
                    "base_rate": float(in_base[b] / base.sum()) if base.any() else np.nan,
                    "lift": plain_interval(float(values[b]), replicates[:, b]),
                }
                for b, other in enumerate(LABELS)
                if b != a
            },
        }
    return result


def confused_pairs(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pairs that are found together more than chance explains, the highest lift first.

    Returns:
        Of the pairs with a count of at least `MIN_COUNT` whose lift has an interval above 1: `called`, `present`,
        `count` and the interval.
    """
    pairs = [
        {"called": called, "present": present, "count": cell["count"], **cell["lift"]}
        for called, entry in found.items()
        for present, cell in entry["present"].items()
    ]
    clear = (pair for pair in pairs if pair["low"] > 1 and pair["count"] >= MIN_COUNT)
    return sorted(clear, key=lambda pair: -pair["value"])


def lifts_with_an_interval(found: Mapping[str, Any]) -> int:
    """Number of pairs that have an interval."""
    return sum(not np.isnan(cell["lift"]["low"]) for entry in found.values() for cell in entry["present"].values())


def _share(weights: np.ndarray, present: np.ndarray) -> np.ndarray:
    """(b, 14) shares of the weights (b, N) that lie on studies with each finding; NaN where there is no weight."""
    return weights @ present / _positive(weights.sum(axis=1, keepdims=True))


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, np.nan)
