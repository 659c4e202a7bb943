"""Tables in Markdown, above all the one with a row per finding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_cxr.core.formatting import interval_text, number
from mlx_cxr.core.labels import LABELS

Column = tuple[str, Callable[[str | None], str]]
"""Head of a column, and its cell for a finding; None asks for that of the last row, the means."""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of a Markdown table, and an empty one; columns at the positions `right` are set to the right."""
    rule = ["---:" if column in right else "---" for column in range(len(header))]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)] + [""]


def finding_table(
    columns: Sequence[Column], last: str | None, right: Sequence[int] = (), findings: Sequence[str] = LABELS
) -> list[str]:
    """Lines of a table with a row per finding.

    Args:
        columns: after the first one, which holds the finding.
        last: head of the last row; None for a table without it.
        right: positions of columns set to the right, as `markdown_table`.
        findings: of the rows, in their order.
    """
    rows = [[finding, *(cell(finding) for _, cell in columns)] for finding in findings]
    rows += [[last, *(cell(None) for _, cell in columns)]] if last else []
    return markdown_table(["finding", *(head for head, _ in columns)], rows, right)


def columns_of(section: Mapping[str, Any], heads: Mapping[str, str]) -> list[Column]:
    """Columns of `finding_table` from a section with `per_label` and `macro`.

    Args:
        section: entries of the findings, and their means.
        heads: key of an entry to the head of its column. Its value is an interval or a count; empty where it lacks.
    """

    def cell(finding: str | None, key: str) -> str:
        value = entry_of(section, finding).get(key, "")
        return interval_text(value) if isinstance(value, Mapping) else str(value)

    return [(head, lambda finding, key=key: cell(finding, key)) for key, head in heads.items()]


def calibration_column(section: Mapping[str, Any], head: str) -> Column:
    """Calibration error of a section's entries, before and after temperature scaling."""
    return head, lambda finding: calibration_text(entry_of(section, finding))


def calibration_text(entry: Mapping[str, Any]) -> str:
    """Calibration error of an entry before and after temperature scaling: `0.081 → 0.032`."""
    return f"{number(entry['ece_uncalibrated'])} → {number(entry['ece'])}"


def mean_head(section: Mapping[str, Any]) -> str:
    """Head of the row of means: `**mean of 13**`."""
    return f"**mean of {len(section['macro_labels'])}**"


def entry_of(section: Mapping[str, Any], finding: str | None) -> Mapping[str, Any]:
    """The entry of a finding, or with None the means."""
    return section["macro"] if finding is None else section["per_label"][finding]
