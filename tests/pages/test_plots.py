import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from simulated_predictions import simulated
from sklearn import metrics as sk

from mlx_cxr.core.labels import LABELS, SCORING_PROTOCOLS
from mlx_cxr.evaluation.abstention import abstention_section
from mlx_cxr.evaluation.bootstrap import patient_resamples
from mlx_cxr.evaluation.results import fit_operating_points
from mlx_cxr.pages import plots

TEST = simulated(60, "test", 1)
VALIDATION = simulated(150, "validate", 0)
POINTS = fit_operating_points(VALIDATION, "empty_negative", "f1", 0.1)
EDEMA, LESION = LABELS.index("Edema"), LABELS.index("Lung Lesion")


def plot_risk_coverage(path, test, points, synthetic):
    return plots.plot_risk_coverage(path, VALIDATION, test, points, synthetic)


KINDS = [plots.plot_roc, plots.plot_precision_recall, plots.plot_reliability, plot_risk_coverage]


@pytest.fixture
def drawn(monkeypatch):
    """The figure of the last plot, before it becomes pixels."""
    figures = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), original(self, *a, **k))[1])
    return figures


def texts(figure):
    return [t.get_text() for t in figure.findobj(lambda artist: hasattr(artist, "get_text")) if t.get_text()]


@pytest.mark.parametrize("plot", KINDS)
def test_pictures_open_and_say_what_they_show(plot, drawn, tmp_path):
    path = plot(tmp_path / "a.png", TEST, POINTS, synthetic=True)
    with Image.open(path) as picture:
        picture.load()
        assert picture.size == (1500, 1020)
        assert picture.text["Warning"] == "Synthetic cohort. Research only, not for clinical use."
        assert np.asarray(picture.convert("L")).std() > 10
    said = " ".join(texts(drawn[0]))
    assert "on the test split" in said
    assert f"{len(TEST)} studies of 60 patients" in said
    assert "protocol empty_negative" in said
    assert "Synthetic cohort. Research only, not for clinical use." in said
    assert all(label in said for label in LABELS)
    assert [item.name for item in tmp_path.iterdir()] == ["a.png"]


def test_real_data_are_not_called_synthetic(drawn, tmp_path):
    plots.plot_roc(tmp_path / "a.png", TEST, POINTS, synthetic=False)
    assert "Research only, not for clinical use." in texts(drawn[0])
    assert not any("Synthetic" in text for text in texts(drawn[0]))


def test_figures_printed_are_scikit_learns(drawn, tmp_path):
    plots.plot_roc(tmp_path / "a.png", TEST, POINTS, synthetic=True)
    plots.plot_precision_recall(tmp_path / "b.png", TEST, POINTS, synthetic=True)
    y = SCORING_PROTOCOLS["empty_negative"].apply(TEST.raw_labels)
    roc, pr = (texts(figure.axes[EDEMA]) for figure in drawn)
    assert f"AUC {sk.roc_auc_score(y[:, EDEMA], TEST.logits[:, EDEMA]):.3f}" in roc
    assert f"AP {sk.average_precision_score(y[:, EDEMA], TEST.logits[:, EDEMA]):.3f}" in pr
    assert f"Edema\n{int(y[:, EDEMA].sum())} of {len(TEST)}" in roc


def test_operating_point_lies_at_the_thresholds_sensitivity_and_specificity(drawn, tmp_path):
    plots.plot_roc(tmp_path / "a.png", TEST, POINTS, synthetic=True)
    y = SCORING_PROTOCOLS["empty_negative"].apply(TEST.raw_labels)[:, EDEMA]
    call = POINTS.calibration.probabilities(TEST.logits)[:, EDEMA] >= POINTS.thresholds.values[EDEMA]
    marker = next(line for line in drawn[0].axes[EDEMA].lines if line.get_marker() == "o")
    assert (marker.get_xdata()[0], marker.get_ydata()[0]) == pytest.approx((call[y == 0].mean(), call[y == 1].mean()))


def test_risk_and_coverage_are_those_of_the_results(drawn, tmp_path):
    plot_risk_coverage(tmp_path / "a.png", TEST, POINTS, synthetic=True)
    section = abstention_section(VALIDATION, TEST, POINTS, patient_resamples(TEST.patient_ids, 0, 0))
    protocol = section["protocols"]["empty_negative"]
    entry = protocol["per_label"]["Edema"]
    panel = drawn[0].axes[EDEMA]
    marker = next(line for line in panel.lines if line.get_marker() == "o")
    expected = [entry[key]["value"] for key in ("called", "risk_called")]
    assert [marker.get_xdata()[0], marker.get_ydata()[0]] == pytest.approx(expected)
    for ranking, style in (("conformal", "-"), ("probability", "--")):
        curve = next(line for line in panel.lines if line.get_linestyle() == style and len(line.get_xdata()) > 2)
        at = np.interp(section["coverages"], curve.get_xdata(), curve.get_ydata())
        np.testing.assert_allclose(at, entry["risk_at"][ranking])
        assert f"mean area {protocol['macro'][f'aurc_{ranking}']['value']:.3f}" in texts(drawn[0].axes[-1])
    assert f"Mean of {len(protocol['macro_labels'])} findings" in texts(drawn[0].axes[-1])


def test_findings_that_are_never_called_say_so_and_are_left_out_of_the_mean_risk(drawn, tmp_path):
    raw = VALIDATION.raw_labels.copy()
    raw[np.flatnonzero(raw[:, LESION] == 1)[5:], LESION] = 0
    points = fit_operating_points(replace(VALIDATION, raw_labels=raw), "empty_negative", "f1", 0.1)
    plot_risk_coverage(tmp_path / "a.png", TEST, points, synthetic=True)
    assert "never called" in texts(drawn[0].axes[LESION])
    few = int((~points.bands.fitted).sum())
    assert sum("never called" in texts(ax) for ax in drawn[0].axes) == few >= 1
    assert f"Mean of {14 - few} findings" in texts(drawn[0].axes[-1])


def test_mean_curves_have_the_mean_area():
    rng = np.random.default_rng(0)
    sets = [(y := np.r_[np.ones(9), np.zeros(40)], y + rng.normal(size=49)) for _ in range(4)]
    roc = [sk.roc_curve(y, s, drop_intermediate=False)[:2] for y, s in sets]
    assert sk.auc(*plots.mean_roc(roc)) == pytest.approx(np.mean([sk.roc_auc_score(y, s) for y, s in sets]), abs=0.005)
    recall = [tuple(x[::-1] for x in sk.precision_recall_curve(y, s)[1::-1]) for y, s in sets]
    grid, precision = plots.mean_precision(recall)
    expected = np.mean([sk.average_precision_score(y, s) for y, s in sets])
    assert precision[1:].mean() == pytest.approx(expected, abs=0.005)
    assert (grid[0], grid[-1]) == (0, 1)
    risks = [(np.arange(1, 41) / 40, rng.random(40)), (np.arange(1, 41) / 40, rng.random(40))]
    grid, risk = plots.mean_risk(risks)
    assert risk[grid == 0.5][0] == pytest.approx(np.mean([r[19] for _, r in risks]))


@pytest.mark.parametrize("plot", KINDS)
def test_single_class_panels_say_so_and_are_left_out_of_the_mean(plot, drawn, tmp_path):
    raw = TEST.raw_labels.copy()
    raw[:, LESION] = math.nan
    plot(tmp_path / "a.png", replace(TEST, raw_labels=raw), POINTS, synthetic=True)
    assert "one class only:\nno curve" in texts(drawn[0].axes[LESION])
    assert any("13" in text for text in texts(drawn[0].axes[-1]))


@pytest.mark.parametrize("plot", KINDS)
def test_nothing_to_draw_is_still_a_picture(plot, tmp_path):
    empty = replace(TEST, raw_labels=np.full_like(TEST.raw_labels, math.nan))
    assert plot(tmp_path / "a.png", empty, POINTS, synthetic=True).stat().st_size > 1000
