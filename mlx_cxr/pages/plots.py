"""ROC, precision-recall, reliability and risk-coverage, one panel per finding, and one for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import expit
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from mlx_cxr.core.formatting import number
from mlx_cxr.core.labels import LABELS, SCORING_PROTOCOLS
from mlx_cxr.evaluation.abstention import finding_calls
from mlx_cxr.evaluation.calibration import expected_calibration_error, reliability
from mlx_cxr.evaluation.operating_points import OperatingPoints
from mlx_cxr.evaluation.predictions import Predictions
from mlx_cxr.evaluation.risk_coverage import RANKINGS, risk_coverage
from mlx_cxr.pages.figures import (
    BLACK,
    BLUE,
    GRAY,
    GREEN,
    VERMILION,
    cohort_line,
    diagonal,
    finding_panels,
    legend,
    note,
    page,
    save,
    title_panel,
)

_GRID = np.linspace(0, 1, 501)
_BIN_STUDIES = 20
_RANKING_STYLES = {
    "conformal": (BLUE, "-", "ranked by conformal p-value"),
    "probability": (GREEN, "--", "ranked by probability"),
}
"""Of `risk_coverage.RANKINGS`: colour, line and name."""
_LEAST_COVERAGE = 0.25
"""Risks of fewer calls, a few studies' luck, do not stretch the axis."""

Curve = tuple[np.ndarray, np.ndarray]


def plot_roc(path: str | Path, test: Predictions, points: OperatingPoints, synthetic: bool) -> Path:
    """Write ROC curves per finding with the operating point, and their mean, as a PNG, and return its path.

    The plot follows the protocol of `points`.
    """
    figure, panels = _page("ROC", test, points, "false positive rate (1 - specificity)", "sensitivity")
    curves = []
    for k, (y, z, p) in enumerate(finding_columns(test, points, points.protocol)):
        ax = panels[k]
        diagonal(ax)
        if not title_panel(ax, LABELS[k], y):
            continue
        x, rise, _ = roc_curve(y, z, drop_intermediate=False)
        curves.append((x, rise))
        ax.plot(x, rise, color=BLUE, lw=1.6)
        above = p >= points.thresholds.values[k]
        ax.plot(above[y == 0].mean(), above[y == 1].mean(), "o", color=VERMILION, ms=6, mec="white", mew=0.8)
        note(ax, f"AUC {roc_auc_score(y, z):.3f}", "lower right")
    diagonal(panels[-1])
    _mean_panel(panels[-1], curves, mean_roc, "AUC", "default")
    legend(figure, {"operating point from validation": ("o", VERMILION, "")})
    return save(figure, path, synthetic)


def plot_precision_recall(path: str | Path, test: Predictions, points: OperatingPoints, synthetic: bool) -> Path:
    """Write precision-recall curves per finding with prevalence and operating point, and their mean; as `plot_roc`."""
    figure, panels = _page("Precision and recall", test, points, "recall (sensitivity)", "precision")
    curves = []
    for k, (y, z, p) in enumerate(finding_columns(test, points, points.protocol)):
        ax = panels[k]
        if not title_panel(ax, LABELS[k], y):
            continue
        precision, recall, _ = precision_recall_curve(y, z)
        precision[-1] = precision[-2]  # scikit-learn ends every curve at precision 1, which no threshold reaches
        curves.append((recall[::-1], precision[::-1]))
        ax.axhline(y.mean(), color=GRAY, lw=0.8, ls=":")
        ax.step(recall, precision, where="post", color=BLUE, lw=1.6)
        above = p >= points.thresholds.values[k]
        if above.any():
            ax.plot(above[y == 1].mean(), y[above].mean(), "o", color=VERMILION, ms=6, mec="white", mew=0.8)
        note(ax, f"AP {average_precision_score(y, z):.3f}", "upper right")
    _mean_panel(panels[-1], curves, mean_precision, "AP", "steps-pre")
    legend(figure, {"operating point from validation": ("o", VERMILION, ""), "prevalence": ("", GRAY, ":")})
    return save(figure, path, synthetic)


def plot_reliability(
    path: str | Path, test: Predictions, points: OperatingPoints, synthetic: bool, bins: int = 15
) -> Path:
    """Write reliability diagrams per finding, before and after temperature scaling, and for all pooled; as `plot_roc`.

    A marker is a tenth of the studies, or at least `_BIN_STUDIES` of them, so that each rate means something; the
    calibration error printed is that of the results, over `bins` of equal width.
    """
    figure, panels = _page("Reliability", test, points, "mean predicted probability", "observed rate")
    pooled = []
    for k, (y, z, p) in enumerate(finding_columns(test, points, points.protocol)):
        if title_panel(panels[k], LABELS[k], y):
            raw = expit(z.astype(np.float64))
            pooled.append((y, raw, p))
            reliability_panel(panels[k], y, raw, p, bins)
        else:
            diagonal(panels[k])
    panels[-1].set_title(f"All {len(pooled)} pooled", fontsize=10, fontweight="bold", color=BLACK)
    if pooled:
        reliability_panel(panels[-1], *(np.concatenate(parts) for parts in zip(*pooled, strict=True)), bins)
    explained = f"Each marker is a group of equally many studies. ECE: {bins} bins of equal width."
    legend(figure, {"before scaling": ("D", VERMILION, "--"), "after temperature scaling": ("o", BLUE, "-")})
    return save(figure, path, synthetic, explained)


def plot_risk_coverage(
    path: str | Path, validation: Predictions, test: Predictions, points: OperatingPoints, synthetic: bool
) -> Path:
    """Write risk-coverage curves per finding with where abstention puts the model, and their mean; as `plot_roc`.

    `validation`, which the points were fitted to, ranks the calls.
    """
    figure, panels = _page("Risk and coverage", test, points, "share of studies called", "share of wrong calls")
    curves: dict[str, list[Curve]] = {ranking: [] for ranking in RANKINGS}
    highest = 0.05
    findings = finding_calls(validation, test, points, points.protocol)
    for k, (ax, finding) in enumerate(zip(panels[:-1], findings, strict=True)):
        if not title_panel(ax, LABELS[k], finding.truth):
            continue
        wrong, made = finding.wrong, finding.made
        ax.axhline(wrong.mean(), color=GRAY, lw=0.8, ls=":")
        for ranking, (colour, line, _) in _RANKING_STYLES.items():
            coverage, risk = risk_coverage(wrong, finding.confidences[ranking])
            ax.plot(coverage, risk, color=colour, ls=line, lw=1.6)
            highest = max(highest, risk[coverage >= _LEAST_COVERAGE].max())
            if points.bands.fitted[k]:
                curves[ranking].append((coverage, risk))
        if made.any():
            ax.plot(made.mean(), wrong[made].mean(), "o", color=VERMILION, ms=6, mec="white", mew=0.8)
            highest = max(highest, wrong[made].mean())
        else:
            note(ax, "never called", "upper right")
    panels[-1].set_title(f"Mean of {len(curves['conformal'])} findings", fontsize=10, fontweight="bold", color=BLACK)
    for line, (ranking, (colour, style, _)) in enumerate(_RANKING_STYLES.items()):
        if curves[ranking]:
            panels[-1].plot(*mean_risk(curves[ranking]), color=colour, ls=style, lw=2)
            area = np.mean([risk.mean() for _, risk in curves[ranking]])
            note(panels[-1], f"mean area {area:.3f}", "upper right", colour, line)
    for ax in panels:
        ax.set(ylim=(-0.02 * highest, 1.1 * highest), yticks=_round_ticks(highest), aspect="auto")
    explained = f"A call is made where the conformal set at alpha {points.bands.alpha:g} is what the threshold says."
    entries = {name: ("", colour, line) for colour, line, name in _RANKING_STYLES.values()}
    legend(figure, {"calls made": ("o", VERMILION, ""), **entries, "all called": ("", GRAY, ":")})
    return save(figure, path, synthetic, explained)


def mean_roc(curves: list[Curve]) -> Curve:
    """Mean sensitivity of curves (false positive rate, sensitivity) at each false positive rate of a fine grid."""
    return _GRID, np.mean([np.interp(_GRID, x, y) for x, y in curves], axis=0)


def mean_precision(curves: list[Curve]) -> Curve:
    """Mean precision of curves (recall increasing, precision) at each recall of a fine grid.

    At a recall between two points the precision is that of the next point, as average precision takes it; so the
    mean curve's area is the mean average precision.
    """
    at = [np.searchsorted(recall, _GRID, side="left").clip(0, len(recall) - 1) for recall, _ in curves]
    return _GRID, np.mean([precision[i] for i, (_, precision) in zip(at, curves, strict=True)], axis=0)


def mean_risk(curves: list[Curve]) -> Curve:
    """Mean risk of curves (coverage, risk) at each coverage of a fine grid; below a curve's first its first risk."""
    return _GRID, np.mean([np.interp(_GRID, coverage, risk) for coverage, risk in curves], axis=0)


def finding_columns(
    test: Predictions, points: OperatingPoints, protocol: str
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per finding the targets that count under a protocol, their logits and their calibrated probabilities."""
    targets = SCORING_PROTOCOLS[protocol].apply(test.raw_labels)
    probabilities = points.calibration.probabilities(test.logits)
    return [
        tuple(values[~np.isnan(y)] for values in (y, z, p))
        for y, z, p in zip(targets.T, test.logits.T, probabilities.T, strict=True)
    ]


def _page(kind: str, test: Predictions, points: OperatingPoints, x: str, y: str) -> tuple[Figure, list[Axes]]:
    figure = page(f"{kind} on the {test.split[0]} split", cohort_line(test, points.protocol))
    return figure, finding_panels(figure, x, y)


def _mean_panel(ax: Axes, curves: list[Curve], mean: Callable[[list[Curve]], Curve], name: str, style: str) -> None:
    ax.set_title(f"Mean of {len(curves)} findings", fontsize=10, fontweight="bold", color=BLACK)
    if not curves:
        return
    for x, y in curves:
        ax.plot(x, y, color=GRAY, lw=0.6, alpha=0.6, drawstyle=style)
    x, y = mean(curves)
    ax.plot(x, y, color=BLACK, lw=2)
    note(ax, f"mean {name} {auc(x, y):.3f}", "lower right" if name == "AUC" else "upper right")


def _round_ticks(highest: float) -> np.ndarray:
    """Zero and up to three even steps of a round size that reach `highest` or nearly."""
    step = next(size for size in (0.02, 0.05, 0.1, 0.2, 0.5) if 3 * size >= highest)
    return step * np.arange(int(highest / step) + 1)


def reliability_panel(ax: Axes, y: np.ndarray, before: np.ndarray, after: np.ndarray, bins: int) -> None:
    """Draw observed rate against probability, before and after scaling, with the calibration error of each.

    Args:
        ax: over the unit square.
        y: (N,) targets, each 1 or 0.
        before, after: (N,) probabilities before and after temperature scaling.
        bins: of the calibration error.
    """
    diagonal(ax)
    groups = max(2, min(10, len(y) // _BIN_STUDIES))
    for p, marker, colour, line in ((before, "D", VERMILION, "--"), (after, "o", BLUE, "-")):
        table = reliability(p, y, groups, "equal_mass")
        at, rate = table.mean_probability, table.observed_rate
        ax.plot(at, rate, color=colour, lw=1.2, ls=line, marker=marker, ms=5, mec="white", mew=0.5)
    errors = [number(expected_calibration_error(p, y, bins)) for p in (before, after)]
    note(ax, f"ECE {errors[0]} → {errors[1]}", "upper left")
