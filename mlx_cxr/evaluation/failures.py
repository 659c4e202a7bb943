"""The errors of a model on test: which they are, how confident it was, and the category that a rule gives each.

An error is a study and a finding whose call differs from the label under `PROTOCOL`. The call is made at the threshold
that validation chose; findings for which it could choose none are left out. The categories are a partition: conditions
are looked at in the order of `CATEGORIES`, the first one that holds names the category. They hold or not for every
study and finding, right or wrong, so that a condition which merely is common can be told from one that errors gather
in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mlx_cxr.core.labels import LABELS, SCORING_PROTOCOLS, label_index
from mlx_cxr.evaluation.bootstrap import percentile_interval
from mlx_cxr.evaluation.scored_runs import ScoredRun

PROTOCOL = "empty_negative"
FALSE_POSITIVE, FALSE_NEGATIVE = KINDS = ("false positive", "false negative")
NOISE, UNCERTAIN, UNMENTIONED, RARE, BEDSIDE, DEVICES, OTHER = CATEGORIES = (
    "likely label noise",
    "uncertain label",
    "not mentioned",
    "rare finding",
    "bedside view",
    "support devices",
    "other",
)
PER_LABEL = 2
"""Errors of one finding among the worst, as long as there are about as many findings as errors shown."""


def plain_interval(value: float, replicates: np.ndarray) -> dict[str, float | int]:
    """`percentile_interval` as a JSON object; without ends where all replicates are the same.

    That happens where none, or all, of a group are counted: no resample can then say how far off that may be.
    """
    interval = percentile_interval(value, replicates)
    ends = (math.nan, math.nan) if interval.low == interval.high else (interval.low, interval.high)
    return interval.plain() | dict(zip(("low", "high"), ends, strict=True))


@dataclass(frozen=True)
class Calls:
    """Probabilities and thresholds of a model on N studies.

    Attributes:
        probabilities: float64 (N, 14), calibrated; NaN for a study that it did not score.
        thresholds: float64 (14,); NaN where validation could choose none.
    """

    probabilities: np.ndarray
    thresholds: np.ndarray

    @classmethod
    def of(cls, run: ScoredRun, study_ids: np.ndarray) -> Calls:
        """A run's calls on these studies, in this order."""
        probabilities = np.full((len(study_ids), len(LABELS)), np.nan)
        known = np.isin(study_ids, run.test.study_ids)
        probabilities[known] = run.points.calibration.probabilities(run.on(study_ids[known]).logits)
        return cls(probabilities, run.points.tuned_thresholds)

    @property
    def above_threshold(self) -> np.ndarray:
        """bool (N, 14): the bare comparison; False without a probability or a threshold."""
        return self.probabilities >= self.thresholds

    @property
    def margins(self) -> np.ndarray:
        """float64 (N, 14) in [-1, 1]: how much of the way from the threshold to 1, or (negative) to 0, is gone.

        So a miss at a threshold of 0.1 can be as confident as a false alarm at 0.9. NaN where there is no call.
        """
        p, t = self.probabilities, np.broadcast_to(self.thresholds, self.probabilities.shape)
        room = np.where(p >= t, 1 - t, t)
        return np.where(
            np.isnan(p) | np.isnan(t), np.nan, np.divide(p - t, room, out=np.zeros(p.shape), where=room > 0)
        )


@dataclass(frozen=True)
class Judged:
    """A model's calls beside the labels, a row per test study.

    Attributes:
        study_ids: (N,) str.
        patient_ids: (N,) str.
        raw_labels: float32 (N, 14), each 1, 0, -1 or NaN.
        targets: float64 (N, 14), 1 or 0 under `PROTOCOL`; NaN in the columns of findings without a threshold.
        logits: float64 (N, 14).
        calls: the model's.
    """

    study_ids: np.ndarray
    patient_ids: np.ndarray
    raw_labels: np.ndarray
    targets: np.ndarray
    logits: np.ndarray
    calls: Calls

    @property
    def false_positive(self) -> np.ndarray:
        """bool (N, 14)."""
        return self.calls.above_threshold & (self.targets == 0)

    @property
    def false_negative(self) -> np.ndarray:
        """bool (N, 14)."""
        return ~self.calls.above_threshold & (self.targets == 1)

    @property
    def error(self) -> np.ndarray:
        """bool (N, 14): either of the two."""
        return self.false_positive | self.false_negative

    @property
    def scored(self) -> np.ndarray:
        """bool (N, 14): has a target and a threshold."""
        return ~np.isnan(self.targets)


def judge(run: ScoredRun) -> Judged:
    """A run's calls on all of its test studies, beside the labels."""
    test = run.test
    calls = Calls.of(run, test.study_ids)
    targets = SCORING_PROTOCOLS[PROTOCOL].apply(test.raw_labels).astype(np.float64)
    targets[:, np.isnan(calls.thresholds)] = np.nan
    return Judged(test.study_ids, test.patient_ids, test.raw_labels, targets, test.logits.astype(np.float64), calls)


def conditions(
    judged: Judged, *, teacher: Calls | None, teacher_margin: float, rare: np.ndarray, bedside: np.ndarray
) -> dict[str, np.ndarray]:
    """Possible causes of an error, for every study and finding.

    Args:
        judged: the N studies.
        teacher: its calls on them; without it `NOISE` is not among the conditions.
        teacher_margin: in (0, 1]; the teacher is confidently against a label where its call is the other one and its
            margin at least this.
        rare: bool (14,), the findings with few positives in training.
        bedside: bool (N,), the studies with AP images only.

    Returns:
        Each of `CATEGORIES` but the last, in their order, to bool (N, 14).
    """
    shape = judged.targets.shape
    found = {}
    if teacher is not None:
        margins = teacher.margins
        against = np.where(judged.targets == 1, -margins, margins)
        found[NOISE] = (against >= teacher_margin) & judged.scored
    found[UNCERTAIN] = judged.raw_labels == -1
    found[UNMENTIONED] = np.isnan(judged.raw_labels)
    found[RARE] = np.broadcast_to(rare, shape)
    found[BEDSIDE] = np.broadcast_to(bedside[:, None], shape)
    column = label_index("Support Devices")
    found[DEVICES] = np.repeat(judged.raw_labels[:, [column]] == 1, shape[1], axis=1)
    found[DEVICES][:, column] = False
    return found


def categorize(found: Mapping[str, np.ndarray]) -> np.ndarray:
    """The category of every study and finding, (N, 14) str: the first of `conditions` that holds, else `OTHER`."""
    category = np.full(next(iter(found.values())).shape, OTHER, dtype=object)
    for name in reversed(found):
        category[found[name]] = name
    return category


def failure_table(
    judged: Judged,
    category: np.ndarray,
    studies: pd.DataFrame,
    others: Mapping[str, Calls],
    drawn: np.ndarray | None = None,
) -> pd.DataFrame:
    """The content of `failures.csv`: a row per error, the most confident first.

    Columns:
        study_id, patient_id, label.
        raw_label: 1, 0, -1 or NaN, as the source has it.
        error: of `KINDS`. category: of `CATEGORIES`.
        confidence: |margin| of the call, in [0, 1]; see `Calls.margins`.
        probability: calibrated. threshold: chosen on validation.
        <model>_probability, <model>_threshold: the same of each other model; NaN where it did not score the study.
        those of `studies`.
        drawn: 1 where the finding shows in an image by the drawing, else 0; only where that is known.

    Args:
        judged: the N studies.
        category: (N, 14) of `categorize`.
        studies: N rows of what is known of each study.
        others: model to its calls.
        drawn: float (N, 14), 1 or 0; None where it is not known.
    """
    rows, columns = np.nonzero(judged.error)
    table = {
        "study_id": judged.study_ids[rows],
        "patient_id": judged.patient_ids[rows],
        "label": np.array(LABELS)[columns],
        "raw_label": judged.raw_labels[rows, columns],
        "error": np.where(judged.false_positive[rows, columns], FALSE_POSITIVE, FALSE_NEGATIVE),
        "category": category[rows, columns],
        "confidence": np.abs(judged.calls.margins[rows, columns]),
        "probability": judged.calls.probabilities[rows, columns],
        "threshold": judged.calls.thresholds[columns],
    }
    for name, calls in others.items():
        table |= {
            f"{name}_probability": calls.probabilities[rows, columns],
            f"{name}_threshold": calls.thresholds[columns],
        }
    table |= {name: studies[name].to_numpy()[rows] for name in studies}
    if drawn is not None:
        table["drawn"] = drawn[rows, columns].astype(int)
    order = ["confidence", "study_id", "label"]
    return pd.DataFrame(table).sort_values(order, ascending=[False, True, True], ignore_index=True)


def worst(failures: pd.DataFrame, count: int, labels: Collection[str]) -> pd.DataFrame:
    """The errors to look at first: the most confident ones, spread over findings and patients' studies.

    False positives and false negatives are taken in turn, each time the most confident one left, at most one of a study
    and `per_label(count, labels)` of a finding.

    Args:
        failures: of `failure_table`.
        count: number of errors at most.
        labels: findings that come into question.

    Returns:
        Rows of `failures`, the most confident first.
    """
    allowed = failures[failures["label"].isin(labels)]
    queues = [allowed.index[allowed["error"] == kind].tolist() for kind in KINDS]
    chosen: list[int] = []
    studies: set[str] = set()
    taken: Counter[str] = Counter()
    most = per_label(count, labels)
    while any(queues) and len(chosen) < count:
        for queue in queues:
            while queue:
                row = queue.pop(0)
                study, label = failures.loc[row, ["study_id", "label"]]
                if study not in studies and taken[label] < most:
                    chosen.append(row)
                    studies.add(study)
                    taken[label] += 1
                    break
    return failures.loc[sorted(chosen[:count])]


def per_label(count: int, labels: Collection[str]) -> int:
    """Number of errors of one finding that `worst` takes."""
    return max(PER_LABEL, math.ceil(PER_LABEL * count / max(1, len(labels))))
