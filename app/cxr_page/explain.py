"""The Explain tab: how to read a map, what speaks for and against the maps of this run, and examples."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from cxr_page.look import choose, note, plain
from cxr_page.pages import sections_of, show_markdown
from cxr_page.run_index import CNN, STUDENT, RunIndex
from mlx_cxr.core.files import read_record
from mlx_cxr.core.labels import LABELS
from mlx_cxr.pages.map_checks import ALL_CONTROLS, found

_READING = """
- **A map says which parts of the film raise the finding's score.** It does not say that the finding is there, nor
  where its borders are. A bright spot on a film without the finding is the model's mistake made visible.
- **The scale is the same for every film.** 1 is the finding's reference activation: the 99th percentile of the
  maximum over all validation films. A map is never stretched film by film, so that a probability near 0 cannot
  glow.
- **A map is withheld where there is no call.** Below the threshold, and where the model abstains, a map would show
  what little there was as if it were something. “Show withheld maps” draws it all the same and says so.
- **Cells are coarse.** The network sees the film in cells of 16 or 32 pixels; the smooth shape is interpolation. A
  finding smaller than a cell is found in the right region at best.
- **The left of the picture is the patient's right**, as on any frontal film.
"""
_METHODS = """
- **Grad-CAM against the mean film** is Grad-CAM of the feature map less its mean over the validation films, at half a
  cell: what this film has beyond the others. It pointed best on films with the places marked.
- **Grad-CAM** weighs each channel of the last feature map by its mean gradient (Selvaraju et al.,
  arXiv:1610.02391).
- **HiResCAM** multiplies gradient and feature map cell by cell (Draelos and Carin, arXiv:2011.08891). This network
  ends in average pooling and one linear layer, so its gradient is the same in every cell and **the two are equal by
  construction**.
- **Grad-CAM++** weighs positive gradients by their share of the channel (Chattopadhyay et al., arXiv:1710.11063).
"""
_CALLS = """
- **Probability**: calibrated by a temperature fitted on validation.
- **Threshold**: chosen on validation, finding by finding. Probabilities of different findings are not to be
  compared with one another but each with its own threshold.
- **Abstention**: on validation, class-conditional conformal prediction gives the probabilities below which
  “present” can be ruled out, and above which “absent” can, each wrong for at most the share alpha of such studies.
  A call is made only where exactly one of the two is left and the threshold says the same. The hatched interval of
  the chart is where none is made.
"""


def explain_tab(index: RunIndex) -> None:
    """The tab."""
    st.header("Explain", anchor=False)
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("How to read a map", anchor=False)
        st.markdown(_READING)
    with right:
        st.subheader("How to read a call", anchor=False)
        st.markdown(_CALLS)
        st.subheader("The methods", anchor=False)
        st.markdown(_METHODS)
    runs = [run for run in index.usable(CNN, STUDENT) if (run.folder / "findings.md").is_file()]
    if not runs:
        st.info("No run has maps on test yet: evaluate_cnn makes them.")
        return
    st.divider()
    entry = choose("Run", runs, lambda run: run.name, "explained")
    sections = sections_of((entry.folder / "findings.md").read_text(encoding="utf-8"))
    checks = {head: body for head, body in sections.items() if head and head not in LABELS}
    st.subheader(plain(f"Are the maps of {entry.name} worth looking at?"), anchor=False)
    st.markdown(plain(verdict(entry.folder)))
    if not checks:
        note("This run has no checks of its maps.")
    for head, body in checks.items():
        with st.expander(plain(head), expanded=len(body) < 2500):
            show_markdown(body, entry.folder)
    pictured = [head for head in sections if head in LABELS]
    if pictured:
        st.subheader("Examples on test films", anchor=False)
        note(
            "Which studies are shown follows a rule: ranked by the confidence of the call, at evenly spaced ranks. "
            "They are examples, not a sample to estimate from."
        )
        finding = st.selectbox("Finding", pictured, key="example_finding")
        show_markdown(sections[finding], entry.folder)


def verdict(folder: Path) -> str:
    """The findings that a run's maps point at more often than their strongest control does."""
    path = folder / "localization.json"
    if not path.exists():
        return "Where the maps point was not tested: no film of the test split has the place of a finding marked."
    table = read_record(path)["per_label"]
    better = found(table)
    rest = [label for label in table if label not in better]
    return (
        f"On test films, maps point at the finding more often than the strongest of {ALL_CONTROLS}, for: "
        f"{', '.join(better) or 'none'}. That they do is not shown for: {', '.join(rest) or 'none'}."
    )
