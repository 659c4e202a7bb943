"""`final_comparison.json` as a table for spreadsheets, a block of a README, and lines for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from mlx_cxr.core.formatting import NOT_CLINICAL, footer, interval_text, number
from mlx_cxr.evaluation.comparison import PAIRS
from mlx_cxr.evaluation.metrics import METRICS
from mlx_cxr.pages.comparison_statement import (
    control_verdicts,
    external_sentences,
    gate_lines,
    reading_warnings,
    retention_sentence,
)
from mlx_cxr.pages.tables import calibration_text, markdown_table

SHOWN: Mapping[str, str] = {
    "roc_auc": "macro ROC-AUC",
    "average_precision": "avg. precision",
    "f1": "F1",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "brier": "Brier",
}
"""Metrics of the main table and their column heads."""
NAMES: Mapping[str, str] = {"cnn": "CNN", "teacher": "teacher", "student": "student"}
"""Roles in the head of a difference."""


def comparison_table(comparison: Mapping[str, Any]) -> pd.DataFrame:
    """`final_comparison.csv`: a row per protocol, model and finding (`macro` first), empty where undefined.

    Columns: `protocol`, `run`, `role`, `title`, `finding`, `positives`, `negatives`; each of `metrics.METRICS` with
    `_low` and `_high` (95 %); `ece` and `ece_uncalibrated`; `parameters`, `trainable`, `ms_per_sample`; for each other
    cohort ROC-AUC there and on the own test split over the same findings, `<cohort>_roc_auc` and `<cohort>_own_roc_auc`
    with `_low` and `_high`, under the protocol that temperatures and thresholds were fitted under.
    """
    rows = []
    for name, section in comparison["protocols"].items():
        for model in comparison["models"]:
            figures = section["models"][model["run"]]
            for finding, entry in {"macro": figures["macro"], **figures["per_label"]}.items():
                row = {"protocol": name, **{key: model[key] for key in ("run", "role", "title")}, "finding": finding}
                row |= {key: entry.get(key) for key in ("positives", "negatives")}
                for metric in METRICS:
                    row[metric] = entry[metric]["value"]
                    row |= {f"{metric}_{end}": entry[metric][end] for end in ("low", "high")}
                row |= {key: entry[key] for key in ("ece", "ece_uncalibrated")}
                row |= {key: model[key] for key in ("parameters", "trainable", "ms_per_sample")}
                for cohort in comparison["cohorts"]:
                    row |= _external_figures(model, cohort, finding) if name == comparison["fitted_under"] else {}
                rows.append(row)
    counts = ["positives", "negatives", "parameters", "trainable"]
    return pd.DataFrame(rows).astype(dict.fromkeys(counts, "Int64"))


def _external_figures(model: Mapping[str, Any], cohort: str, finding: str) -> dict[str, float | None]:
    """Columns of the CSV; without a value where the model, or the finding there, was not scored."""
    compared = (model["external"].get(cohort) or {"against_own": {"macro": None, "per_label": {}}})["against_own"]
    entry = compared["macro"] if finding == "macro" else compared["per_label"].get(finding)
    names = {"external": f"{cohort}_roc_auc", "own": f"{cohort}_own_roc_auc"}
    ends = {"value": "", "low": "_low", "high": "_high"}
    return {
        f"{name}{suffix}": entry and entry[side][end] for side, name in names.items() for end, suffix in ends.items()
    }


def external_cells(comparison: Mapping[str, Any], model: Mapping[str, Any], protocol: str) -> dict[str, str]:
    """Head to cell of a model's columns on other cohorts, which are of the protocol that fitted: none under others."""
    cells = {}
    for cohort in comparison["cohorts"] if protocol == comparison["fitted_under"] else ():
        entry = model["external"].get(cohort)
        for side, head in (("external", f"ROC-AUC on {cohort}"), ("own", f"own test, findings of {cohort}")):
            cells[head] = "–" if entry is None else interval_text(entry["against_own"]["macro"][side])
    return cells


def comparison_block(comparison: Mapping[str, Any]) -> str:
    """The README's block: the main table under the protocol that fitted, retention, gates, verdicts on controls."""
    counts, first = comparison["counts"], comparison["fitted_under"]
    cohort = "The cohort is synthetic. " if comparison["synthetic"] else ""
    lines = [
        f"{counts['studies']} test studies of {counts['patients']} patients; protocol `{first}`: "
        f"{comparison['protocols'][first]['meaning']}. {intervals_line(comparison)} These lines are written by the run "
        f"(`compare_models --update_readme`). {cohort}{NOT_CLINICAL}.",
        "",
        *main_table(comparison, first),
        cost_note(comparison),
        "",
        retention_sentence(comparison["protocols"][first]["retention"]),
        "",
        *(f"- Gate {line}." for line in gate_lines(comparison)),
        *(
            f"- Student minus the control `{targets}`: {interval_text(difference)}; {said}."
            for targets, difference, said in control_verdicts(comparison)
        ),
        "",
        " ".join(external_sentences(comparison)),
        "",
        *(line for warning in reading_warnings(comparison) for line in (warning, "")),
    ]
    return "\n".join(lines).rstrip()


def closing_comparison(comparison: Mapping[str, Any]) -> str:
    """The main figures as plain text of fixed width for a terminal, with gates, verdicts and the notice."""
    first, counts = comparison["fitted_under"], comparison["counts"]
    section = comparison["protocols"][first]
    columns = {key: SHOWN[key] for key in ("roc_auc", "average_precision", "f1")}
    elsewhere = external_cells(comparison, comparison["models"][0], first)
    rows = [("", "parameters", *columns.values(), *elsewhere, "ECE", "ms/sample")]
    for model in comparison["models"]:
        macro = section["models"][model["run"]]["macro"]
        cells = [interval_text(macro[key]) for key in columns]
        cells += external_cells(comparison, model, first).values()
        cost = count_text(model["parameters"]), milliseconds(model["ms_per_sample"])
        rows.append((model["title"], cost[0], *cells, number(macro["ece"]), cost[1]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"{counts['studies']} test studies of {counts['patients']} patients, protocol {first}: {section['meaning']}",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
        *(f"gate {line}" for line in gate_lines(comparison)),
        *external_sentences(comparison),
        *(
            f"student minus control {targets}: {interval_text(difference)}, {said}"
            for targets, difference, said in control_verdicts(comparison)
        ),
        footer(comparison["synthetic"]),
    ]
    return "\n".join(lines)


def main_table(comparison: Mapping[str, Any], name: str) -> list[str]:
    """Size, macro figures and cost of each model under a protocol, as lines of Markdown."""
    heads = {key: title for key, title in SHOWN.items() if key != "brier"}
    header = ["model", "parameters", "trainable", *heads.values(), "ECE before → after scaling", "Brier"]
    header += [*external_cells(comparison, comparison["models"][0], name), "ms/sample"]
    rows = []
    for model in comparison["models"]:
        macro = comparison["protocols"][name]["models"][model["run"]]["macro"]
        rows.append(
            [
                f"{model['title']} (`{model['run']}`)",
                count_text(model["parameters"]),
                count_text(model["trainable"]),
                *(interval_text(macro[key]) for key in heads),
                calibration_text(macro),
                interval_text(macro["brier"]),
                *external_cells(comparison, model, name).values(),
                milliseconds(model["ms_per_sample"]),
            ]
        )
    return markdown_table(header, rows, right=(1, 2, len(header) - 1))


def differences_table(comparison: Mapping[str, Any], name: str) -> list[str]:
    """Paired differences of the macro figures under a protocol, as lines of Markdown."""
    section = comparison["protocols"][name]
    pairs = {f"{NAMES[a]} − {NAMES[b]}": section["differences"][f"{a}_minus_{b}"] for a, b in PAIRS}
    pairs |= {f"student − `{run}`": entry for run, entry in section["controls"].items()}
    rows = [[title, *(interval_text(entry["macro"][key]) for key in SHOWN)] for title, entry in pairs.items()]
    return markdown_table(["difference", *SHOWN.values()], rows)


def cost_note(comparison: Mapping[str, Any]) -> str:
    """Meaning of the times and their machine, and the command that makes one that lacks."""
    timed = [model for model in comparison["models"] if model["cost"]]
    whats: dict[str, list[str]] = {}
    for model in timed:
        what = f"{model['cost']['what']}, on {_device(model['cost']['device'])}"
        whats.setdefault(what, []).append(f"`{model['run']}`")
    parts = []
    if timed:
        listed = "; ".join(f"{what} ({', '.join(runs)})" for what, runs in whats.items())
        parts.append(f"ms/sample is for {listed}.")
    if len({_device(model["cost"]["device"]) for model in timed}) > 1:
        parts.append("The machines differ, so these times are not comparable.")
    parts += [
        f"`{model['run']}` was not timed (it has no `cost.json`): `{model['make_cost']}` does it."
        for model in comparison["models"]
        if not model["cost"]
    ]
    return " ".join(parts)


def intervals_line(results: Mapping[str, Any]) -> str:
    """Meaning of the brackets on a page of results with `bootstrap`."""
    samples = results["bootstrap"]["samples"]
    if not samples:
        return "No intervals: no resamples were asked for."
    return f"In brackets 95 % intervals from {samples} resamples of patients."


def count_text(count: int | None) -> str:
    """A number of parameters for people: `812`, `11.2 k`, `11.18 M`, `1.60 B`; `–` when unknown."""
    if count is None:
        return "–"
    for size, unit, digits in ((1e9, " B", 2), (1e6, " M", 2), (1e3, " k", 1)):
        if count >= size:
            return f"{count / size:.{digits}f}{unit}"
    return str(count)


def p_text(p: float | None) -> str:
    """A p-value for people: three digits, `<0.001` below, `–` when undefined."""
    return "<0.001" if p is not None and not math.isnan(p) and p < 0.001 else number(p)


def milliseconds(value: float | None) -> str:
    """Milliseconds for people: about three digits, `–` when unknown."""
    return number(value, 2 if value is None or value < 10 else 1 if value < 100 else 0)


def _device(device: Mapping[str, Any]) -> str:
    cores = f", {device['cores']} cores" if device.get("cores") else ""
    return f"{device['kind']} backend{cores}"
