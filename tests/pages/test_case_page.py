"""The case page: what it says can be read back from the PDF's text, what it shows from the PNG's pixels."""

from __future__ import annotations

import io
import re
import zlib
from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest
from PIL import Image
from scipy.special import logit

from mlx_cxr.core.labels import LABELS, label_index
from mlx_cxr.evaluation.calibration import Calibration
from mlx_cxr.evaluation.conformal import ConformalBands
from mlx_cxr.evaluation.metrics import Thresholds
from mlx_cxr.evaluation.operating_points import ABSENT, ABSTAIN, PRESENT, OperatingPoints
from mlx_cxr.explain.word_scores import TextExplanation, WordScores
from mlx_cxr.inference.answers import ImageAnswer, ImageInput, ReportAnswer
from mlx_cxr.pages.case_page import CasePage, Disagreement, ModelReading, by_margin, disagreements, draw_case
from mlx_cxr.pages.withheld_maps import Reading

EDEMA, HEART, FRACTURE = (label_index(name) for name in ("Edema", "Cardiomegaly", "Fracture"))
MADE = datetime(2026, 1, 2, 3, 4)


def points(threshold: float = 0.3) -> OperatingPoints:
    """Calls below 0.2 and above 0.4; validation had no Fracture, so that none is called."""
    sources = tuple("default" if k == FRACTURE else "validation" for k in range(14))
    positives = np.where(np.arange(14) == FRACTURE, 0, 50)
    return OperatingPoints(
        Calibration(np.ones(14), ("validation",) * 14),
        Thresholds(np.full(14, threshold), sources, "f1"),
        "empty_negative",
        ConformalBands(0.1, np.full(14, 0.2), np.full(14, 0.4), positives, np.full(14, 50)),
    )


def answer(**probabilities: float) -> ImageAnswer:
    p = np.full(14, 0.05)
    for name, value in probabilities.items():
        p[label_index(name)] = value
    pixels = np.random.default_rng(0).integers(60, 200, (32, 32)).astype(np.uint8)
    states = points().states(p[None])[0]
    return ImageAnswer(ImageInput("film 7.dcm", pixels), logit(p).astype(np.float32), p, states)


def report(**probabilities: float) -> ReportAnswer:
    image = answer(**probabilities)
    text = (("findings", "The heart is large."),)
    return ReportAnswer(text, 0, "", image.logits, image.probabilities, image.states, None, None)


@pytest.fixture
def case() -> CasePage:
    model = ModelReading("demo_cnn", answer(Edema=0.9, Cardiomegaly=0.31, Fracture=0.77), points())
    heat = np.zeros((4, 4), np.float32)
    heat[1, 2] = 0.8
    return CasePage((model,), "Edema", heat, synthetic=True)


def words_of(pdf: bytes) -> str:
    """The text that a PDF shows, as far as it is Latin-1 (in two bytes, the first of them 0) and the ligature fi."""
    text = []
    for stream in re.findall(rb"stream\r?\n(.*?)endstream", pdf, re.DOTALL):
        try:
            content = zlib.decompress(stream)
        except zlib.error:
            continue
        if b"\nBT\n" not in content:
            continue  # a font or a picture, in which the search below is quadratic
        for shown in re.findall(rb"\[(.*?)\]\s*TJ|\((.*?)\)\s*Tj", content, re.DOTALL):
            parts = re.findall(rb"\(((?:\\.|[^\\)])*)\)", shown[0]) if shown[0] else [shown[1]]
            text.append(b"".join(parts).replace(b"\0", b"").decode("latin-1").replace("\\(", "(").replace("\\)", ")"))
    return "".join(text).replace("\2", "fi")


def test_the_pdf_says_what_the_model_says(case):
    text = words_of(draw_case(case, "pdf", MADE))
    for words in (
        *(
            "film 7.dcm",
            "demo_cnn",
            "2026-01-02 03:04",
            "Research only, not for clinical use",
            "Trained on a synthetic cohort",
        ),
        *(
            "0.90 present",
            "0.31 abstains",
            "untested",
            "0.05 absent",
            "Edema: Grad-CAM against the mean film, peak 0.80",
        ),
        *(case.models[0].points.reason(HEART, 0.31), "Fracture", "alpha 0.1"),
    ):
        assert words in text, words
    assert text.count("0.05 absent") == 11
    real = words_of(draw_case(replace(case, synthetic=False), "pdf", MADE))
    assert "synthetic" not in real


def test_a_report_s_answer_stands_beside_it_with_what_differs(case):
    other = report(Edema=0.02, Cardiomegaly=0.95)
    scores = WordScores(("large", "heart"), (0,), np.array([2.0, -0.5]), np.zeros(2), np.array([2.0, -0.5]), 2.0, 0.5)
    told = TextExplanation("text", "Cardiomegaly", scores, 0.95, 0.3)
    full = replace(case, report=other, report_points=points(), reads="findings", words=told)
    text = words_of(draw_case(full, "pdf", MADE))
    for words in (
        "report (findings)",
        "Edema: film present (p 0.90), report denies it or does not mention it (p 0.02)",
        "The heart is large.",
    ):
        assert words in text, words
    assert "0.95 present" in text
    agreeing = words_of(draw_case(replace(full, report=report(Edema=0.8)), "pdf", MADE))
    assert "disagree on" not in agreeing
    assert "no finding is called" in agreeing


def test_disagreements_are_calls_that_differ():
    image = answer(Edema=0.9, Cardiomegaly=0.1, Fracture=0.9, Pneumonia=0.3)
    text = report(Edema=0.1, Cardiomegaly=0.9, Fracture=0.1, Pneumonia=0.9)
    assert [image.states[k] for k in (EDEMA, HEART, FRACTURE)] == [PRESENT, ABSENT, ABSTAIN]
    found = disagreements(image, text)
    assert found == [
        Disagreement("Cardiomegaly", ABSENT, PRESENT, pytest.approx(0.1), pytest.approx(0.9)),
        Disagreement("Edema", PRESENT, ABSENT, pytest.approx(0.9), pytest.approx(0.1)),
    ]
    assert found[0].words() == "Cardiomegaly: film absent (p 0.10), report present (p 0.90)"
    assert disagreements(ImageAnswer(ImageInput("x", None, error="gone")), text) == []


def test_findings_are_ordered_by_odds_over_the_threshold():
    """0.06 against 0.02 is further above than 0.6 against 0.4: odds ratios 3.1 and 2.3."""
    p, thresholds = np.full(14, 0.1), np.full(14, 0.5)
    p[EDEMA], thresholds[EDEMA] = 0.06, 0.02
    p[HEART], thresholds[HEART] = 0.6, 0.4
    p[0] = 0.0
    own = replace(points(), thresholds=Thresholds(thresholds, ("validation",) * 14, "f1"))
    order = by_margin(p, own)
    assert order[:2] == [EDEMA, HEART]
    assert order[-1] == 0
    assert order[2:-1] == [k for k in range(1, 14) if k not in (EDEMA, HEART)]


def pixels_of(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_the_png_shows_the_map_where_it_is_hot_and_none_where_it_is_withheld(case):
    shown = pixels_of(draw_case(case, "png", MADE))
    assert shown.shape == (1683, 1190, 3)
    height, side = shown.shape[0], int(0.40 * 1190)
    top, left = height - int((0.606 * height) + side), int(0.50 * 1190)
    panel = shown[top : top + side, left : left + side]
    colour = np.ptp(panel, axis=-1)
    # Cell (1, 2) of 4 lies centred on pixel 8 row, 16 column of 32.
    assert colour[side // 4, side // 2] > 60
    assert colour[side * 3 // 4, side // 4] < 12
    absent = replace(case, finding="Pneumonia")
    withheld = pixels_of(draw_case(absent, "png", MADE))[top : top + side, left : left + side]
    assert np.ptp(withheld, axis=-1).max() < 12
    asked = pixels_of(draw_case(replace(absent, show_withheld=True), "png", MADE))[top : top + side, left : left + side]
    assert np.ptp(asked, axis=-1)[side // 4, side // 2] > 60
    assert "withheld, shown on request" in words_of(draw_case(replace(absent, show_withheld=True), "pdf", MADE))
    faint = pixels_of(draw_case(replace(case, opacity=0.2), "png", MADE))[top : top + side, left : left + side]
    assert 10 < np.ptp(faint, axis=-1)[side // 4, side // 2] < colour[side // 4, side // 2] / 2


@pytest.mark.parametrize(
    ("finding", "why"),
    [
        ("Cardiomegaly", "the model abstains on Cardiomegaly: both present and absent are plausible at 90 %"),
        ("Fracture", "the model abstains on Fracture: too few examples with Fracture on validation (0; 9 needed at"),
        ("Pneumonia", "p = 0.05 is below the threshold 0.30"),
    ],
)
def test_the_reason_for_a_withheld_map_is_that_of_the_screen(case, finding, why):
    model = case.models[0]
    assert Reading.of(model.points, finding, model.answer.probabilities).withheld(case.heat).startswith(why)
    text = words_of(draw_case(replace(case, finding=finding), "pdf", MADE)).replace(" ", "")
    assert f"mapwithheld:{why.replace(' ', '')}" in text


def test_dollar_signs_are_no_formulas_and_what_is_cut_is_said(case):
    model = case.models[0]
    image = replace(model.answer.image, name="from $5 to $_6^.dcm")
    odd = replace(case, models=(replace(model, answer=replace(model.answer, image=image)),))
    assert "from $5 to $_6^.dcm" in words_of(draw_case(odd, "pdf", MADE))
    long = replace(report(), sections=(("findings", "Costs $x^$ and more. " * 80),))
    told = words_of(draw_case(replace(case, report=long, report_points=points(), reads="findings"), "pdf", MADE))
    assert "Costs $x^$ and more." in told
    high, low = dict.fromkeys(LABELS, 0.9), dict.fromkeys(LABELS, 0.1)
    told = {"report": report(**low), "report_points": points(), "reads": "findings"}
    all_differ = replace(case, models=(replace(model, answer=answer(**high)),), **told)
    assert "and on Enlarged Cardiomediastinum, Lung Lesion" in words_of(draw_case(all_differ, "pdf", MADE))


def test_a_concern_is_on_the_page(case):
    model = case.models[0]
    image = replace(model.answer.image, concerns=("looks inverted (like a negative)",))
    odd = replace(case, models=(replace(model, answer=replace(model.answer, image=image)),))
    assert "The film looks inverted (like a negative)." in words_of(draw_case(odd, "pdf", MADE))


def test_the_warning_is_in_the_file_too(case):
    assert "not for clinical use" in Image.open(io.BytesIO(draw_case(case, "png", MADE))).text["Description"]
    assert b"not for clinical use" in draw_case(case, "pdf", MADE)


def test_what_has_no_page_is_refused(case):
    with pytest.raises(ValueError, match="format 'svg'"):
        draw_case(case, "svg")
    unread = ModelReading("demo_cnn", ImageAnswer(ImageInput("x", None, error="gone")), points())
    with pytest.raises(ValueError, match="cannot be read"):
        replace(case, models=(unread,))
    with pytest.raises(ValueError, match="one or two"):
        replace(case, models=case.models * 3)
    with pytest.raises(ValueError, match="operating points"):
        replace(case, report=report())
    assert len(LABELS) == 14
