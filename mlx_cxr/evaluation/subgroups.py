"""Figures of a model within groups of patients, and the gap of each group to all studies.

A gap in the false-negative rate means that findings go unseen more often in that group (Seyyed-Kalantari et al., Nature
Medicine 2021, on underdiagnosis). All figures of a group are means over the findings with at least `MIN_PATIENTS`
patients of either class in that group, and the gap is to all studies over the same findings: else groups would differ
by which findings they have.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from mlx_cxr.core.labels import LABELS, label_index
from mlx_cxr.evaluation.bootstrap import PatientResamples, macro_interval, patient_bootstrap
from mlx_cxr.evaluation.failures import Judged
from mlx_cxr.evaluation.metrics import METRICS, weighted_metrics

MIN_PATIENTS = 5
FEW_POSITIVES = 50
"""Positive labels (study and finding) below which a group is marked as small."""
FIGURES = ("roc_auc", "sensitivity", "specificity")
AGE_BANDS = (0, 20, 40, 60, 80)
UNKNOWN = "unknown"

_COLUMNS = [METRICS.index(name) for name in FIGURES]


def age_bands(age: np.ndarray) -> np.ndarray:
    """(N,) str such as `40-59` or `80+`, of ages in years (N,); `unknown` where NaN."""
    names = [f"{low}-{high - 1}" for low, high in pairwise(AGE_BANDS)] + [f"{AGE_BANDS[-1]}+"]
    place = np.digitize(np.nan_to_num(age), AGE_BANDS) - 1
    return np.where(np.isnan(age), UNKNOWN, np.array(names)[place.clip(0)])


def study_groups(studies: pd.DataFrame, raw_labels: np.ndarray) -> dict[str, np.ndarray]:
    """Attribute to the group of each study, (N,) str.

    Args:
        studies: columns `view` (a group of views), `sex` (empty where unknown) and `age_band`.
        raw_labels: (N, 14), of which Support Devices is used.
    """
    device = raw_labels[:, label_index("Support Devices")] == 1
    sex = studies["sex"].to_numpy(dtype=str)
    return {
        "view": studies["view"].to_numpy(dtype=str),
        "sex": np.where(sex == "", UNKNOWN, sex),
        "age": studies["age_band"].to_numpy(dtype=str),
        "support devices": np.where(device, "present", "not present"),
    }


def subgroup_tables(judged: Judged, groups: Mapping[str, np.ndarray], resamples: PatientResamples) -> dict[str, Any]:
    """Figures of each group.

    Args:
        judged: the N studies.
        groups: attribute to the group of each study.

    Returns:
        Attribute to group, in the order of their names, to `studies`, `patients`, `positives` (labels), `small` (fewer
        than `FEW_POSITIVES`), `labels` (those in the means), `left_out` (scored ones that are not), the intervals
        `roc_auc`, `sensitivity`, `specificity`, and `fnr_gap`: the group's false-negative rate minus that of all
        studies. An attribute with one group only is an empty mapping.
    """
    values, replicates = _figures(judged, np.ones(len(judged.study_ids), dtype=bool), resamples)
    tables: dict[str, Any] = {}
    for attribute, group in groups.items():
        names = sorted(set(group.tolist()))
        tables[attribute] = {}
        for name in names if len(names) > 1 else ():
            tables[attribute][name] = _entry(judged, group == name, values, replicates, resamples)
    return tables


def gaps(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Gaps that can be told from noise.

    Returns:
        `looked_at` (gaps with an interval), `apart` (those whose interval excludes 0), and `largest`: of these the one
        farthest from 0, with `attribute` and `group`, or None.
    """
    known = [
        {"attribute": attribute, "group": group, **entry["fnr_gap"]}
        for attribute, table in tables.items()
        for group, entry in table.items()
        if not np.isnan(entry["fnr_gap"]["low"])
    ]
    apart = [gap for gap in known if gap["low"] > 0 or gap["high"] < 0]
    largest = max(apart, key=lambda gap: abs(gap["value"]), default=None)
    return {"looked_at": len(known), "apart": len(apart), "largest": largest}


def _entry(
    judged: Judged, rows: np.ndarray, values: np.ndarray, replicates: np.ndarray, resamples: PatientResamples
) -> dict[str, Any]:
    """A group's figures; `values` (14, 3) and `replicates` (B, 14, 3) are those of all studies."""
    y, patients = judged.targets[rows], judged.patient_ids[rows]
    fewest = [min(len(set(patients[column == value])) for value in (0, 1)) for column in y.T]
    enough = np.array(fewest) >= MIN_PATIENTS
    ours, our_replicates = _figures(judged, rows, resamples)
    ours = np.where(enough[:, None], ours, np.nan)
    sensitivity = FIGURES.index("sensitivity")
    gap, gap_replicates = (all_ - own for all_, own in ((values, ours), (replicates, our_replicates)))
    positives = int((y == 1).sum())
    scored = judged.scored.any(axis=0)
    return {
        "studies": int(rows.sum()),
        "patients": len(set(patients.tolist())),
        "positives": positives,
        "small": positives < FEW_POSITIVES,
        "labels": [label for label, there in zip(LABELS, enough, strict=True) if there],
        "left_out": [label for label, there in zip(LABELS, scored & ~enough, strict=True) if there],
        **{f: macro_interval(ours[:, i], our_replicates[:, :, i]).plain() for i, f in enumerate(FIGURES)},
        "fnr_gap": macro_interval(gap[:, sensitivity], gap_replicates[:, :, sensitivity]).plain(),
    }


def _figures(judged: Judged, rows: np.ndarray, resamples: PatientResamples) -> tuple[np.ndarray, np.ndarray]:
    """`FIGURES` of each finding on some of the studies: (14, 3), and replicates (B, 14, 3)."""
    thresholds = np.nan_to_num(judged.calls.thresholds)
    columns = [
        (judged.targets[rows, k], judged.logits[rows, k], judged.calls.probabilities[rows, k], thresholds[k])
        for k in range(len(LABELS))
    ]

    def statistic(weights: np.ndarray) -> np.ndarray:
        within = weights[:, rows]
        return np.stack([weighted_metrics(*column, within)[:, _COLUMNS] for column in columns], axis=1)

    return statistic(np.ones((1, len(rows))))[0], patient_bootstrap(statistic, resamples)
