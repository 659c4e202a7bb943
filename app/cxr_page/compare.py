"""The Compare models tab: `final_comparison.json` in words, figures and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import streamlit as st

from cxr_page.look import block, choose, esc, html_table, note, picture, plain, whiskers
from cxr_page.pages import without_pictures
from cxr_page.run_index import RunIndex
from mlx_cxr.core.formatting import interval_text, number
from mlx_cxr.core.labels import LABELS
from mlx_cxr.pages.comparison_statement import control_verdicts, gate_lines, reading_warnings, statement
from mlx_cxr.pages.comparison_tables import (
    SHOWN,
    cost_note,
    count_text,
    differences_table,
    external_cells,
    intervals_line,
    milliseconds,
)

_FINDING_METRICS = {"roc_auc": "ROC-AUC", "average_precision": "average precision", "f1": "F1"}


def compare_tab(index: RunIndex) -> None:
    """The tab."""
    st.header("Compare models", anchor=False)
    for one in index.comparisons:
        if one.error:
            st.error(plain(one.error))
    usable = [one for one in index.comparisons if not one.error]
    if not usable:
        st.info(
            "There is no comparison yet. ./scripts/demo makes one; so does compare_models, once a CNN, a teacher and a "
            "student are scored."
        )
        return
    chosen = choose("Comparison", usable, lambda one: one.folder.name, "comparison")
    record = chosen.record
    names = list(record["protocols"])
    first = record["fitted_under"]
    protocol = (
        st.segmented_control(
            "Labels that are not mentioned",
            names,
            default=first,
            format_func={"empty_negative": "count as absent", "empty_masked": "are left out"}.get,
            required=True,
            key="protocol",
            help="Published figures differ by it. Those of one protocol are not comparable with those of the other.",
        )
        or first
    )
    section, counts = record["protocols"][protocol], record["counts"]
    st.markdown(
        plain(f"{counts['studies']} test studies of {counts['patients']} patients; {section['meaning']}. ")
        + plain(intervals_line(record))
    )
    _macro(record, protocol)
    with st.container(border=True):
        st.subheader("What the figures support", anchor=False)
        st.markdown(without_pictures(statement(record)))
        for targets, difference, said in control_verdicts(record):
            st.markdown(f"- Student minus the control `{targets}`: {plain(interval_text(difference))}; {plain(said)}.")
        for line in gate_lines(record):
            st.markdown(plain(f"Gate {line}."))
    for warning in reading_warnings(record):
        st.warning(without_pictures(warning), icon=":material/menu_book:")
    _findings(record, section)
    with st.expander("Differences between models, paired by patient"):
        st.markdown("\n".join(differences_table(record, protocol)))
    _pictures(chosen.folder, protocol)
    csv = chosen.folder / "final_comparison.csv"
    if csv.is_file():
        st.download_button(
            "Download the table as CSV", csv.read_bytes(), csv.name, "text/csv", key="csv", on_click="ignore"
        )


def _macro(record: Mapping[str, Any], protocol: str) -> None:
    section = record["protocols"][protocol]
    st.subheader(f"Mean over {len(section['macro_labels'])} findings", anchor=False)
    macros = {model["title"]: section["models"][model["run"]]["macro"] for model in record["models"]}
    lines = {title: macro["roc_auc"] for title, macro in macros.items()}
    block(whiskers("Macro ROC-AUC of each model", lines, 0.5, 1.0, interval_text))
    note("Macro ROC-AUC: dot and 95 % interval, from 0.5 (chance) to 1.")
    rows = []
    for model in record["models"]:
        macro = section["models"][model["run"]]["macro"]
        rows.append(
            [
                f"{esc(model['title'])} <span class='cxr-note'>{esc(model['run'])}</span>",
                *(esc(interval_text(macro[key])) for key in SHOWN),
                esc(f"{number(macro['ece_uncalibrated'])} → {number(macro['ece'])}"),
                esc(count_text(model["parameters"])),
                esc(milliseconds(model["ms_per_sample"])),
                *map(esc, external_cells(record, model, protocol).values()),
            ]
        )
    head = ["model", *SHOWN.values(), "ECE before → after scaling", "parameters", "ms/sample"]
    head += external_cells(record, record["models"][0], protocol)
    block(html_table("Figures of each model", head, rows, frozenset(range(1, len(head)))))
    note(cost_note(record).replace("`", ""))


def _findings(record: Mapping[str, Any], section: Mapping[str, Any]) -> None:
    st.subheader("Finding by finding", anchor=False)
    metric = (
        st.segmented_control(
            "Figure",
            list(_FINDING_METRICS),
            default="roc_auc",
            format_func=_FINDING_METRICS.get,
            required=True,
            key="figure",
        )
        or "roc_auc"
    )
    models = [model for model in record["models"] if model["role"] != "control"]
    rows = []
    for label in LABELS:
        entries = [section["models"][model["run"]]["per_label"][label] for model in models]
        positives = f"{entries[0]['positives']} / {entries[0]['negatives']}"
        rows.append([esc(label), esc(positives), *(esc(interval_text(entry[metric])) for entry in entries)])
    head = ["finding", "present / absent", *(model["title"] for model in models)]
    caption = f"{_FINDING_METRICS[metric]} of each finding, with 95 % intervals"
    block(html_table(caption, head, rows, frozenset(range(1, len(head)))))
    note("–: test has one class of the finding only, so the figure is undefined.")


def _pictures(folder: Path, protocol: str) -> None:
    st.subheader("ROC and calibration", anchor=False)
    shown = {
        f"roc_{protocol}.png": "ROC curves of CNN, teacher and student for each finding; the areas are in the table "
        "above.",
        "calibration_comparison.png": "Reliability of CNN, teacher and student before and after temperature scaling; "
        "the calibration errors (ECE) are in the table above.",
    }
    for name, alt in shown.items():
        path = folder / name
        if path.is_file():
            picture(path.read_bytes(), alt, caption=alt)
        else:
            note(f"{name} is missing; compare_models makes it.")
