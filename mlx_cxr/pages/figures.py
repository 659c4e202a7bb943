"""Page, panels, colours, notes, footer and atomic save of every figure of the evaluation.

Drawn without pyplot, so that nothing global changes. Colours are Okabe and Ito's, told apart under the common colour
deficiencies; curves that could be confused differ in line or marker too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlx_cxr.core.files import atomic_path
from mlx_cxr.core.formatting import footer
from mlx_cxr.evaluation.predictions import Predictions
from mlx_cxr.evaluation.results import MEANINGS

BLUE, VERMILION, GREEN, GRAY, BLACK = "#0072B2", "#D55E00", "#009E73", "#8A8A8A", "#222222"
COLUMNS, ROWS = 5, 3
"""Of `finding_panels`: a panel per finding and one for all of them."""


def page(title: str, subtitle: str) -> Figure:
    """An empty figure of 1500 x 1020 pixels with a heading."""
    # Inches that binary fractions hold, as versions of Matplotlib round others differently.
    figure = Figure(figsize=(15.625, 10.625), dpi=96, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.04, 0.965, title, fontsize=17, fontweight="bold", color=BLACK)
    figure.text(0.04, 0.942, subtitle, fontsize=11, color=BLACK)
    return figure


def cohort_line(test: Predictions, protocol: str) -> str:
    """Number of studies and patients of a figure, and its protocol."""
    patients = len(set(test.patient_ids.tolist()))
    return f"{len(test)} studies of {patients} patients; protocol {protocol}: {MEANINGS[protocol]}"


def finding_panels(figure: Figure, x: str, y: str) -> list[Axes]:
    """Fifteen square panels over the unit square, with labels for their common axes."""
    frame = {"left": 0.05, "right": 0.985, "top": 0.89, "bottom": 0.105, "hspace": 0.32, "wspace": 0.16}
    panels = [figure.add_subplot(cell) for cell in figure.add_gridspec(ROWS, COLUMNS, **frame)]
    for place, ax in enumerate(panels):
        unit_square(ax)
        ax.tick_params(labelleft=place % COLUMNS == 0)
    figure.supxlabel(x, fontsize=12, y=0.055, color=BLACK)
    figure.supylabel(y, fontsize=12, x=0.012, color=BLACK)
    return panels


def unit_square(ax: Axes) -> None:
    """Axes from 0 to 1 on both sides, with a light grid."""
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], aspect="equal")
    bare(ax)


def bare(ax: Axes) -> None:
    """A light grid behind the curves, and no frame at the top and right."""
    ax.tick_params(labelsize=9, colors=BLACK)
    ax.grid(color="#E4E4E4", lw=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def diagonal(ax: Axes) -> None:
    """A dotted line from corner to corner: chance, or perfect calibration."""
    ax.plot([0, 1], [0, 1], color=GRAY, lw=0.8, ls=":")


def title_panel(ax: Axes, label: str, y: np.ndarray) -> bool:
    """Name a panel with its counts; False, and said in the panel, when one class is missing."""
    positives = int((y == 1).sum())
    ax.set_title(f"{label}\n{positives} of {len(y)}", fontsize=10, color=BLACK)
    if 0 < positives < len(y):
        return True
    ax.text(0.5, 0.5, "one class only:\nno curve", ha="center", va="center", fontsize=10, color=BLACK)
    return False


def note(ax: Axes, text: str, corner: str, colour: str = BLACK, line: int = 0) -> None:
    """Text in a corner such as `lower right`, `line` lines from it."""
    vertical, horizontal = corner.split()
    x = 0.97 if horizontal == "right" else 0.03
    y = 0.04 + 0.095 * line if vertical == "lower" else 0.96 - 0.095 * line
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5}
    va = "bottom" if vertical == "lower" else "top"
    ax.text(x, y, text, ha=horizontal, va=va, fontsize=10, color=colour, bbox=box, transform=ax.transAxes)


def legend(figure: Figure, entries: Mapping[str, tuple[str, str, str]]) -> None:
    """A legend at the top right; an entry is marker, colour and line style."""
    ax = figure.axes[0]
    handles = [
        ax.plot([], [], marker=marker, color=colour, ls=line, label=name)[0]
        for name, (marker, colour, line) in entries.items()
    ]
    place = {"loc": "upper right", "bbox_to_anchor": (0.99, 0.995)}
    figure.legend(handles=handles, ncols=len(handles), frameon=False, fontsize=11, **place)


def save(figure: Figure, path: str | Path, synthetic: bool, explained: str = "") -> Path:
    """Write a figure with the footer as a PNG, atomically; the footer is in the file's metadata too.

    `explained` stands at the bottom right.
    """
    if explained:
        figure.text(0.985, 0.018, explained, ha="right", fontsize=10, color=BLACK)
    figure.text(0.04, 0.018, footer(synthetic), fontsize=11, color=VERMILION, fontweight="bold")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Warning": footer(synthetic)})
    return Path(path)
