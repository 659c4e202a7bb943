"""The sections of `findings.md` that check the maps: against marked places, and against randomized weights.

The words for the verdict of `evaluation.map_verdict`, on every page that gives it, are here too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_cxr.core.formatting import interval_text, number
from mlx_cxr.evaluation.map_verdict import map_verdict
from mlx_cxr.pages.tables import markdown_table

SCORE_NAMES = {
    "hit": "Pointing game: share of films whose map peaks on the finding",
    "hit_half_cell": "Pointing game, a miss by half a cell of the map allowed",
    "iou": "IoU of the map's strongest pixels with the mask",
    "mass": "Share of the map's sum on the finding",
}
CONTROL_NAMES = {
    "random": "random maps",
    "swapped": "other patients' maps of it",
    "usual": "its usual place on validation films",
    "centre": "a guess at the film's centre",
}
ALL_CONTROLS = ", ".join(CONTROL_NAMES.values())
"""Whose strongest the verdict is against, for a sentence about a finding."""


def found(per_label: Mapping[str, Any], score: str = "hit") -> list[str]:
    """The findings whose maps are better than their strongest control."""
    return [label for label, entry in per_label.items() if map_verdict(entry, score).better]


def table_rows(table: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Title, number of images and entry of every finding in `localization.json`, and of their mean."""
    rows = [(name, str(entry["films"]), entry) for name, entry in table["per_label"].items()]
    return [*rows, (f"**mean of {table['macro']['labels']}**", "", table["macro"])]


def localization_markdown(
    table: Mapping[str, Any], names: Mapping[str, str], against: Sequence[str] = ("swapped", "usual")
) -> str:
    """`localization_table` as Markdown, one table per score, for a page that carries the notice.

    Args:
        table: of `localization_table`, or read back from JSON.
        names: score to its heading; scores without one are left out.
        against: controls whose difference from the maps is shown with its interval, beside that of the strongest; all
            controls' means are shown.

    Raises:
        KeyError: the table has no such score or control.
    """
    boot, lines = table["bootstrap"], []
    if boot["samples"]:
        lines += [f"In brackets 95 % intervals from {boot['samples']} resamples of patients.", ""]
    for score, heading in names.items():
        controls = [name for name in table["macro"][score] if name != "maps"]
        rows = []
        for name, images, entry in table_rows(table):
            arms, verdict = entry[score], map_verdict(entry, score)
            means = (number(arms[control]["mean"]["value"]) for control in controls)
            differences = (interval_text(arms[control]["difference"]) for control in against)
            strongest = f"{interval_text(verdict.difference)} {verdict.control}"
            rows.append([name, images, interval_text(arms["maps"]), *means, *differences, strongest])
        heads = ["finding", "films", "maps", *controls, *(f"maps − {control}" for control in (*against, "strongest"))]
        lines += [f"**{heading}**", "", *markdown_table(heads, rows, right=(1,))]
    return "\n".join(lines)


def localization_section(table: Mapping[str, Any]) -> list[str]:
    """The content of `localization.json` as a section."""
    rows = []
    for name, entry in table["per_label"].items():
        figures = (entry["films"], f"{entry['mask_area']:.1%}", entry["empty_maps"], entry["called"])
        rows.append([name, *map(str, figures), number(entry["hit_when_called"])])
    header = ["finding", "films", "mean mask area", "empty maps", "called positive", "pointing game when called"]
    return [
        "## Do the maps find the finding?",
        "",
        f"Films: {table['selection']}, called positive or not. Controls on the same films: random maps of the same "
        "resolution; the maps of other patients with the finding (`swapped`: what its usual place alone explains); "
        "that place itself, the finding's mean map over validation films (`usual`: it never saw the film); a guess "
        f"at the film's centre; and chance, from the mask's area. IoU takes the strongest {table['fraction']:.0%} of "
        f"the pixels; half a cell is {table['half_cell_px']:g} px. A map is empty where no part of the film raises the "
        "score, as for a film that the model finds no sign on; it counts as a miss. Maps are worth something where "
        "the interval of their difference from the strongest of random, swapped, usual and centre, named beside it, "
        "lies above 0.",
        "",
        localization_markdown(table, SCORE_NAMES),
        "**The films scored**",
        "",
        *markdown_table(header, rows, right=range(1, 6)),
    ]


def randomization_section(labels: Sequence[str], check: Mapping[str, np.ndarray]) -> list[str]:
    """Rank correlations with the maps of randomized networks as a section.

    Args:
        labels: K findings.
        check: of `explain.faithfulness.randomization_check`: step to float (draws, K, N).
    """
    draws, _, images = next(iter(check.values())).shape
    rows = [[label, *(number(_mean(values[:, k]), 2) for values in check.values())] for k, label in enumerate(labels)]
    rows.append([f"**mean of {len(labels)}**", *(number(_mean(values), 2) for values in check.values())])
    return [
        "## Do the maps depend on what was learned?",
        "",
        "Rank correlation of each map with that of the network whose last layers were shuffled (Adebayo et al., 2018), "
        f"mean over {draws} shuffles of {images} test films. Near 0: they do. Near 1: the maps would "
        "look the same without the training.",
        "",
        *markdown_table(["finding", *(f"randomized: {step}" for step in check)], rows),
    ]


def _mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")
