"""The 14 findings of an image as a chart that is a table to a screen reader, and as a plain table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cxr_page.look import esc, html_table
from mlx_cxr.core.labels import LABELS
from mlx_cxr.evaluation.operating_points import ABSENT, ABSTAIN, PRESENT, OperatingPoints
from mlx_cxr.pages.case_page import by_margin

STATES = {PRESENT: ("is-present", "present"), ABSTAIN: ("is-abstains", "abstains"), ABSENT: ("is-absent", "absent")}
"""Call to style and word, in the order of the chart; a style's mark is a full, half or empty disc, so that no call is
shown by colour alone."""
GROUPS = {PRESENT: "Called present", ABSTAIN: "Abstains: no call", ABSENT: "Called absent"}


@dataclass(frozen=True)
class Row:
    """A finding on one image.

    Attributes:
        finding: its name.
        probability: calibrated, in [0, 1].
        threshold: on it; None where validation could choose none.
        low, high: the model abstains where the probability lies between these; see `OperatingPoints.abstention_zone`.
        state: PRESENT, ABSENT or ABSTAIN.
        reason: why it abstains, in words; empty where it makes a call.
        label: what the report's label says, in words; empty where that is not known.
    """

    finding: str
    probability: float
    threshold: float | None
    low: float
    high: float
    state: int
    reason: str
    label: str = ""


def rows_of(
    probabilities: np.ndarray, states: np.ndarray, points: OperatingPoints, labels: Mapping[str, str] | None = None
) -> list[Row]:
    """The findings, called present first, then those abstained on, then those called absent.

    Within each group those furthest above their threshold come first (`case_page.by_margin`).
    """
    order = {call: place for place, call in enumerate(STATES)}
    columns = sorted(by_margin(probabilities, points), key=lambda k: order[int(states[k])])
    return [
        Row(
            LABELS[k],
            float(probabilities[k]),
            float(points.thresholds.values[k]) if points.tuned[k] else None,
            *points.abstention_zone(k),
            int(states[k]),
            points.reason(k, float(probabilities[k])) if int(states[k]) == ABSTAIN else "",
            (labels or {}).get(LABELS[k], ""),
        )
        for k in columns
    ]


def state_html(state: int) -> str:
    """A call as mark and word."""
    style, word = STATES[state]
    return f'<span class="cxr-state {style}"><i aria-hidden="true"></i>{word}</span>'


def chart_html(rows: Sequence[Row], name: str, chosen: str = "", grouped: bool = True) -> str:
    """The chart.

    Args:
        rows: of `rows_of`.
        name: of the model, for screen readers.
        chosen: the finding whose map is shown; its row is marked.
        grouped: with a head over the rows of each call; else in the order given.
    """
    body = ""
    for state, title in GROUPS.items() if grouped else ():
        group = [row for row in rows if row.state == state]
        if group:
            body += f'<div role="row"><div role="cell" class="cxr-group">{title} · {len(group)}</div></div>'
            body += "".join(_row(row, row.finding == chosen) for row in group)
    if not grouped:
        body = "".join(_row(row, row.finding == chosen) for row in rows)
    axis = (
        '<div class="cxr-row" aria-hidden="true"><div></div><div class="cxr-axis track-cell"><span>0</span>'
        "<span>calibrated probability</span><span>1</span></div></div>"
    )
    return (
        f'<div class="cxr-chart" role="table" aria-label="{esc(f"The 14 findings by {name}")}">{body}</div>'
        f"{axis}{_LEGEND}"
    )


def _row(row: Row, chosen: bool) -> str:
    style = STATES[row.state][0] + (" is-chosen" if chosen else "")
    said = f"probability {row.probability:.2f}; {_against(row)}" + (f"; {row.reason}" if row.reason else "")
    zone = f'<span class="zone" style="left:{100 * row.low:.2f}%;width:{100 * (row.high - row.low):.2f}%"></span>'
    tick = "" if row.threshold is None else f'<span class="tick" style="left:{100 * row.threshold:.2f}%"></span>'
    track = (
        f'<div class="cxr-track" aria-hidden="true"><span class="base"></span>{zone if row.high > row.low else ""}'
        f'<span class="bar" style="width:{max(100 * row.probability, 0.6):.2f}%"></span>{tick}</div>'
    )
    return (
        f'<div class="cxr-row {style}" role="row" title="{esc(row.finding + ": " + said)}">'
        f'<div class="name" role="rowheader">{esc(row.finding)}</div>'
        f'<div class="track-cell" role="cell">{track}<span class="cxr-hidden">{esc(said)}</span></div>'
        f'<div class="num" role="cell">{row.probability:.2f}</div><div role="cell">{state_html(row.state)}</div></div>'
    )


def _against(row: Row) -> str:
    if row.threshold is None:
        return "no threshold could be tuned"
    zone = f"abstains from {row.low:.2f} to {row.high:.2f}" if row.high > row.low else "never abstains"
    return f"threshold {row.threshold:.2f}; {zone}"


_LEGEND = (
    '<div class="cxr-legend" aria-hidden="true">'
    '<span class="is-present"><span class="cxr-track"><span class="base"></span><span class="bar" '
    'style="width:70%"></span>'
    "</span>probability</span>"
    '<span><span class="cxr-track"><span class="base"></span><span class="tick" '
    'style="left:50%"></span></span>threshold</span>'
    '<span><span class="cxr-track"><span class="base"></span><span class="zone" '
    'style="left:15%;width:70%"></span></span>'
    "no call is made in here</span></div>"
)


def table_html(rows: Sequence[Row], name: str) -> str:
    """The same as a table, with thresholds, zones, reasons and the report's labels."""
    labelled = any(row.label for row in rows)
    head = ["finding", "probability", "threshold", "abstains between", "call", "why no call"]
    head += ["report label"] if labelled else []
    cells = []
    for row in rows:
        zone = f"{row.low:.3f} to {row.high:.3f}" if row.high > row.low else "–"
        threshold = "none" if row.threshold is None else f"{row.threshold:.3f}"
        cell = [
            esc(row.finding),
            f"{row.probability:.3f}",
            threshold,
            zone,
            state_html(row.state),
            esc(row.reason or "–"),
        ]
        cells.append(cell + ([esc(row.label or "not mentioned")] if labelled else []))
    return html_table(f"The 14 findings by {name}", head, cells, frozenset((1, 2, 3)))
