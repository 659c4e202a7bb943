"""CNN, teacher and student in one picture: ROC curves finding by finding, and calibration before and after scaling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from scipy.special import expit
from sklearn.metrics import roc_auc_score, roc_curve

from mlx_cxr.core.formatting import number
from mlx_cxr.core.labels import LABELS
from mlx_cxr.evaluation.calibration import expected_calibration_error
from mlx_cxr.evaluation.operating_points import OperatingPoints
from mlx_cxr.evaluation.predictions import Predictions
from mlx_cxr.pages.figures import (
    BLACK,
    BLUE,
    GRAY,
    GREEN,
    VERMILION,
    bare,
    cohort_line,
    diagonal,
    finding_panels,
    legend,
    note,
    page,
    save,
    title_panel,
    unit_square,
)
from mlx_cxr.pages.plots import finding_columns, mean_roc, reliability_panel

_STYLES = ((BLUE, "-"), (VERMILION, "--"), (GREEN, "-."))


@dataclass(frozen=True)
class Arm:
    """A model as a picture shows it.

    Attributes:
        title: its name, such as `teacher, reads: findings`.
        test: its predictions on the studies compared.
        points: its temperatures and thresholds, fitted on validation.
    """

    title: str
    test: Predictions
    points: OperatingPoints


def plot_roc_comparison(path: str | Path, arms: Sequence[Arm], protocol: str, synthetic: bool) -> Path:
    """Write the ROC curves of up to three models over each other, per finding and as means, as a PNG.

    The models are scored on the same studies in the same order, under a protocol of `labels.SCORING_PROTOCOLS`.
    """
    figure = page("ROC on the test split", cohort_line(arms[0].test, protocol))
    panels = finding_panels(figure, "false positive rate (1 - specificity)", "sensitivity")
    columns = [finding_columns(arm.test, arm.points, protocol) for arm in arms]
    drawn: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in arms]
    areas: list[list[float]] = [[] for _ in arms]
    for k, label in enumerate(LABELS):
        ax, y = panels[k], columns[0][k][0]
        diagonal(ax)
        if not title_panel(ax, label, y):
            continue
        for place, (colour, line) in enumerate(_STYLES[: len(arms)]):
            z = columns[place][k][1]
            x, rise, _ = roc_curve(y, z, drop_intermediate=False)
            drawn[place].append((x, rise))
            areas[place].append(roc_auc_score(y, z))
            ax.plot(x, rise, color=colour, ls=line, lw=1.4)
            note(ax, f"AUC {areas[place][-1]:.3f}", "lower right", colour, len(arms) - 1 - place)
    last = panels[-1]
    diagonal(last)
    last.set_title(f"Mean of {len(drawn[0])} findings", fontsize=10, fontweight="bold", color=BLACK)
    for place, ((colour, line), curves) in enumerate(zip(_STYLES, drawn, strict=False)):
        if curves:
            x, rise = mean_roc(curves)
            last.plot(x, rise, color=colour, ls=line, lw=2)
            note(last, f"mean AUC {np.mean(areas[place]):.3f}", "lower right", colour, len(arms) - 1 - place)
    legend(figure, {arm.title: ("", *style) for arm, style in zip(arms, _STYLES, strict=False)})
    return save(figure, path, synthetic)


def plot_calibration_comparison(
    path: str | Path, arms: Sequence[Arm], protocol: str, synthetic: bool, bins: int = 15
) -> Path:
    """Write reliability of up to three models, all findings pooled, and the calibration error of each finding.

    Above, observed rate against probability; below, the error of each finding before and after temperature scaling on
    one scale for all models. Findings with one class are left out, as of the means in the tables. As
    `plot_roc_comparison`.
    """
    figure = page("Calibration on the test split", cohort_line(arms[0].test, protocol))
    grid = figure.add_gridspec(
        2, 3, left=0.145, right=0.985, top=0.87, bottom=0.105, hspace=0.3, wspace=0.12, height_ratios=(1, 1)
    )
    below: list[Axes] = []
    for place, arm in enumerate(arms):
        columns = finding_columns(arm.test, arm.points, protocol)
        triples = {
            k: (y, expit(z.astype(np.float64)), p) for k, (y, z, p) in enumerate(columns) if 0 < y.sum() < len(y)
        }
        above = figure.add_subplot(grid[0, place])
        unit_square(above)
        above.set_title(f"{arm.title}\nall {len(triples)} findings pooled", fontsize=10, color=BLACK)
        above.set_xlabel("mean predicted probability", fontsize=10, color=BLACK)
        if triples:
            reliability_panel(above, *(np.concatenate(parts) for parts in zip(*triples.values(), strict=True)), bins)
        errors = np.full((len(LABELS), 2), np.nan)
        for k, (y, raw, p) in triples.items():
            errors[k] = [expected_calibration_error(x, y, bins) for x in (raw, p)]
        below.append(figure.add_subplot(grid[1, place], sharex=below[0] if below else None))
        _error_panel(below[-1], errors, labelled=place == 0)
        if place == 0:
            above.set_ylabel("observed rate", fontsize=10, color=BLACK)
    # Once all models are drawn: a limit that is set ends the search for a scale that holds the next ones too.
    below[0].set_xlim(left=0)
    legend(figure, {"before scaling": ("D", VERMILION, "--"), "after temperature scaling": ("o", BLUE, "-")})
    explained = f"Above, each marker is a group of equally many answers. ECE: {bins} bins of equal width."
    return save(figure, path, synthetic, explained)


def _error_panel(ax: Axes, errors: np.ndarray, labelled: bool) -> None:
    """A line per finding from its error before scaling to that after it; `errors` is (14, 2), NaN where left out."""
    rows = np.arange(len(LABELS))
    bare(ax)
    ax.hlines(rows, errors.min(axis=1), errors.max(axis=1), color=GRAY, lw=1)
    for column, marker, colour in ((0, "D", VERMILION), (1, "o", BLUE)):
        ax.plot(errors[:, column], rows, ls="", marker=marker, color=colour, ms=6, mec="white", mew=0.6)
    for row in rows[np.isnan(errors[:, 0])]:
        ax.text(0.02, row, "one class only", transform=ax.get_yaxis_transform(), va="center", fontsize=9, color=BLACK)
    ax.set_yticks(rows, LABELS if labelled else [""] * len(LABELS), fontsize=10)
    ax.set_ylim(len(LABELS) - 0.4, -0.6)
    ax.set_xlabel("expected calibration error", fontsize=10, color=BLACK)
    there = errors[~np.isnan(errors[:, 0])]
    means = there.mean(axis=0) if len(there) else (None, None)
    ax.set_title(f"per finding, mean {number(means[0])} → {number(means[1])}", fontsize=10, color=BLACK)
