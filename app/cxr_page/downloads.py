"""The case as one page to keep: PDF and PNG."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import streamlit as st

from cxr_page.images import CaseImage
from cxr_page.look import note
from cxr_page.models import Opened
from cxr_page.viewer import View, heat_of, likeliest
from mlx_cxr.core.labels import MAPPED
from mlx_cxr.inference.answers import ImageAnswer
from mlx_cxr.pages.case_page import CasePage, ModelReading, draw_case


def offer_downloads(models: Sequence[Opened], image: CaseImage, answers: Sequence[ImageAnswer], view: View) -> None:
    """Two buttons; the page is drawn when one is pressed."""
    st.subheader("Keep this case", anchor=False)
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", f"case_{image.name}")[:80].rstrip("._")
    note(
        "One page: film, map, findings, abstentions and, where it was read, the report. Mind that it holds "
        "what the film shows."
    )
    left, right, _ = st.columns([1, 1, 3])
    page = case_page(models, image, answers, view)
    for place, kind, mime in ((left, "pdf", "application/pdf"), (right, "png", "image/png")):
        place.download_button(
            f"Download as {kind.upper()}",
            partial(draw_case, page, kind),
            file_name=f"{name}.{kind}",
            mime=mime,
            key=f"download_{kind}",
            on_click="ignore",
            width="stretch",
        )


def case_page(models: Sequence[Opened], image: CaseImage, answers: Sequence[ImageAnswer], view: View) -> CasePage:
    """The case as it is on the screen; where its finding has no map, with that of the likeliest one."""
    if view.finding not in MAPPED:
        view = replace(view, finding=likeliest(models[0], answers[0]))
    heat = heat_of(models[0], image, answers[0], view)
    teacher, said = st.session_state.get("report_read") or (None, None)
    return CasePage(
        models=tuple(
            ModelReading(opened.name, answer, opened.model.points)
            for opened, answer in zip(models, answers, strict=True)
        ),
        finding=view.finding,
        heat=heat,
        method=view.method,
        show_withheld=view.show_withheld,
        opacity=view.opacity,
        report=said,
        report_points=teacher.points if teacher else None,
        reads=teacher.reads if teacher else "",
        words=st.session_state.get("report_words") if said is not None else None,
        synthetic=any(opened.model.synthetic for opened in models) or bool(teacher and teacher.synthetic),
    )
