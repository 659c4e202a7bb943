"""A run on other cohorts: the pages of `evaluate_external`, drawn from its records."""

from __future__ import annotations

import streamlit as st

from cxr_page.look import choose, guarded, note, plain
from cxr_page.pages import show_markdown
from cxr_page.run_index import KINDS, RunIndex
from mlx_cxr.core.files import read_record
from mlx_cxr.core.runs import open_run
from mlx_cxr.evaluation.external import cohorts_of, read_external, results_path
from mlx_cxr.pages.external_page import external_markdown


def external_section(index: RunIndex) -> None:
    """The section; results of another state of the run, or damaged ones, are a sentence in the place of their page."""
    st.subheader("On other cohorts", anchor=False)
    runs = [run for run in index.usable(*KINDS) if cohorts_of(run.folder)]
    if not runs:
        note("No run was scored on another cohort yet: evaluate_external does it.")
        return
    entry = choose("Run", runs, lambda run: f"{run.name} ({run.kind})", "external_of")
    for cohort in cohorts_of(entry.folder):
        with st.expander(plain(cohort), expanded=True), guarded(f"{entry.name} on {cohort}"):
            places = results_path(entry.folder, cohort).with_name("localization.json")
            results = read_external(open_run(entry.folder), cohort)
            page = external_markdown(results, read_record(places) if places.exists() else None)
            show_markdown(page, places.parent)
