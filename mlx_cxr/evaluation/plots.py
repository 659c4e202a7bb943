"""ROC, precision-recall and reliability, one panel per finding, and one for all of them.

Drawn without pyplot, so that nothing global changes. Colours are Okabe and Ito's, told apart under the common colour
deficiencies; curves that could be confused differ in line or marker too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.special import expit
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from mlx_cxr.evaluation.calibration import expected_calibration_error, reliability
from mlx_cxr.evaluation.predictions import Predictions
from mlx_cxr.evaluation.results import MEANINGS, OperatingPoints
from mlx_cxr.labels import LABELS, SCORING_PROTOCOLS
from mlx_cxr.runs import atomic_path
from mlx_cxr.wording import footer, number

BLUE, VERMILION, GRAY, BLACK = "#0072B2", "#D55E00", "#8A8A8A", "#222222"
_GRID = np.linspace(0, 1, 501)
_COLUMNS, _ROWS = 5, 3
_BIN_STUDIES = 20

Curve = tuple[np.ndarray, np.ndarray]


def plot_roc(path: str | Path, test: Predictions, points: OperatingPoints, synthetic: bool) -> Path:
    """Write ROC curves per finding with the operating point, and their mean, as a PNG.

    Args:
        path: of the PNG, written atomically.
        test: predictions of the test split.
        points: what was fitted on validation; the plot follows its protocol.
        synthetic: whether the cohort is; the footer then says so.

    Returns:
        The path.
    """
    figure, panels = _page("ROC", test, points, "false positive rate (1 - specificity)", "sensitivity")
    curves = []
    for k, (y, z, p) in enumerate(_columns(test, points)):
        ax = panels[k]
        ax.plot([0, 1], [0, 1], color=GRAY, lw=0.8, ls=":")
        if not _title(ax, LABELS[k], y):
            continue
        x, rise, _ = roc_curve(y, z, drop_intermediate=False)
        curves.append((x, rise))
        ax.plot(x, rise, color=BLUE, lw=1.6)
        called = p >= points.thresholds.values[k]
        ax.plot(called[y == 0].mean(), called[y == 1].mean(), "o", color=VERMILION, ms=6, mec="white", mew=0.8)
        _note(ax, f"AUC {roc_auc_score(y, z):.3f}", "lower right")
    panels[-1].plot([0, 1], [0, 1], color=GRAY, lw=0.8, ls=":")
    _mean_panel(panels[-1], curves, mean_roc, "AUC", "default")
    _key(figure, {"operating point from validation": ("o", VERMILION, "")})
    return _save(figure, path, synthetic)


def plot_precision_recall(path: str | Path, test: Predictions, points: OperatingPoints, synthetic: bool) -> Path:
    """Write precision-recall curves per finding with prevalence and operating point, and their mean; as `plot_roc`."""
    figure, panels = _page("Precision and recall", test, points, "recall (sensitivity)", "precision")
    curves = []
    for k, (y, z, p) in enumerate(_columns(test, points)):
        ax = panels[k]
        if not _title(ax, LABELS[k], y):
            continue
        precision, recall, _ = precision_recall_curve(y, z)
        precision[-1] = precision[-2]  # scikit-learn ends every curve at precision 1, which no threshold reaches
        curves.append((recall[::-1], precision[::-1]))
        ax.axhline(y.mean(), color=GRAY, lw=0.8, ls=":")
        ax.step(recall, precision, where="post", color=BLUE, lw=1.6)
        called = p >= points.thresholds.values[k]
        if called.any():
            ax.plot(called[y == 1].mean(), y[called].mean(), "o", color=VERMILION, ms=6, mec="white", mew=0.8)
        _note(ax, f"AP {average_precision_score(y, z):.3f}", "upper right")
    _mean_panel(panels[-1], curves, mean_precision, "AP", "steps-pre")
    _key(figure, {"operating point from validation": ("o", VERMILION, ""), "prevalence": ("", GRAY, ":")})
    return _save(figure, path, synthetic)


def plot_reliability(
    path: str | Path, test: Predictions, points: OperatingPoints, synthetic: bool, bins: int = 15
) -> Path:
    """Write reliability diagrams per finding, before and after temperature scaling, and for all pooled; as `plot_roc`.

    A marker is a tenth of the studies, or at least `_BIN_STUDIES` of them, so that each rate means something; the
    calibration error printed is that of the results, over `bins` of equal width.
    """
    figure, panels = _page("Reliability", test, points, "mean predicted probability", "observed rate")
    pooled = []
    for k, (y, z, p) in enumerate(_columns(test, points)):
        if _title(panels[k], LABELS[k], y):
            raw = expit(z.astype(np.float64))
            pooled.append((y, raw, p))
            _reliability_panel(panels[k], y, raw, p, bins)
        else:
            panels[k].plot([0, 1], [0, 1], color=GRAY, lw=0.8, ls=":")
    panels[-1].set_title(f"All {len(pooled)} pooled", fontsize=10, fontweight="bold", color=BLACK)
    if pooled:
        _reliability_panel(panels[-1], *(np.concatenate(parts) for parts in zip(*pooled, strict=True)), bins)
    note = f"Each marker is a group of equally many studies. ECE: {bins} bins of equal width."
    figure.text(0.985, 0.018, note, ha="right", fontsize=10, color=BLACK)
    _key(figure, {"before scaling": ("D", VERMILION, "--"), "after temperature scaling": ("o", BLUE, "-")})
    return _save(figure, path, synthetic)


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


def _columns(test: Predictions, points: OperatingPoints) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per finding the targets that count, their logits and their calibrated probabilities."""
    targets = SCORING_PROTOCOLS[points.protocol].apply(test.raw_labels)
    probabilities = points.calibration.probabilities(test.logits)
    return [
        tuple(values[~np.isnan(y)] for values in (y, z, p))
        for y, z, p in zip(targets.T, test.logits.T, probabilities.T, strict=True)
    ]


def _page(kind: str, test: Predictions, points: OperatingPoints, x: str, y: str) -> tuple[Figure, list[Axes]]:
    # 1500 x 1020 pixels; inches that binary fractions hold, as versions of Matplotlib round others differently.
    figure = Figure(figsize=(15.625, 10.625), dpi=96, facecolor="white")
    FigureCanvasAgg(figure)
    patients = len(set(test.patient_ids.tolist()))
    figure.text(0.04, 0.965, f"{kind} on the {test.split[0]} split", fontsize=17, fontweight="bold", color=BLACK)
    figure.text(
        0.04,
        0.942,
        f"{len(test)} studies of {patients} patients; protocol {points.protocol}: {MEANINGS[points.protocol]}",
        fontsize=11,
        color=BLACK,
    )
    frame = {"left": 0.05, "right": 0.985, "top": 0.89, "bottom": 0.105, "hspace": 0.32, "wspace": 0.16}
    grid = figure.add_gridspec(_ROWS, _COLUMNS, **frame)
    panels = [figure.add_subplot(cell) for cell in grid]
    for place, ax in enumerate(panels):
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], aspect="equal")
        ax.tick_params(labelsize=9, colors=BLACK, labelleft=place % _COLUMNS == 0)
        ax.grid(color="#E4E4E4", lw=0.6)
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    figure.supxlabel(x, fontsize=12, y=0.055, color=BLACK)
    figure.supylabel(y, fontsize=12, x=0.012, color=BLACK)
    return figure, panels


def _title(ax: Axes, label: str, y: np.ndarray) -> bool:
    """Name a panel with its counts; False, and said in the panel, when one class is missing."""
    positives = int((y == 1).sum())
    ax.set_title(f"{label}\n{positives} of {len(y)}", fontsize=10, color=BLACK)
    if 0 < positives < len(y):
        return True
    ax.text(0.5, 0.5, "one class only:\nno curve", ha="center", va="center", fontsize=10, color=BLACK)
    return False


def _note(ax: Axes, text: str, corner: str) -> None:
    vertical, horizontal = corner.split()
    x, y = 0.97 if horizontal == "right" else 0.03, 0.04 if vertical == "lower" else 0.96
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5}
    va = "bottom" if vertical == "lower" else "top"
    ax.text(x, y, text, ha=horizontal, va=va, fontsize=10, color=BLACK, bbox=box, transform=ax.transAxes)


def _mean_panel(ax: Axes, curves: list[Curve], mean: Callable[[list[Curve]], Curve], name: str, style: str) -> None:
    ax.set_title(f"Mean of {len(curves)} findings", fontsize=10, fontweight="bold", color=BLACK)
    if not curves:
        return
    for x, y in curves:
        ax.plot(x, y, color=GRAY, lw=0.6, alpha=0.6, drawstyle=style)
    x, y = mean(curves)
    ax.plot(x, y, color=BLACK, lw=2)
    _note(ax, f"mean {name} {auc(x, y):.3f}", "lower right" if name == "AUC" else "upper right")


def _reliability_panel(ax: Axes, y: np.ndarray, before: np.ndarray, after: np.ndarray, bins: int) -> None:
    ax.plot([0, 1], [0, 1], color=GRAY, lw=0.8, ls=":")
    groups = max(2, min(10, len(y) // _BIN_STUDIES))
    for p, marker, colour, line in ((before, "D", VERMILION, "--"), (after, "o", BLUE, "-")):
        table = reliability(p, y, groups, "equal_mass")
        at, rate = table.mean_probability, table.observed_rate
        ax.plot(at, rate, color=colour, lw=1.2, ls=line, marker=marker, ms=5, mec="white", mew=0.5)
    errors = [number(expected_calibration_error(p, y, bins)) for p in (before, after)]
    _note(ax, f"ECE {errors[0]} → {errors[1]}", "upper left")


def _key(figure: Figure, entries: dict[str, tuple[str, str, str]]) -> None:
    """A legend at the top right; an entry is marker, colour and line style."""
    ax = figure.axes[0]
    handles = [
        ax.plot([], [], marker=marker, color=colour, ls=line, label=name)[0]
        for name, (marker, colour, line) in entries.items()
    ]
    place = {"loc": "upper right", "bbox_to_anchor": (0.99, 0.995)}
    figure.legend(handles=handles, ncols=len(handles), frameon=False, fontsize=11, **place)


def _save(figure: Figure, path: str | Path, synthetic: bool) -> Path:
    figure.text(0.04, 0.018, footer(synthetic), fontsize=11, color=VERMILION, fontweight="bold")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Warning": footer(synthetic)})
    return Path(path)
