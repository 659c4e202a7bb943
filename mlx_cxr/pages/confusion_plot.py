"""The findings that are present where another one is called wrongly, as a matrix of lifts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm

from mlx_cxr.core.formatting import number
from mlx_cxr.core.labels import LABELS
from mlx_cxr.evaluation.confusions import MIN_COUNT
from mlx_cxr.pages.figures import BLACK, page, save

_FADED, _TOO_FEW = 0.25, "#E2E2E2"


def plot_confusions(path: str | Path, found: Mapping[str, Any], cohort: str, synthetic: bool) -> Path:
    """Write the matrix of lifts of `confusions` as a PNG, and return its path; `cohort` is a line on the studies."""
    figure = page("What is there when a finding is called wrongly", cohort)
    ax = figure.add_axes((0.19, 0.21, 0.68, 0.68))
    lift, clear = np.full((len(LABELS), len(LABELS)), np.nan), np.zeros((len(LABELS), len(LABELS)), dtype=bool)
    for a, called in enumerate(LABELS):
        for b, present in enumerate(LABELS):
            if a != b:
                interval = found[called]["present"][present]["lift"]
                lift[a, b], clear[a, b] = interval["value"], interval["low"] > 1 or interval["high"] < 1
    norm = TwoSlopeNorm(0, vmin=-2, vmax=2)
    opacity = np.where(clear, 1.0, _FADED)
    image = ax.imshow(np.log2(lift.clip(0.25, 4)), cmap="PuOr_r", norm=norm, aspect="auto", alpha=opacity)
    ax.set_facecolor(_TOO_FEW)
    for a, b in np.ndindex(lift.shape):
        if not np.isnan(lift[a, b]):
            cell, strong = found[LABELS[a]]["present"][LABELS[b]], clear[a, b] and not 0.4 < lift[a, b] < 2.5
            text = f"{number(lift[a, b], 1)}\nn={cell['count']}"
            look = {"color": "white" if strong else BLACK, "fontweight": "bold" if clear[a, b] else "normal"}
            ax.text(b, a, text, ha="center", va="center", fontsize=8, **look)
    called = [f"{label} ({found[label]['false_positives']})" for label in LABELS]
    ax.set_yticks(range(len(LABELS)), called, fontsize=10)
    ax.set_xticks(range(len(LABELS)), LABELS, fontsize=10, rotation=35, ha="right", rotation_mode="anchor")
    ax.set_ylabel("called, label absent (false positives)", fontsize=12, color=BLACK)
    ax.set_xlabel("label present in the same study", fontsize=12, color=BLACK)
    ax.tick_params(length=0, colors=BLACK)
    for edge in np.arange(0.5, len(LABELS) - 1):
        ax.axhline(edge, color="white", lw=1)
        ax.axvline(edge, color="white", lw=1)
    bar = figure.colorbar(image, cax=figure.add_axes((0.89, 0.21, 0.014, 0.68)), ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["¼ or less", "½", "1", "2", "4 or more"], fontsize=10)
    bar.set_label("lift: share among the false positives over the share anyway", fontsize=10, color=BLACK)
    explained = (
        "n: false positives with that label. Bold: the interval excludes 1; the others are faded. "
        f"Gray: fewer than {MIN_COUNT} to compare."
    )
    return save(figure, path, synthetic, explained)
