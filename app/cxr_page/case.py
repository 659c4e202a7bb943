"""The Case tab: an image, what the models call on it, where they look, and its report."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from cxr_page.chart import STATES, chart_html, rows_of, table_html
from cxr_page.downloads import offer_downloads
from cxr_page.images import CaseImage, input_of, png
from cxr_page.look import block, guarded, note, picture, plain
from cxr_page.models import Opened, answer, predictor
from cxr_page.report import report_panel
from cxr_page.run_index import CNN, CONTROL, STUDENT, RunEntry, RunIndex
from cxr_page.samples import Cohort, Sample, cohort_of
from cxr_page.viewer import SAME_METHODS, View, likeliest, show_image
from mlx_cxr.core.labels import LABELS, MAPPED, label_index
from mlx_cxr.evaluation.operating_points import PRESENT
from mlx_cxr.inference.answers import ImageAnswer
from mlx_cxr.pages.overlay import MAX_OPACITY, image_tile
from mlx_cxr.pages.withheld_maps import METHOD_NAMES

SAMPLE, UPLOAD = "Sample", "Upload"
BOTH = "Side by side"
_STUDENT = "Student"


def open_image(entry: RunEntry, image_id: str, finding: str) -> None:
    """Have the Case tab show a test image as a student reads it; a callback of other tabs."""
    state = st.session_state
    state["tab"] = "Case"
    state["film_from"] = SAMPLE
    state["opened_film"] = state["sample"] = image_id
    state["wanted_finding"] = finding
    state[f"run_{_STUDENT}"] = entry
    if state.get("model") != BOTH:
        state["model"] = _STUDENT


def case_tab(index: RunIndex) -> None:
    """The tab."""
    st.html('<h2 class="cxr-hidden">Case</h2>')
    model, source, chosen = st.columns([4, 3, 8], gap="medium", vertical_alignment="top")
    with model:
        models = _choose_models(index)
    image = _choose_image(models, source, chosen)
    if image is None:
        st.info("Choose a sample or upload a film to begin.")
        return
    if not models:
        st.error("No model could be opened.")
        return
    answers = _answers(models, image)
    if answers is None:
        return
    _reset_finding(models, image, answers)
    view = _reading(models, image, answers)
    _tables(models, image, answers)
    st.divider()
    with guarded("report"):
        report_panel(index, models, image, answers)
    st.divider()
    with guarded("download"):
        offer_downloads(models, image, answers, view)


def _choose_models(index: RunIndex) -> list[Opened]:
    """The models that the reader chose, opened; one that cannot be is said and left out."""
    runs = {CNN: index.usable(CNN), _STUDENT: index.usable(STUDENT, CONTROL)}
    options = [title for title, found in runs.items() if found]
    options += [BOTH] if len(options) == 2 else []
    choice = st.segmented_control("Model", options, default=options[0], key="model", required=True) or options[0]
    chosen = {title: found[0] for title, found in runs.items() if choice in (title, BOTH)}
    if any(len(runs[title]) > 1 for title in chosen):
        with st.popover("Other runs"):
            for title in chosen:
                if len(runs[title]) > 1:
                    key = f"run_{title}"
                    chosen[title] = st.selectbox(f"{title} run", runs[title], format_func=_run_title, key=key)
    opened = []
    for entry in chosen.values():
        with guarded("model"):
            opened.append(predictor(str(entry.folder), entry.stamp))
    return opened


def _run_title(entry: RunEntry) -> str:
    return f"{entry.name} (control)" if entry.kind == CONTROL else entry.name


def _choose_image(models: Sequence[Opened], left: DeltaGenerator, right: DeltaGenerator) -> CaseImage | None:
    cohort = cohort_for(models[0]) if models else Cohort({}, "")
    options = [SAMPLE, UPLOAD] if cohort.offered else [UPLOAD]
    if st.session_state.get("film_from") not in options:
        st.session_state["film_from"] = options[0]
    with left:
        source = st.segmented_control("Film from", options, key="film_from", required=True) or options[0]
    with right:
        if source == SAMPLE:
            return _sample(cohort, models[0].name)
        if cohort.absent:
            note(f"{cohort.absent} Uploads work.")
        uploaded = st.file_uploader(
            "Chest film: JPEG, PNG or DICOM, up to 100 MB",
            key="upload",
            help="Told by its content, not by its name. Kept in memory, gone when the page is closed.",
        )
    return None if uploaded is None else CaseImage.of_upload(uploaded.name, uploaded.getvalue())


def cohort_for(opened: Opened) -> Cohort:
    """The test images that a model was evaluated on."""
    trained = opened.model.trained
    path = trained.config.manifest_path
    stamp = f"{path.stat().st_mtime_ns} {path.stat().st_size}" if path.exists() else ""
    return cohort_of(trained.config.model_dump_json(), trained.manifest_sha256, stamp)


def _sample(cohort: Cohort, run: str) -> CaseImage | None:
    offered = dict(cohort.offered)
    wanted = st.session_state.get("opened_film")
    if wanted and wanted not in offered and (sample := cohort.of_image(wanted)) is not None:
        offered = {wanted: sample} | offered
    if st.session_state.get("sample") not in offered:
        st.session_state["sample"] = next(iter(offered))
    chosen = st.selectbox(
        f"Test film ({len(offered)} of the test split of {run}, which its training has not seen)",
        list(offered),
        format_func=lambda image_id: offered[image_id].title,
        key="sample",
    )
    sample: Sample = offered[chosen]
    if sample.images > 1:
        note(
            f"The study has {sample.images} films; this is its film {sample.image_id}. Tables of studies "
            "give the mean of its films."
        )
    return CaseImage.of_sample(sample)


def _answers(models: Sequence[Opened], image: CaseImage) -> list[ImageAnswer] | None:
    """Each model's answer; None where none is given, and then the page says why."""
    seen = input_of(models[0], image)
    if seen.error:
        st.error(plain(f"{image.name}: {seen.error}"))
        return None
    if seen.concerns:
        concerns = plain("; ".join(seen.concerns))
        warning = st.empty()
        if st.toggle("Answer anyway", key=f"anyway {image.key}"):
            warning.warning(
                f"**Answered at your request.** The film {concerns}. The calls may mean nothing.",
                icon=":material/help:",
            )
        else:
            warning.warning(
                f"**No answer is given: this may be no upright frontal chest film.** It {concerns}. A model would "
                "answer with confidence all the same. About 1 in 100 real frontal films is stopped by mistake; if this "
                "is one, have it answered.",
                icon=":material/help:",
            )
            left, _ = st.columns([1, 1])
            with left:
                picture(png(image_tile(seen.pixels, 512)), f"The file {image.name} as the model would see it")
            return None
    if image.sample is None and any(model.model.synthetic for model in models):
        st.warning(
            "This model knows drawn films only. What it says of a film of yours shows how the page works, and no more.",
            icon=":material/draw:",
        )
    if seen.notes:
        note(f"About the file: {'; '.join(seen.notes)}.")
    return [answer(model, input_of(model, image), image.key) for model in models]


def _reset_finding(models: Sequence[Opened], image: CaseImage, answers: Sequence[ImageAnswer]) -> None:
    """For another image than before, take the finding that it is most about."""
    wanted = st.session_state.pop("wanted_finding", None)
    if st.session_state.get("finding_of") != image.key or wanted:
        st.session_state["finding_of"] = image.key
        st.session_state["finding"] = wanted or likeliest(models[0], answers[0])


def _reading(models: Sequence[Opened], image: CaseImage, answers: Sequence[ImageAnswer]) -> View:
    """Images, maps and charts."""
    if len(models) == 1:
        left, right = st.columns([5, 6], gap="large")
        with left:
            finding, place = st.container(), st.container()
            opacity, method = st.columns([4, 6], gap="medium")
            switches = st.container(horizontal=True)
        view = _choose_view(models, answers, (finding, method, opacity, switches))
        with place:
            show_image(models[0], image, answers[0], view)
        with right:
            st.subheader("Findings", anchor=False)
            rows = rows_of(answers[0].probabilities, answers[0].states, models[0].model.points)
            block(chart_html(rows, models[0].name, view.finding))
        return view
    view = _choose_view(models, answers, st.columns([4, 4, 3, 3], gap="medium"))
    order = _order(models, answers)
    for place, opened, said in zip(st.columns(len(models), gap="large"), models, answers, strict=True):
        with place:
            st.subheader(plain(opened.name), anchor=False)
            show_image(opened, image, said, view)
            rows = rows_of(said.probabilities, said.states, opened.model.points)
            rows.sort(key=lambda row: order.index(row.finding))
            block(chart_html(rows, opened.name, view.finding, grouped=False))
    return view


def _order(models: Sequence[Opened], answers: Sequence[ImageAnswer]) -> list[str]:
    """The findings in the order of the first model's chart."""
    return [row.finding for row in rows_of(answers[0].probabilities, answers[0].states, models[0].model.points)]


def _choose_view(models: Sequence[Opened], answers: Sequence[ImageAnswer], columns: Sequence[DeltaGenerator]) -> View:
    """The reader's choice; the four places get finding, method, opacity and the two switches."""
    order = _order(models, answers)
    words = {
        label: f"{label} · {STATES[int(answers[0].states[k])][1]}, p {answers[0].probabilities[k]:.2f}"
        for k, label in enumerate(LABELS)
    }
    methods = [method for method in METHOD_NAMES if all(method in opened.model.methods for opened in models)]
    with columns[0]:
        finding = st.selectbox("Finding on the map", order, format_func=words.__getitem__, key="finding")
    with columns[1]:
        method = (
            st.segmented_control(
                "Method",
                methods,
                format_func=METHOD_NAMES.__getitem__,
                default=methods[0],
                key="method",
                required=True,
                help=SAME_METHODS,
            )
            if methods
            else None
        )
    with columns[2]:
        opacity = st.slider("Map opacity", 0, 100, round(100 * MAX_OPACITY), 4, format="%d %%", key="opacity")
    with columns[3]:
        withheld = st.toggle("Show withheld maps", key="show_withheld")
        as_seen = st.toggle(
            "As the network sees it", key="as_seen", help="The film at the resolution that the network gets."
        )
    return View(finding, method or "contrast_cam", opacity / 100, withheld, as_seen)


def _tables(models: Sequence[Opened], image: CaseImage, answers: Sequence[ImageAnswer]) -> None:
    if len(models) == 2:
        _differences(models, answers)
    for opened, said in zip(models, answers, strict=True):
        called = [label for label in MAPPED if said.states[label_index(label)] == PRESENT]
        if called and said.states[label_index("No Finding")] == PRESENT:
            note(f"{opened.name} calls No Finding and {', '.join(called)}: these contradict each other.")
    labels = image.sample.label_words if image.sample else None
    with st.expander("The findings as a table, with reasons"):
        for opened, said in zip(models, answers, strict=True):
            block(table_html(rows_of(said.probabilities, said.states, opened.model.points, labels), opened.name))
        points = models[0].model.points
        note(
            f"Probabilities are calibrated. Thresholds (rule: {points.thresholds.rule}) and abstention (alpha "
            f"{points.bands.alpha:g}) were fitted on validation studies of the data that the model was trained for; "
            "they hold for films like those."
        )


def _differences(models: Sequence[Opened], answers: Sequence[ImageAnswer]) -> None:
    """In words, where two models make different calls."""
    first, second = answers
    differ = [
        f"{label}: {_said(models[0], first, k)}; {_said(models[1], second, k)}"
        for k, label in enumerate(LABELS)
        if int(first.states[k]) != int(second.states[k])
    ]
    lead = f"The two say the same of {14 - len(differ)} of 14 findings."
    st.markdown(plain(lead) + "".join(f"\n- {plain(line)}" for line in differ))


def _said(opened: Opened, said: ImageAnswer, k: int) -> str:
    return f"{opened.name} {STATES[int(said.states[k])][1]} (p {said.probabilities[k]:.2f})"
