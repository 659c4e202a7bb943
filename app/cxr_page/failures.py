"""The Failures tab: every error of a student on test, to filter, and to open as a case."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from cxr_page.case import cohort_for, open_image
from cxr_page.look import choose, guarded, note, picture, plain
from cxr_page.models import predictor
from cxr_page.pages import show_markdown
from cxr_page.run_index import CONTROL, STUDENT, RunEntry, RunIndex
from mlx_cxr.core.files import RecordError, read_record
from mlx_cxr.data.tables import unguarded
from mlx_cxr.pages.failure_advice import closing_failures

_FOLDER = "failure_analysis"
_NEEDED = (
    *("study_id", "label", "raw_label", "error", "category", "confidence", "probability", "threshold"),
    "abstention",
)
_TITLES = {
    "study_id": "study",
    "label": "finding",
    "error": "error",
    "category": "category",
    "confidence": "confidence",
    "probability": "p",
    "threshold": "threshold",
    "call": "call",
    "view": "view",
    "sex": "sex",
    "age": "age",
    "abstention": "why no call is made",
}
_TEXTS = ("study_id", "patient_id", "sex", "view")
_ANY, _ABSTAINED = "any", "abstained on"


def failures_tab(index: RunIndex) -> None:
    """The tab."""
    st.header("Failures", anchor=False)
    analysed = [run for run in index.usable(STUDENT, CONTROL) if (run.folder / _FOLDER / "failures.csv").is_file()]
    if not analysed:
        st.info("No student's failures were analysed yet: ./scripts/demo does, and so does failure_analysis.")
        return
    entry = choose("Student", analysed, lambda run: run.name, "failures_of")
    folder = entry.folder / _FOLDER
    results = read_record(folder / "failures.json")
    lead, *points = closing_failures(results).splitlines()
    listed = "".join(f"\n- {_with_code(point[2:])}" for point in points if point.startswith("- "))
    st.markdown(f"**{plain(lead)}**\n" + listed)
    path = folder / "failures.csv"
    table = _table(str(path), f"{path.stat().st_mtime_ns}")
    spared = int((table["call"] == _ABSTAINED).sum())
    note(
        "A failure is a finding of a study whose probability lies on the other side of the threshold than the report's "
        f"label; on {spared} of these {len(table)} the model abstains, so that no call is shown. The label may be the "
        "one that is wrong. Confidence is the share of the way from the threshold to the end of the scale."
    )
    chosen = _filtered(table)
    st.markdown(f"**{len(chosen)} of {len(table)} failures**")
    if len(chosen):
        shown = chosen[[name for name in _TITLES if name in chosen]].rename(columns=_TITLES)
        st.dataframe(shown.round(3), hide_index=True, height=280, key="failure_table")
        with guarded("open"):
            _open(entry, chosen)
    if (folder / "confusions.png").is_file():
        with st.expander("Which findings are confused with which"):
            alt = "How often a false alarm of one finding goes with a label of another; the figures are in the summary."
            picture((folder / "confusions.png").read_bytes(), alt)
    if (folder / "summary.md").is_file():
        with st.expander("The whole summary, with the worst errors"):
            show_markdown((folder / "summary.md").read_text(encoding="utf-8"), folder)


@st.cache_resource(max_entries=4, show_spinner=False)
def _table(path: str, stamp: str) -> pd.DataFrame:
    # An id may read "NA", so that only an empty cell is none.
    table = pd.read_csv(path, dtype=dict.fromkeys((*_TEXTS, "abstention"), str), keep_default_na=False, na_values=[""])
    if lacking := [name for name in _NEEDED if name not in table]:
        raise RecordError(f"{path} lacks {', '.join(lacking)}; run failure_analysis again")
    texts = {name: table[name].map(unguarded, na_action="ignore") for name in _TEXTS if name in table}
    reasons = table["abstention"].fillna("")
    return table.assign(**texts, abstention=reasons, call=[_ABSTAINED if reason else "made" for reason in reasons])


def _filtered(table: pd.DataFrame) -> pd.DataFrame:
    columns = {"label": "Finding", "error": "Error", "category": "Category", "view": "View", "call": "Call"}
    columns = {name: title for name, title in columns.items() if name in table}
    for place, (name, title) in zip(st.columns(len(columns)), columns.items(), strict=True):
        options = [_ANY, *sorted(table[name].dropna().astype(str).unique())]
        if st.session_state.get(f"filter_{name}") not in options:
            st.session_state[f"filter_{name}"] = _ANY
        with place:
            wanted = st.selectbox(title, options, key=f"filter_{name}")
        if wanted != _ANY:
            table = table[table[name].astype(str) == wanted]
    return table


def _open(entry: RunEntry, chosen: pd.DataFrame) -> None:
    rows = chosen.to_dict("records")

    def title(place: int) -> str:
        row = rows[place]
        about = f"p {row['probability']:.2f} (threshold {row['threshold']:.2f}), study {row['study_id']}"
        return f"{row['label']}: {row['error']}, {about}"

    left, right = st.columns([4, 1], vertical_alignment="bottom")
    with left:
        place = st.selectbox("A failure", range(len(rows)), format_func=title)
    row = rows[place]
    sample = cohort_for(predictor(str(entry.folder), entry.stamp)).of_study(row["study_id"])
    with right:
        st.button(
            "Open as a case",
            type="primary",
            key="open_case",
            width="stretch",
            disabled=sample is None,
            on_click=open_image,
            args=(entry, sample.image_id if sample else "", row["label"]),
        )
    if sample is None:
        note(f"The film of study {row['study_id']} is not on this machine, so it cannot be opened.")


def _with_code(text: str) -> str:
    """Text as Markdown shows it, what stands between backticks as code."""
    return "`".join(part if i % 2 else plain(part) for i, part in enumerate(text.split("`")))
