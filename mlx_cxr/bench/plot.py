"""One picture: milliseconds per image by batch size, MLX against PyTorch, and the training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlx_cxr.bench import inference, training
from mlx_cxr.bench.contenders import Row
from mlx_cxr.core.files import atomic_path
from mlx_cxr.pages.figures import BLACK, BLUE, VERMILION, bare

_COLOURS = {"mlx": BLUE, "torch": VERMILION}
_MARKERS = "osD^vP"


def plot(path: str | Path, result: Mapping[str, Any], rows: Sequence[Row]) -> Path | None:
    """Write the picture, 1500 x 700 pixels; None, and nothing written, where nothing of it was timed."""
    timed = [row for row in rows if row.timing is not None and row.section in (inference.SECTION, training.SECTION)]
    panels = [
        (title, chosen)
        for title, chosen in (
            ("forward pass, float32", _of(timed, inference.SECTION, ("float32",))),
            ("forward pass, half precision", _of(timed, inference.SECTION, ("float16", "bfloat16"))),
            ("training step", _of(timed, training.SECTION, tuple(training.TOLERANCE))),
        )
        if chosen
    ]
    if not panels:
        return None
    figure = Figure(figsize=(15.625, 7.292), dpi=96, facecolor="white")
    FigureCanvasAgg(figure)
    machine, settings = result["machine"], result["settings"]
    figure.text(0.04, 0.945, "ResNet-18, milliseconds per film", fontsize=17, fontweight="bold", color=BLACK)
    figure.text(
        0.04,
        0.905,
        f"{machine['kind']}, {machine['name']}, {machine['cores']} cores; films of "
        f"{settings['size']} px; medians with quartiles",
        fontsize=11,
        color=BLACK,
    )
    frame = {"left": 0.055, "right": 0.985, "top": 0.82, "bottom": 0.11, "wspace": 0.18}
    cells = figure.add_gridspec(1, len(panels), **frame)
    for place, (title, chosen) in enumerate(panels):
        _panel(figure.add_subplot(cells[place]), title, chosen)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return Path(path)


def _of(rows: Sequence[Row], section: str, precisions: tuple[str, ...]) -> list[Row]:
    return [row for row in rows if row.section == section and row.precision in precisions]


def _panel(ax: Axes, title: str, rows: Sequence[Row]) -> None:
    counts = {"mlx": 0, "torch": 0}
    batches = sorted({row.samples for row in rows})
    for name in dict.fromkeys(row.name for row in rows):
        mine = sorted((row for row in rows if row.name == name), key=lambda row: row.samples)
        framework = mine[0].framework
        style = counts[framework]
        counts[framework] += 1
        middle = [row.ms_per_sample for row in mine]
        spread = [
            [1000 * (row.timing.median - row.timing.lower) / row.samples for row in mine],
            [1000 * (row.timing.upper - row.timing.median) / row.samples for row in mine],
        ]
        ax.errorbar(
            [row.samples for row in mine],
            middle,
            yerr=spread,
            label=name,
            color=_COLOURS[framework],
            marker=_MARKERS[style % len(_MARKERS)],
            ls=("-", "--", ":", "-.")[style % 4],
            lw=1.6,
            ms=6,
            mec="white",
            mew=0.8,
            capsize=3,
        )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(batches, [str(batch) for batch in batches])
    ax.set_xticks([], minor=True)
    low, high = ax.get_ylim()
    ticks = [step * 10**power for power in range(-3, 5) for step in (1, 2, 5)]
    shown = [tick for tick in ticks if low <= tick <= high]
    ax.set_yticks(shown, [f"{tick:g}" for tick in shown])
    ax.set_yticks([], minor=True)
    ax.set_title(title, fontsize=12, fontweight="bold", color=BLACK)
    ax.set_xlabel("films per batch", fontsize=11, color=BLACK)
    # Room above the curves for the names.
    ax.set_ylim(low, high * (high / low) ** (0.06 * len(ax.get_legend_handles_labels()[1])))
    ax.legend(fontsize=9, loc="upper left", frameon=False)
    bare(ax)
