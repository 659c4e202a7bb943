"""Wording of figures and warnings, the same in every table, plot, picture and page."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

NOT_CLINICAL = "Research only, not for clinical use"
SYNTHETIC = "Synthetic cohort"


def escaped(text: object) -> str:
    """Text from data as Markdown shows it, on one line: no markup, picture, formula or HTML, also not in Streamlit."""
    line = re.sub(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*", " ", str(text))
    line = re.sub(r"([\\`*_{}\[\]<>#|~$:!&])", r"\\\1", line)
    # What begins a list, or underlines a heading.
    return re.sub(r"^(\s*\d*)([-+=.)])(?=[\s=-]|$)", r"\1\\\2", line)


def footer(synthetic: bool, own_image: bool = False) -> str:
    """The line under every picture.

    Args:
        synthetic: the model was trained on the synthetic cohort.
        own_image: the picture shows a user's image, not one of that cohort.
    """
    if not synthetic:
        return f"{NOT_CLINICAL}."
    return f"Model trained on a synthetic cohort. {NOT_CLINICAL}." if own_image else f"{SYNTHETIC}. {NOT_CLINICAL}."


def notice_lines(synthetic: bool) -> list[str]:
    """The Markdown block quote at the top of every table and page, and a blank line."""
    lines = [f"> **{NOT_CLINICAL}.**"]
    if synthetic:
        lines.append(
            f"> **{SYNTHETIC}:** films, reports and labels are drawn by a program; the figures say "
            "that the code works, and nothing about patients."
        )
    return [*lines, ""]


def number(value: float | None, digits: int = 3) -> str:
    """A figure for people: fixed digits, `–` when undefined."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def interval_text(interval: Mapping[str, Any], digits: int = 3, *, counted: bool = True) -> str:
    """`0.812 [0.760, 0.861]`; without the bracket when there is no interval, `–` when there is no value.

    Where some resamples left the figure undefined, and it is to be `counted`, the bracket says how many did not:
    `[0.760, 0.861; 58 of 60 resamples]`.
    """
    value, low, high = (interval[key] for key in ("value", "low", "high"))
    text = number(value, digits)
    if text == "–" or number(low) == "–":
        return text
    valid, drawn = interval.get("replicates", 0), interval.get("drawn", 0)
    some = f"; {valid:,} of {drawn:,} resamples" if counted and valid < drawn else ""
    return f"{text} [{number(low, digits)}, {number(high, digits)}{some}]"
