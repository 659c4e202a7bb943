"""Localization scores of maps and controls as a table with intervals by patient.

A hit rate means little alone: a large finding is hit by chance. So every score stands beside its controls on
the same images, and the interval that counts is that of the paired difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mlx_cxr.evaluation.bootstrap import (
    PatientResamples,
    macro_interval,
    patient_bootstrap,
    patient_resamples,
    percentile_interval,
    weighted_mean,
)

SCHEMA = 1


@dataclass(frozen=True)
class ImageScores:
    """Localization scores of one finding's images.

    Attributes:
        label: the finding.
        patient_ids: (n,) str, the patient of each image.
        maps: score name, such as `hit` or `iou`, to float (n,) in [0, 1], NaN where undefined.
        controls: control name, such as `random`, to the same scores of that control on the same images.
    """

    label: str
    patient_ids: np.ndarray
    maps: Mapping[str, np.ndarray]
    controls: Mapping[str, Mapping[str, np.ndarray]]

    def __post_init__(self) -> None:
        n = len(self.patient_ids)
        for arm, scores in {"maps": self.maps, **self.controls}.items():
            if set(scores) != set(self.maps):
                raise ValueError(f"{self.label}, {arm}: scores {sorted(scores)}, but the maps have {sorted(self.maps)}")
            for name, values in scores.items():
                if np.shape(values) != (n,):
                    raise ValueError(f"{self.label}, {arm}, {name}: shape {np.shape(values)}, expected ({n},)")


def localization_table(
    findings: Sequence[ImageScores], samples: int, seed: int, synthetic: bool, method: str
) -> dict[str, Any]:
    """Means, controls and paired differences with 95 % patient-bootstrap intervals.

    Args:
        findings: one per label; all with the same score and control names; at least one image each.
        samples: bootstrap resamples; 0 gives no intervals.
        method: what made the maps, such as `grad_cam`.

    Returns:
        JSON-ready: `schema`, `synthetic`, `method`, `bootstrap` (unit, samples, seed, level), `per_label` and
        `macro`. An entry of `per_label` has `films`, `patients` and per score `maps` and, for each control,
        `{mean, difference}`; each is {value, low, high, replicates, drawn}. A difference is maps minus control, on
        the images where both are defined. `macro` is the mean over the labels, with `labels`; its resamples
        draw each patient for all labels at once.

    Raises:
        ValueError: no findings, a finding without images, or other score or control names than the first has.
    """
    if not findings:
        raise ValueError("no finding has films with a mask; there is nothing to tabulate")
    scores, controls = tuple(findings[0].maps), tuple(findings[0].controls)
    for finding in findings:
        if not len(finding.patient_ids):
            raise ValueError(f"{finding.label}: no films; leave the finding out")
        if set(finding.maps) != set(scores) or set(finding.controls) != set(controls):
            raise ValueError(f"{finding.label}: other scores or controls than {findings[0].label} has")
    resamples = patient_resamples(np.concatenate([f.patient_ids for f in findings]), samples, seed)
    bounds = np.cumsum([0, *(len(f.patient_ids) for f in findings)])
    per_label: dict[str, Any] = {
        f.label: {"films": len(f.patient_ids), "patients": len(set(f.patient_ids.tolist()))} for f in findings
    }
    overall: dict[str, Any] = {"labels": len(findings)}
    for score in scores:
        arms = {("maps",): [f.maps[score] for f in findings]}
        for control in controls:
            theirs = [f.controls[control][score] for f in findings]
            arms[control, "mean"] = theirs
            arms[control, "difference"] = [f.maps[score] - x for f, x in zip(findings, theirs, strict=True)]
        for keys, columns in arms.items():
            entries, whole = _intervals(columns, bounds, resamples)
            for place, entry in zip((*per_label.values(), overall), (*entries, whole), strict=True):
                for key in (score, *keys[:-1]):
                    place = place.setdefault(key, {})
                place[keys[-1]] = entry
    return {
        "schema": SCHEMA,
        "synthetic": synthetic,
        "method": method,
        "bootstrap": {"unit": "patient", "samples": samples, "seed": seed, "level": 0.95},
        "per_label": per_label,
        "macro": overall,
    }


def _intervals(
    columns: Sequence[np.ndarray], bounds: np.ndarray, resamples: PatientResamples
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Interval of each label's mean and of the mean over labels, from the labels' columns laid end to end."""
    slices = [slice(a, b) for a, b in pairwise(bounds)]

    def means(weights: np.ndarray) -> np.ndarray:
        parts = [weighted_mean(x, weights[:, rows]) for x, rows in zip(columns, slices, strict=True)]
        return np.stack(parts, axis=1)

    value = means(np.ones((1, bounds[-1])))[0]
    replicates = patient_bootstrap(means, resamples)
    entries = [percentile_interval(float(v), replicates[:, i]).plain() for i, v in enumerate(value)]
    return entries, macro_interval(value, replicates).plain()
