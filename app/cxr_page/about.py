"""The About tab: what the models are, were made of, and are not for."""

from __future__ import annotations

import platform

import streamlit as st

from cxr_page.external import external_section
from cxr_page.look import block, choose, esc, html_table, network_address, plain
from cxr_page.pages import show_markdown
from cxr_page.run_index import CNN, CONTROL, STUDENT, RunIndex
from mlx_cxr import __version__
from mlx_cxr.core.formatting import NOT_CLINICAL
from mlx_cxr.core.runs import package_versions
from mlx_cxr.inference.evaluated_run import EvaluatedRun
from mlx_cxr.publishing.model_card import model_card
from mlx_cxr.publishing.model_card_page import card_markdown


def about_tab(index: RunIndex) -> None:
    """The tab."""
    st.header("About", anchor=False)
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("What this is for", anchor=False)
        st.markdown(
            f"**{NOT_CLINICAL}.** The page shows what small research models make of a chest film, how sure they are, "
            "and where they look, so that they can be questioned. It is no medical device, and no decision about a "
            "person may rest on it. Calls and abstention hold for films like those of the validation split; for "
            "another hospital's, another age group's or another projection's nothing is known."
        )
    with right:
        st.subheader("Nothing leaves this machine", anchor=False)
        where = network_address()
        st.markdown(
            "Models, films and reports are read from this machine and computed on it. Uploads are kept in memory, are "
            "written to no disk, and are gone when the page is closed; only what you download yourself is kept. The "
            "page asks no other server for anything"
            + (
                ". **Streamlit's usage figures are switched on**: start it with `--browser.gatherUsageStats false`. "
                if st.get_option("browser.gatherUsageStats")
                else " and sends no usage figures. "
            )
            + (
                plain(f"It is served on {where}, so browsers on other machines can reach it.")
                if where
                else "It is served to browsers on this machine only."
            )
        )
    _runs(index)
    _card(index)
    external_section(index)
    st.subheader("Versions and licence", anchor=False)
    versions = {
        "mlx_cxr": __version__,
        "Python": platform.python_version(),
        "streamlit": st.__version__,
    } | package_versions()
    block(html_table("Installed versions", ["package", "version"], [[esc(k), esc(v)] for k, v in versions.items()]))
    st.markdown(
        "mlx_cxr is under the MIT licence. Weights that training starts from have their own licences "
        "(weights/README.md); weights trained on credentialed data, such as MIMIC-CXR, may not be passed on."
    )


def _runs(index: RunIndex) -> None:
    st.subheader("Runs on this machine", anchor=False)
    rows = [
        [
            esc(run.name),
            esc(run.kind),
            "cannot be used" if run.error else "synthetic cohort" if run.synthetic else "ready",
            esc(run.error or (f"evaluated {run.evaluated[:16].replace('T', ' ')} UTC" if run.evaluated else "")),
        ]
        for run in index.runs
    ]
    block(html_table(f"Folders under {index.outputs}", ["run", "kind", "state", "details"], rows))


def _card(index: RunIndex) -> None:
    runs = index.usable(CNN, STUDENT, CONTROL)
    st.subheader("Model card", anchor=False)
    if not runs:
        st.info("No CNN or student is evaluated, so there is no model card.")
        return
    entry = choose("Model", runs, lambda run: f"{run.name} ({run.kind})", "card_of")
    text, file = _card_text(str(entry.folder), entry.stamp), f"MODEL_CARD_{entry.name}.md"
    with st.container(border=True, height=620):
        show_markdown(text, entry.folder)
    st.download_button("Download the model card", text, file, "text/markdown", key="card_file", on_click="ignore")


@st.cache_resource(max_entries=8, show_spinner="Filling in the model card …")
def _card_text(folder: str, stamp: str) -> str:
    return card_markdown(model_card(EvaluatedRun.open(folder)))
