"""Shortcuts that a model may have learned instead of the finding: sickness and treatment of the patient.

The bedside view (AP) goes with sicker patients, and drains with treated pneumothoraces, so a model can rank well
without seeing the finding (Zech et al., PLOS Medicine 2018; Oakden-Rayner et al., arXiv:1909.12475). Four checks:
ROC-AUC within each view, pneumothorax with and without support devices, and the ROC-AUC of a model that is shown
nothing but view, age and sex, and of one that is shown the exposure beside them (`image_statistics`).
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression

from mlx_cxr.core.labels import LABELS, label_index
from mlx_cxr.evaluation.bootstrap import (
    IntervalEntry,
    PatientResamples,
    auc_intervals,
    macro_interval,
    percentile_interval,
)
from mlx_cxr.evaluation.metrics import both_classes
from mlx_cxr.evaluation.predictions import study_views

METADATA = ("view", "age", "sex")
"""Columns of `study_metadata`."""
_CATEGORIES = ("view", "sex")


class AucEntry(TypedDict):
    """ROC-AUC of a finding among some of the studies, with the number of each class."""

    positives: int
    negatives: int
    roc_auc: IntervalEntry


class ViewMeans(TypedDict):
    """Mean ROC-AUC of a group of studies."""

    roc_auc: IntervalEntry
    """Mean over `labels`."""
    labels: list[str]
    """Findings with both classes in every group, so that the means of the groups are over the same ones."""


class ViewEntry(TypedDict):
    """ROC-AUC within a group of studies."""

    studies: int
    per_label: dict[str, AucEntry]
    macro: ViewMeans


class DevicesEntry(TypedDict):
    """ROC-AUC of Pneumothorax; a study with no target for Support Devices is in neither."""

    with_devices: AucEntry
    without_devices: AucEntry


class ControlAucs(TypedDict):
    """ROC-AUC of a logistic regression that sees no finding."""

    roc_auc: IntervalEntry
    model_minus_it: IntervalEntry
    """Its own, and the model minus it. Undefined for a finding that training has only one class of."""


class ControlMeans(ControlAucs):
    """Means of the same."""

    labels: int
    """Number of findings in the means."""


class ControlEntry(TypedDict):
    """Comparison with a model that sees no finding."""

    features: list[str]
    """All that it sees."""
    per_label: dict[str, ControlAucs]
    macro: ControlMeans


def auc_by_group(
    targets: np.ndarray, scores: np.ndarray, groups: np.ndarray, names: tuple[str, ...], resamples: PatientResamples
) -> dict[str, ViewEntry]:
    """ROC-AUC within groups of studies, such as the views.

    Args:
        targets: (N, 14), each 1, 0 or NaN (left out).
        scores: (N, 14) logits.
        groups: (N,) str.
        names: the groups reported; one without studies is left out.
        resamples: of the patients of the N rows.
    """
    names = tuple(name for name in names if (groups == name).any())
    within = {name: np.where((groups == name)[:, None], targets, np.nan) for name in names}
    shared = np.logical_and.reduce([both_classes(y) for y in within.values()]) if names else np.zeros(len(LABELS), bool)
    result = {}
    for name, y in within.items():
        values, replicates = auc_intervals(y, scores, resamples)
        result[name] = {
            "studies": int((groups == name).sum()),
            "per_label": {label: _entry(y[:, k], values[k], replicates[:, k]) for k, label in enumerate(LABELS)},
            "macro": {
                "roc_auc": macro_interval(np.where(shared, values, np.nan), replicates).plain(),
                "labels": [label for label, there in zip(LABELS, shared, strict=True) if there],
            },
        }
    return result


def pneumothorax_by_devices(targets: np.ndarray, scores: np.ndarray, resamples: PatientResamples) -> DevicesEntry:
    """ROC-AUC of Pneumothorax among studies with and without Support Devices; arguments as `auc_by_group`."""
    finding, devices = label_index("Pneumothorax"), targets[:, label_index("Support Devices")]
    result = {}
    for name, value in (("with_devices", 1), ("without_devices", 0)):
        y = np.where(devices == value, targets[:, finding], np.nan)
        values, replicates = auc_intervals(y[:, None], scores[:, finding, None], resamples)
        result[name] = _entry(y, values[0], replicates[:, 0])
    return result


def study_metadata(frame: pd.DataFrame) -> pd.DataFrame:
    """Metadata of each study: a row per study, in order of first appearance.

    Args:
        frame: manifest rows, one per image, with `study_id` and `view`, and `age` and `sex` where they are known.

    Returns:
        Columns `view` (text, as `study_views`), `age` (years, NaN where unknown) and `sex` (text, empty where unknown).
    """
    first = frame.drop_duplicates("study_id")
    age = pd.to_numeric(first["age"], errors="coerce") if "age" in frame else pd.Series(np.nan, index=first.index)
    sex = first["sex"].astype("string").fillna("") if "sex" in frame else pd.Series("", index=first.index)
    return pd.DataFrame(
        {
            "view": study_views(frame).to_numpy(dtype=str),
            "age": age.to_numpy(dtype=np.float64),
            "sex": sex.to_numpy(dtype=str),
        }
    )


def control_scores(train: pd.DataFrame, train_targets: np.ndarray, test: pd.DataFrame) -> np.ndarray:
    """Logits of a logistic regression per label that sees the columns of a table alone.

    Views and sexes are indicators of the values that training has; numbers are standardized on training, with an
    indicator for unknown.

    Args:
        train, test: `study_metadata`, with more columns of numbers or without.
        train_targets: (N train, L), each 1, 0 or NaN (left out).

    Returns:
        float64 (N test, L); 0 throughout for a label that training has only one class of.
    """
    features, test_features = _features(train, train), _features(test, train)
    scores = np.zeros((len(test), train_targets.shape[1]))
    for column, there in enumerate(both_classes(train_targets)):
        if there:
            kept = ~np.isnan(train_targets[:, column])
            model = LogisticRegression(max_iter=1000).fit(features[kept], train_targets[kept, column].astype(int))
            scores[:, column] = model.decision_function(test_features)
    return scores


def against_control(
    train: pd.DataFrame,
    train_targets: np.ndarray,
    test: pd.DataFrame,
    targets: np.ndarray,
    scores: np.ndarray,
    resamples: PatientResamples,
) -> ControlEntry:
    """ROC-AUC on test of `control_scores`, and how much the model adds.

    Args:
        train, train_targets, test: as `control_scores`.
        targets: (N, 14) of test, each 1, 0 or NaN (left out).
        scores: (N, 14), the model's logits, for the difference.
        resamples: of the patients of test.
    """
    targets = np.where(both_classes(train_targets), targets, np.nan)
    values, replicates = auc_intervals(targets, control_scores(train, train_targets, test), resamples)
    model_values, model_replicates = auc_intervals(targets, scores, resamples)
    difference = model_values - values, model_replicates - replicates
    arms = {"roc_auc": (values, replicates), "model_minus_it": difference}
    return {
        "features": [name for name in train if name == "view" or (train[name].notna() & (train[name] != "")).any()],
        "per_label": {
            label: {arm: percentile_interval(float(v[k]), r[:, k]).plain() for arm, (v, r) in arms.items()}
            for k, label in enumerate(LABELS)
        },
        "macro": {
            **{arm: macro_interval(v, r).plain() for arm, (v, r) in arms.items()},
            "labels": int(np.isfinite(values).sum()),
        },
    }


def _entry(y: np.ndarray, value: float, replicates: np.ndarray) -> AucEntry:
    return {
        "positives": int((y == 1).sum()),
        "negatives": int((y == 0).sum()),
        "roc_auc": percentile_interval(float(value), replicates).plain(),
    }


def _features(table: pd.DataFrame, train: pd.DataFrame) -> np.ndarray:
    """(N, F) features, with categories and scale taken from `train`."""
    columns = []
    for name in train:
        if name in _CATEGORIES:
            columns += [(table[name] == value).to_numpy(dtype=np.float64) for value in sorted(set(train[name]))]
            continue
        values, known = table[name].to_numpy(dtype=np.float64), train[name].dropna()
        mean, scale = (known.mean(), known.std(ddof=0) or 1.0) if len(known) else (0.0, 1.0)
        columns += [np.nan_to_num((values - mean) / scale), np.isnan(values).astype(np.float64)]
    return np.stack(columns, axis=1)
