"""Counts of a manifest and of the rows left out of it, for people (`manifest_summary.md`) and programs (`.json`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mlx_cxr.core.formatting import escaped
from mlx_cxr.core.labels import LABELS
from mlx_cxr.data.manifest import split_counts
from mlx_cxr.data.report_files import ReportTexts
from mlx_cxr.data.reports import FINDINGS, IMPRESSION, SECTIONS
from mlx_cxr.data.source_rows import MISSING_VIEW, SPLITS, SourceRows

SCHEMA = 1
_AGE_EDGES = (0, 20, 40, 60, 80, 121)
_AGE_BANDS = ("0-19", "20-39", "40-59", "60-79", "80+")
_UNKNOWN = "unknown"
_COUNTED = ("patients", "studies", "images")
_IN_ONE = "findings and impression in one"


def summarize(rows: SourceRows, reports: ReportTexts, before: pd.DataFrame | None) -> dict[str, Any]:
    """The counts of a manifest, as JSON-ready data.

    Args:
        rows: the manifest's rows, with the counts of those dropped.
        reports: where the texts came from.
        before: the rows that `rows` were sampled from, with study ids and labels; None when nothing was sampled.

    Keys:
        images_read: images (reports, where `text_only`) that the source lists: those kept and those dropped together.
        text_only: true for reports without images.
        dropped: reason -> images. dropped_examples: reason -> ids of the first of them.
        notes: anything else to know -> its count.
        splits: split -> patients, studies, images.
        labels: label -> split -> studies with 1, 0, -1 and empty.
        views: view -> split -> images. sex, age: group -> split -> studies.
        reports: counts, sections that served for the manifest's text, where they lie,
            and `unreadable_reports`, study -> why.
        report_sections: section -> split -> studies whose report has it; `any` for having a report, and
            `findings and impression in one` for the same text as both.
        sample: studies before and after, and the share of studies positive for each label; null when not sampled.
    """
    frame = rows.frame
    studies = frame.drop_duplicates("study_id")
    ages = pd.to_numeric(studies["age"], errors="coerce")
    bands = pd.cut(ages, _AGE_EDGES, right=False, labels=_AGE_BANDS).astype(object).where(ages.notna(), _UNKNOWN)
    return {
        "images_read": rows.read,
        "text_only": bool((frame["path"] == "").all()),
        "dropped": dict(rows.dropped),
        "dropped_examples": {reason: list(ids) for reason, ids in rows.examples.items()},
        "notes": dict(rows.notes),
        "splits": split_counts(frame),
        "labels": {name: _values(studies, name) for name in LABELS},
        "views": _by_split(frame["view"].replace("", MISSING_VIEW), frame["split"]),
        "sex": _by_split(studies["sex"].replace("", _UNKNOWN), studies["split"]),
        "age": _by_split(bands, studies["split"], (*_AGE_BANDS, _UNKNOWN)),
        "reports": {
            **reports.counts,
            "text_from": reports.served,
            "where": reports.where,
            "unreadable_reports": reports.unreadable,
        },
        "report_sections": _report_sections(reports.sections, studies),
        "sample": None if before is None else _sample(before.drop_duplicates("study_id"), studies),
    }


def render(summary: Mapping[str, Any], title: str, synthetic: bool) -> str:
    """The summary as Markdown that reads well on a terminal too."""
    kept = sum(counts["images"] for counts in summary["splits"].values())
    what, counted = ("reports", ("patients", "studies")) if summary["text_only"] else ("images", _COUNTED)
    notes = [(escaped(name), count) for name, count in summary["notes"].items()]
    dropped = [
        (escaped(reason), count, escaped(", ".join(summary["dropped_examples"].get(reason, ()))))
        for reason, count in summary["dropped"].items()
    ]
    lines = [f"# {title}", ""]
    if synthetic:
        lines += ["**Synthetic films: rendered by a program, not of people.**", ""]
    lines += ["Not for clinical use.", "", f"{summary['images_read']:,} {what} read, {kept:,} kept.", ""]
    lines += _table(("dropped because", what, "such as"), dropped, "Nothing was dropped.")
    if notes:
        lines += _table(("note", "count"), notes)
    lines += ["## Splits", ""]
    lines += _table(
        ("", *SPLITS, "all"),
        [_with_total(name, [summary["splits"][split][name] for split in SPLITS]) for name in counted],
    )
    lines += ["## Labels, by study: 1 / 0 / -1 / empty", ""]
    lines += _table(("", *SPLITS), [(name, *map(_quad, by.values())) for name, by in summary["labels"].items()])
    lines += [] if summary["text_only"] else _split_table("Views, by image", summary["views"])
    lines += _split_table("Sex, by study", summary["sex"])
    lines += _split_table("Age in years, by study", summary["age"])
    lines += ["## Report text", "", *_report_lines(summary["reports"])]
    if summary["reports"]["found"]:
        lines += _split_table("Sections of the reports, by study", summary["report_sections"])
    if summary["sample"]:
        lines += ["## Sample", "", *_sample_lines(summary["sample"])]
    return "\n".join(lines).rstrip() + "\n"


def _values(studies: pd.DataFrame, name: str) -> dict[str, dict[str, int]]:
    by_split = {}
    for split in SPLITS:
        values = studies.loc[studies["split"] == split, name].to_numpy()
        counts = {text: int((values == value).sum()) for text, value in (("1", 1), ("0", 0), ("-1", -1))}
        by_split[split] = {**counts, "empty": int(np.isnan(values).sum())}
    return by_split


def _by_split(groups: pd.Series, splits: pd.Series, order: Sequence[str] | None = None) -> dict[str, dict[str, int]]:
    table = pd.crosstab(groups.to_numpy(), splits.to_numpy()).reindex(columns=list(SPLITS), fill_value=0)
    names = table.sum(axis=1).sort_values(ascending=False, kind="stable").index if order is None else order
    return {
        str(name): {split: int(table.loc[name, split]) for split in SPLITS} for name in names if name in table.index
    }


def _report_sections(reports: Mapping[str, Mapping[str, str]], studies: pd.DataFrame) -> dict[str, dict[str, int]]:
    split_of = dict(zip(studies["study_id"], studies["split"], strict=True))
    counts = {name: dict.fromkeys(SPLITS, 0) for name in ("any", *SECTIONS, _IN_ONE)}
    for study, report in reports.items():
        there = ["any", *(name for name in SECTIONS if report[name])]
        there += [_IN_ONE] if report[FINDINGS] and report[FINDINGS] == report[IMPRESSION] else []
        for name in there:
            counts[name][split_of[study]] += 1
    return counts


def _sample(before: pd.DataFrame, after: pd.DataFrame) -> dict[str, Any]:
    """Positive shares by split, as validation and test may weigh more in a sample than in the source."""
    prevalence: dict[str, dict[str, dict[str, float]]] = {}
    for split in SPLITS:
        source, sample = (part[part["split"] == split] for part in (before, after))
        if len(source) and len(sample):
            prevalence[split] = {
                name: {
                    "source": float(np.mean(source[name].to_numpy() == 1)),
                    "sample": float(np.mean(sample[name].to_numpy() == 1)),
                }
                for name in LABELS
            }
    return {"studies_before": len(before), "studies_after": len(after), "positive_share": prevalence}


def _split_table(heading: str, groups: Mapping[str, Mapping[str, int]]) -> list[str]:
    rows = [_with_total(escaped(name), list(by.values())) for name, by in groups.items()]
    return [f"## {heading}", "", *_table(("", *SPLITS, "all"), rows)]


def _report_lines(reports: Mapping[str, Any]) -> list[str]:
    if not reports["found"]:
        return ["None found; the text column is empty.", ""]
    lines = [f"From {reports['where']}: {reports['found']:,} found, {reports['missing']:,} missing."]
    if reports["unreadable"]:
        first = next(iter(reports["unreadable_reports"].values()))
        lines.append(
            f"{reports['unreadable']:,} could not be read, and their studies have no report. The first: {first}."
        )
    if reports["not UTF-8"]:
        lines.append(f"{reports['not UTF-8']:,} were not UTF-8 and were read as Windows-1252 or UTF-16.")
    table = [(name, f"{count:,}", f"{count / reports['found']:.1%}") for name, count in reports["text_from"].items()]
    return [*lines, "", *_table(("text taken from", "reports", "share"), table)]


def _sample_lines(sample: Mapping[str, Any]) -> list[str]:
    shares = sample["positive_share"]
    rows = [
        (name, *(f"{by[name]['source']:.2%} -> {by[name]['sample']:.2%}" for by in shares.values())) for name in LABELS
    ]
    return [
        f"{sample['studies_after']:,} of {sample['studies_before']:,} studies. Share positive, source -> sample:",
        "",
        *_table(("", *shares), rows),
    ]


def _quad(values: Mapping[str, int]) -> str:
    return " / ".join(f"{count:,}" for count in values.values())


def _with_total(name: str, counts: Sequence[int]) -> tuple[object, ...]:
    return (name, *counts, sum(counts))


def _table(header: Sequence[str], rows: Sequence[Sequence[object]], when_empty: str = "") -> list[str]:
    if not rows:
        return [when_empty, ""] if when_empty else []
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [_line(row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])) for row in cells]
    rule = _line("-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:]))
    return [lines[0], rule, *lines[1:], ""]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
