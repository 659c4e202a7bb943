"""The report beside the image: what the teacher takes from it, the words that moved it, and where the two disagree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from cxr_page.chart import state_html
from cxr_page.images import CaseImage, pixels_of
from cxr_page.look import accepted, block, esc, guarded, html_table, note, plain
from cxr_page.models import Opened, read_report, reader, words
from cxr_page.run_index import TEACHER, RunIndex
from mlx_cxr.core.labels import LABELS
from mlx_cxr.evaluation.operating_points import ABSTAIN
from mlx_cxr.explain.word_scores import READING, TextExplanation, shared_scale, signed
from mlx_cxr.inference.answers import LONGEST, ImageAnswer, ReportAnswer
from mlx_cxr.pages.case_page import disagreements
from mlx_cxr.pages.token_page import RAMP, words_html

if TYPE_CHECKING:
    from mlx_cxr.inference import ReportReader

_LONGEST_FILE = 1_000_000
_WORDS_AT_ONCE = 60


def report_panel(index: RunIndex, models: Sequence[Opened], image: CaseImage, answers: Sequence[ImageAnswer]) -> None:
    """The section; what it read is left in the session as `report_read`, for the download."""
    st.subheader("Report", anchor=False)
    st.session_state["report_read"] = st.session_state["report_words"] = None
    teachers = index.usable(TEACHER)
    if not teachers:
        note(
            "No teacher is scored yet, so reports cannot be read here: ./scripts/demo makes one, or lfm_finetune and "
            "cache_teacher_outputs."
        )
        return
    note(
        "A report is text that a person wrote about the film. The teacher reads it, so its answers say what the text "
        "says, not what the film shows."
    )
    _of_this_image(image)
    left, right = st.columns([3, 2], gap="large")
    with right:
        entry = teachers[0]
        if len(teachers) > 1:
            entry = st.selectbox("Teacher", teachers, format_func=lambda one: one.name, key="teacher")
        _load(image)
    with left:
        text = st.text_area(
            "Report text", key="report", height=190, placeholder="Paste a report, or load one.", max_chars=None
        )
        wanted = st.button("Read the report", type="primary", key="read_report", disabled=not text.strip())
    if wanted:
        st.session_state["report_wanted"] = text
    if not text.strip() or st.session_state.get("report_wanted") != text:
        return
    teacher = reader(str(entry.folder), entry.stamp)
    pixels = pixels_of(image, teacher.transform) if teacher.needs_image else None
    said = read_report(teacher, text, pixels, image.key)
    st.session_state["report_read"] = (teacher, said)
    _what_it_read(teacher, said)
    for opened, answer in zip(models, answers, strict=True):
        _disagreements(opened, answer, said)
    _beside(models, answers, said, teacher)
    with guarded("words"):
        _words(teacher, said, image)


def _of_this_image(image: CaseImage) -> None:
    """Another image's report is not this one's: begin anew."""
    if st.session_state.get("report_of") != image.key:
        st.session_state["report_of"] = image.key
        st.session_state["report"] = ""
        st.session_state.pop("report_wanted", None)


def _load(image: CaseImage) -> None:
    if image.sample is not None and image.sample.report:
        st.button("Load and read this study's report", on_click=_take, args=(image.sample.report,), key="load_report")
    elif image.sample is not None:
        note("This study has no report.")
    uploaded = st.file_uploader(
        "Report as a text file",
        key=f"report_file {image.key}",
        type=["txt"],
        **accepted(st.file_uploader, max_upload_size=1),
    )
    if uploaded is None:
        return
    content = uploaded.getvalue()
    if st.session_state.get("report_file_taken") == uploaded.file_id:
        return
    if len(content) > _LONGEST_FILE:
        st.error(f"{len(content):,} bytes; a report has at most {LONGEST:,} characters.")
        return
    if b"\0" in content[:4096]:
        st.error("This is no text file.")
        return
    st.session_state["report_file_taken"] = uploaded.file_id
    st.session_state["report"] = content.decode("utf-8", errors="replace").lstrip("\ufeff")
    st.session_state["report_wanted"] = st.session_state["report"]


def _take(text: str) -> None:
    st.session_state["report"] = text
    st.session_state["report_wanted"] = text


def _what_it_read(teacher: ReportReader, said: ReportAnswer) -> None:
    names = ", ".join(dict.fromkeys(name for name, _ in said.sections))
    parts = [f"{teacher.teacher.folder.name} may read: {teacher.reads}. Read here: {names}."]
    if said.note:
        parts.append(said.note)
    if said.cut:
        parts.append(f"The prompt had no room for {said.cut} more tokens of the report; they were not read.")
    st.markdown(plain(" ".join(parts)))


def _disagreements(opened: Opened, answer: ImageAnswer, said: ReportAnswer) -> None:
    """Findings that the image's model and the report's reader call differently."""
    found = disagreements(answer, said)
    both = int(((answer.states != ABSTAIN) & (said.states != ABSTAIN)).sum())
    if found:
        title = f"Film ({opened.name}) and report disagree on {len(found)} of the {both} findings that both call"
        lines = "".join(f"\n- {plain(one.words())}" for one in found)
        st.warning(f"**{plain(title)}**{lines}", icon=":material/compare_arrows:")
    else:
        agree = "there is no finding that both call"
        if both:
            agree = "they agree on " + (f"all {both} findings" if both > 1 else "the one finding") + " that both call"
        st.info(plain(f"Film ({opened.name}) and report: {agree}."), icon=":material/compare_arrows:")


def _beside(
    models: Sequence[Opened], answers: Sequence[ImageAnswer], said: ReportAnswer, teacher: ReportReader
) -> None:
    named = {f"film, {opened.name}": answer for opened, answer in zip(models, answers, strict=True)}
    named[f"report, {teacher.teacher.folder.name}"] = said
    order = np.argsort(-said.probabilities, kind="stable").tolist()
    rows = []
    for k in order:
        said_by = (f"{one.probabilities[k]:.2f}&ensp;{state_html(int(one.states[k]))}" for one in named.values())
        rows.append([esc(LABELS[k]), *said_by])
    block(html_table("Film and report, finding by finding", ["finding", *named], rows, frozenset(range(1, 4))))


def _words(teacher: ReportReader, said: ReportAnswer, image: CaseImage) -> None:
    st.subheader("Words that moved the answer", anchor=False)
    first = max(range(len(LABELS)), key=lambda k: (int(said.states[k]) == 1, float(said.probabilities[k])))
    mark = (said.logits.tobytes(), image.key)
    if st.session_state.get("word_finding_of") != mark:
        st.session_state["word_finding_of"] = mark
        st.session_state["word_finding"] = LABELS[first]
    finding = st.selectbox("Finding in the report", LABELS, key="word_finding")
    count = sum(len(text.split()) for _, text in said.sections)
    if count > _WORDS_AT_ONCE and not st.toggle(
        f"Show them: reads the report {count + 1} times, and others wait meanwhile", key=f"words {mark}"
    ):
        return
    with st.spinner("Leaving out words …"):
        explained = words(teacher, said, finding, image.name)
    st.session_state["report_words"] = explained
    st.markdown(plain(f"{finding}: {explained.summary()}"))
    block(coloured_report(explained))
    note(f"{explained.check()} {READING}")


def coloured_report(explained: TextExplanation) -> str:
    """A report with each word on a ground that says how it moved the logit, and the legend.

    The scale is the report's own (`word_scores.shared_scale`), with its floor.
    """
    scores = explained.scores
    scale = shared_scale([scores.shown])
    strongest = sorted(range(len(scores.words)), key=lambda i: -abs(scores.shown[i]))[:6]
    listed = "; ".join(f"“{scores.words[i]}” {signed(float(scores.shown[i]))}" for i in strongest)
    return (
        f'<div class="cxr-words" role="group" aria-label="The report as read">{words_html(scores, scale)}</div>'
        '<div style="padding-top:.5rem"><div class="cxr-ramp" style="background:linear-gradient(to right, '
        f'{RAMP})"></div>'
        f'<div class="cxr-axis"><span>{signed(-scale, 1)} and less</span><span>0</span>'
        f"<span>{signed(scale, 1)} and more</span></div></div>"
        f'<div class="cxr-note">Effect on the logit: orange words raised it, blue ones lowered it. '
        f"Strongest: {esc(listed)}.</div>"
    )
