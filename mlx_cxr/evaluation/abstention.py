"""Costs and gains of abstaining on test: `abstention` of `test_results.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from mlx_cxr.core.labels import LABELS, SCORING_PROTOCOLS
from mlx_cxr.evaluation.bootstrap import (
    IntervalEntry,
    PatientResamples,
    macro_interval,
    patient_bootstrap,
    percentile_interval,
)
from mlx_cxr.evaluation.conformal import coverage_range
from mlx_cxr.evaluation.metrics import both_classes
from mlx_cxr.evaluation.operating_points import ABSTAIN, OperatingPoints
from mlx_cxr.evaluation.predictions import Predictions
from mlx_cxr.evaluation.risk_coverage import RANKINGS, call_confidences, risk_coverage, weighted_aurc

FIGURES: tuple[str, ...] = (
    "positive_coverage",
    "negative_coverage",
    "called",
    "called_positives",
    "called_negatives",
    "risk",
    "risk_called",
    "sensitivity_called",
    "specificity_called",
    *(f"aurc_{ranking}" for ranking in RANKINGS),
)
"""Order of the last axis of `weighted_figures`."""
COVERAGES: tuple[float, ...] = tuple(round(0.1 * i, 1) for i in range(1, 11))
"""Of `risk_at`."""


class CallMetrics(TypedDict):
    """Coverage and risk of a finding, or their unweighted means."""

    positive_coverage: IntervalEntry
    negative_coverage: IntervalEntry
    """Share of positives whose conformal set holds "present", of negatives whose set holds "absent"; 1 - alpha is
    aimed at."""
    called: IntervalEntry
    called_positives: IntervalEntry
    called_negatives: IntervalEntry
    """Share of studies, positives and negatives on which a call is made."""
    risk: IntervalEntry
    risk_called: IntervalEntry
    """Share of wrong calls if all are made, and among those made."""
    sensitivity_called: IntervalEntry
    specificity_called: IntervalEntry
    """Among the calls made."""
    aurc_probability: IntervalEntry
    aurc_conformal: IntervalEntry
    """Areas under the risk-coverage curves of `risk_coverage.RANKINGS`; calls in random order have `risk`."""
    risk_at: dict[str, list[float | None]]
    """Ranking to its curve at `coverages`."""


class CallsEntry(TypedDict):
    """Calls and abstention under a protocol of `labels.SCORING_PROTOCOLS`."""

    per_label: dict[str, CallMetrics]
    macro: CallMetrics
    """By finding, and their means."""
    macro_labels: list[str]
    """Findings of the means: those with both classes on test and enough of both on validation."""


class ExpectedCoverage(TypedDict):
    """Ends between which coverage lies in 95 of 100 draws of as many exchangeable validation and test studies."""

    positive_coverage: list[float | None]
    negative_coverage: list[float | None]
    """As `conformal.coverage_range`, of test studies under `fitted_under`; null without any."""


class AbstentionEntry(TypedDict):
    """Effect of the conformal bands on test."""

    alpha: float
    fitted_under: str
    """Of the bands, with the protocol that they were fitted under."""
    needed: int
    """Validation studies of a class needed for the class to be ruled out."""
    too_few: list[str]
    """Findings with fewer of either class, which are never called."""
    expected: dict[str, ExpectedCoverage]
    """By finding."""
    coverages: list[float]
    """Shares of studies called at which `risk_at` is given."""
    protocols: dict[str, CallsEntry]
    """By protocol of the test targets."""


@dataclass(frozen=True)
class FindingCalls:
    """One finding on the test studies that count under a protocol.

    Attributes:
        kept: bool (N,), which of all the studies these n are.
        truth: bool (n,), the label.
        above_threshold: bool (n,), the bare comparison of the probability with the threshold.
        made: bool (n,), the studies that a call is made on; on the others the model abstains.
        present_plausible: bool (n,), the conformal set holds "present".
        absent_plausible: bool (n,), it holds "absent".
        confidences: `risk_coverage.RANKINGS` to float64 (n,).
    """

    kept: np.ndarray
    truth: np.ndarray
    above_threshold: np.ndarray
    made: np.ndarray
    present_plausible: np.ndarray
    absent_plausible: np.ndarray
    confidences: Mapping[str, np.ndarray]

    @property
    def wrong(self) -> np.ndarray:
        """bool (n,): the comparison with the threshold is not the label."""
        return self.above_threshold != self.truth


def finding_calls(
    validation: Predictions, test: Predictions, points: OperatingPoints, protocol: str
) -> list[FindingCalls]:
    """Calls and abstentions on test, a finding at a time, under a protocol of `labels.SCORING_PROTOCOLS`.

    `validation` are the studies that the points were fitted to.
    """
    decided = points.decide(test.logits)
    p, targets = decided.probabilities, SCORING_PROTOCOLS[protocol].apply(test.raw_labels)
    confidences = call_confidences(validation, p, points)
    above, made = p >= points.thresholds.values, decided.states != ABSTAIN
    present, absent = points.bands.present_plausible(p), points.bands.absent_plausible(p)
    findings = []
    for k in range(len(LABELS)):
        kept = ~np.isnan(targets[:, k])
        columns = (column[kept, k] for column in (targets == 1, above, made, present, absent))
        findings.append(FindingCalls(kept, *columns, {name: c[kept, k] for name, c in confidences.items()}))
    return findings


def abstention_section(
    validation: Predictions, test: Predictions, points: OperatingPoints, resamples: PatientResamples
) -> AbstentionEntry:
    """The section, for every protocol; `validation` are the studies that the points were fitted to."""
    bands, targets = points.bands, SCORING_PROTOCOLS[points.protocol].apply(test.raw_labels)
    of_class = (
        ("positive_coverage", bands.positives, (targets == 1).sum(axis=0)),
        ("negative_coverage", bands.negatives, (targets == 0).sum(axis=0)),
    )
    sections = {}
    for name, policy in SCORING_PROTOCOLS.items():
        findings = finding_calls(validation, test, points, name)
        sections[name] = _protocol(findings, bands.fitted & both_classes(policy.apply(test.raw_labels)), resamples)
    return {
        "alpha": bands.alpha,
        "fitted_under": points.protocol,
        "needed": bands.needed,
        "too_few": [label for label, there in zip(LABELS, bands.fitted, strict=True) if not there],
        "expected": {
            label: {key: coverage_range(int(n[k]), bands.alpha, int(m[k])) for key, n, m in of_class}
            for k, label in enumerate(LABELS)
        },
        "coverages": COVERAGES,
        "protocols": sections,
    }


def weighted_figures(finding: FindingCalls, weights: np.ndarray) -> np.ndarray:
    """`FIGURES` of one finding on many resamples at once, each given as how often every study was drawn.

    Args:
        finding: n of N studies.
        weights: (B, N), whole numbers.

    Returns:
        float64 (B, 11), NaN where a resample leaves a figure undefined.
    """
    drawn = weights[:, finding.kept].astype(np.float64)
    y, made, wrong = finding.truth, finding.made, finding.wrong
    kinds = (y, ~y, y & finding.present_plausible, ~y & finding.absent_plausible, y & made, ~y & made, wrong)
    counts = drawn @ np.stack([*kinds, wrong & y & made, wrong & ~y & made], axis=1)
    positives, negatives, kept_present, kept_absent, made_1, made_0, errors, missed, false_alarms = counts.T
    ratios = (
        (kept_present, positives),
        (kept_absent, negatives),
        (made_1 + made_0, positives + negatives),
        (made_1, positives),
        (made_0, negatives),
        (errors, positives + negatives),
        (missed + false_alarms, made_1 + made_0),
        (made_1 - missed, made_1),
        (made_0 - false_alarms, made_0),
    )
    shares = [np.divide(part, of, out=np.full(len(of), np.nan), where=of > 0) for part, of in ratios]
    areas = [weighted_aurc(wrong, finding.confidences[ranking], drawn) for ranking in RANKINGS]
    return np.stack([*shares, *areas], axis=1)


def _protocol(findings: list[FindingCalls], meant: np.ndarray, resamples: PatientResamples) -> CallsEntry:
    """An entry of `protocols`; `meant`, bool (14,), are the labels of the means."""

    def statistic(weights: np.ndarray) -> np.ndarray:
        return np.stack([weighted_figures(finding, weights) for finding in findings], axis=1)

    values = statistic(np.ones((1, len(resamples.patient_of_row))))[0]
    replicates = patient_bootstrap(statistic, resamples)
    curves = {name: np.stack([_risk_at(finding, name) for finding in findings]) for name in RANKINGS}
    per_label = {
        label: {
            **{f: percentile_interval(float(values[k, i]), replicates[:, k, i]).plain() for i, f in enumerate(FIGURES)},
            "risk_at": {name: curve[k].tolist() for name, curve in curves.items()},
        }
        for k, label in enumerate(LABELS)
    }
    masked = np.where(meant[:, None], values, np.nan)
    macro = {name: macro_interval(masked[:, i], replicates[:, :, i]).plain() for i, name in enumerate(FIGURES)}
    nothing = np.full(len(COVERAGES), np.nan)
    macro["risk_at"] = {n: (c[meant].mean(axis=0) if meant.any() else nothing).tolist() for n, c in curves.items()}
    return {
        "per_label": per_label,
        "macro": macro,
        "macro_labels": [label for label, there in zip(LABELS, meant, strict=True) if there],
    }


def _risk_at(finding: FindingCalls, ranking: str) -> np.ndarray:
    """float64 (10,) risks at `COVERAGES`; NaN without studies."""
    if not len(finding.truth):
        return np.full(len(COVERAGES), np.nan)
    return np.interp(COVERAGES, *risk_coverage(finding.wrong, finding.confidences[ranking]))
