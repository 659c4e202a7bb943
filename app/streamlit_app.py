"""The page: `streamlit run app/streamlit_app.py` from the repository root, after `./scripts/demo`.

Other folders than `outputs`: `streamlit run app/streamlit_app.py -- --outputs DIR`.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import streamlit as st
from cxr_page.about import about_tab
from cxr_page.case import case_tab
from cxr_page.compare import compare_tab
from cxr_page.explain import explain_tab
from cxr_page.failures import failures_tab
from cxr_page.images import keep_uploads_in_memory
from cxr_page.look import STYLES, banner, guarded, icon, plain
from cxr_page.run_index import CNN, CONTROL, STUDENT, RunIndex, scan

from mlx_cxr.core.formatting import NOT_CLINICAL

TABS = {
    "Case": case_tab,
    "Compare models": compare_tab,
    "Failures": failures_tab,
    "Explain": explain_tab,
    "About": about_tab,
}
_KEPT = (
    "filter_label",
    "filter_error",
    "filter_category",
    "filter_view",
    "filter_call",
    "protocol",
    "figure",
    "example_finding",
)
"""Choices of tabs that are not drawn while another one is open; Streamlit would forget them."""


def main() -> None:
    """Draw the page; Streamlit calls this for every change."""
    st.set_page_config(
        page_title="mlx_cxr",
        page_icon=icon(),
        layout="wide",
        menu_items={"About": f"mlx_cxr: chest X-ray models that can be questioned. {NOT_CLINICAL}."},
    )
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("mlx_cxr.page").setLevel(logging.INFO)
    keep_uploads_in_memory()
    st.html(STYLES)
    outputs = arguments().outputs
    st.html(
        '<div class="cxr cxr-title"><h1>mlx_cxr</h1><span>What a model sees on a chest film, how sure it is, '
        "and where it looks</span></div>"
    )
    index = RunIndex(outputs, (), ())
    with guarded("runs"):
        index = scan(outputs)
    ready = [run for run in index.runs if not run.error]
    banner([run.name for run in ready if run.synthetic], [run.name for run in ready if not run.synthetic])
    if not index.usable(CNN, STUDENT, CONTROL):
        nothing_to_show(index)
        return
    for name in _KEPT:
        if name in st.session_state:
            st.session_state[name] = st.session_state[name]
    places = st.tabs(list(TABS), key="tab", on_change="rerun")
    for place, (name, draw) in zip(places, TABS.items(), strict=True):
        # The case is drawn always: an upload is forgotten when its widget is not.
        if place.open or name == "Case":
            with place, guarded(name):
                draw(index)
    if index.faulty:
        with st.expander(f"{len(index.faulty)} of {len(index.runs)} runs cannot be used"):
            for run in index.faulty:
                st.markdown(f"**{plain(run.name)}**: {plain(run.error)}")


def nothing_to_show(index: RunIndex) -> None:
    """Commands to run, where there is no model that could answer."""
    st.header("No model to show yet", anchor=False)
    st.markdown(
        f"There is no evaluated CNN or student under {plain(index.outputs)}. The whole pipeline on the built-in "
        "synthetic cohort takes about twenty minutes on two CPU cores:"
    )
    st.code("./scripts/demo", language="bash")
    st.markdown("Or train and evaluate a CNN on your own data:")
    st.code(
        "python -m mlx_cxr.train_cnn --config YOUR.yaml\npython -m mlx_cxr.evaluate_cnn --config YOUR.yaml",
        language="bash",
    )
    st.markdown("Runs elsewhere: `streamlit run app/streamlit_app.py -- --outputs DIR`.")
    if index.faulty:
        st.subheader("Runs that cannot be used", anchor=False)
        for run in index.faulty:
            st.error(plain(f"{run.name}: {run.error}"))


def arguments() -> argparse.Namespace:
    """Command line after `--`."""
    parser = argparse.ArgumentParser(prog="streamlit run app/streamlit_app.py --", description=__doc__)
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder of the runs; default: outputs")
    return parser.parse_known_args()[0]


if __name__ == "__main__":
    main()
