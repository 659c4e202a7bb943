"""The one verdict on what maps are worth: against the strongest of their controls, read off `localization.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONTROLS = ("random", "swapped", "usual", "centre")
"""Guesses that a map has to beat: random maps, the maps of other patients with the finding, its mean map over
validation images, and the image's centre. Chance from the mask's area is left out: it is what random maps are expected
to score, and no guess."""


@dataclass(frozen=True)
class MapVerdict:
    """Maps of a finding against the strongest control.

    Attributes:
        control: its name, one of `CONTROLS`.
        mean: its mean score.
        difference: maps minus control, {value, low, high, replicates, drawn}; NaN or None where undefined.
        better: True where the interval of the difference lies above 0; False without an interval.
    """

    control: str
    mean: float
    difference: Mapping[str, Any]
    better: bool


def map_verdict(entry: Mapping[str, Any], score: str = "hit") -> MapVerdict:
    """Compare the maps with the control that scored highest on the same images.

    The strongest of the controls is chosen by their means on test. That is conservative against the maps: the control
    has the benefit of the choice, its mean being the largest of several noisy ones, and the maps have none.

    Args:
        entry: `macro` or an entry of `per_label` of `localization_table`, or of the file read back.
        score: such as `hit` or `iou`.

    Returns:
        The verdict. Controls whose mean is undefined (maps of other patients, where there is one) are passed over;
        of equal ones the first in `CONTROLS` is taken.

    Raises:
        KeyError: the entry has no such score, or none of the controls is defined for it.
    """
    arms = entry[score]
    means = {control: arms[control]["mean"]["value"] for control in CONTROLS if control in arms}
    means = {control: mean for control, mean in means.items() if mean is not None and not math.isnan(mean)}
    if not means:
        raise KeyError(f"{score}: none of the controls {', '.join(CONTROLS)} is defined")
    control = max(means, key=means.__getitem__)
    difference = arms[control]["difference"]
    return MapVerdict(control, means[control], difference, difference["low"] is not None and difference["low"] > 0)
