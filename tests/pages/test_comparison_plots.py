from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy.special import expit
from simulated_runs import NOISE, model
from sklearn import metrics as sk

from mlx_cxr.core.labels import LABELS, SCORING_PROTOCOLS
from mlx_cxr.evaluation.calibration import expected_calibration_error
from mlx_cxr.evaluation.results import fit_operating_points
from mlx_cxr.pages.comparison_plots import Arm, plot_calibration_comparison, plot_roc_comparison

EDEMA, LESION = LABELS.index("Edema"), LABELS.index("Lung Lesion")
TITLES = {"cnn": "CNN", "teacher": "teacher, reads: findings", "student": "student"}
KINDS = [plot_roc_comparison, plot_calibration_comparison]


@pytest.fixture(scope="module")
def arms():
    made = []
    for place, (role, title) in enumerate(TITLES.items()):
        predictions = model(NOISE[role], place)
        points = fit_operating_points(predictions.of_split("validate"), "empty_negative", "f1", 0.1)
        made.append(Arm(title, predictions.of_split("test"), points))
    return made


@pytest.fixture
def drawn(monkeypatch):
    """The figures, before they become pixels."""
    figures = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), original(self, *a, **k))[1])
    return figures


def texts(part):
    return [t.get_text() for t in part.findobj(lambda artist: hasattr(artist, "get_text")) if t.get_text()]


def relabelled(arms, raw):
    return [replace(arm, test=replace(arm.test, raw_labels=raw)) for arm in arms]


@pytest.mark.parametrize("plot", KINDS)
def test_pictures_open_and_say_what_they_show(plot, drawn, arms, tmp_path):
    path = plot(tmp_path / "a.png", arms, "empty_negative", True)
    with Image.open(path) as picture:
        picture.load()
        assert picture.size == (1500, 1020)
        assert picture.text["Warning"] == "Synthetic cohort. Research only, not for clinical use."
    said = " ".join(texts(drawn[0]))
    assert f"{len(arms[0].test)} studies of 50 patients; protocol empty_negative" in said
    assert all(label in said for label in LABELS)
    assert all(title in said for title in TITLES.values())
    assert [item.name for item in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("protocol", list(SCORING_PROTOCOLS))
def test_areas_printed_are_scikit_learns_and_the_mean_is_theirs(drawn, arms, tmp_path, protocol):
    plot_roc_comparison(tmp_path / "a.png", arms, protocol, True)
    y = SCORING_PROTOCOLS[protocol].apply(arms[0].test.raw_labels)
    for arm in arms:
        kept = ~np.isnan(y)
        areas = [sk.roc_auc_score(y[m, k], arm.test.logits[m, k]) for k, m in enumerate(kept.T)]
        assert f"AUC {areas[EDEMA]:.3f}" in texts(drawn[0].axes[EDEMA])
        assert f"mean AUC {np.mean(areas):.3f}" in texts(drawn[0].axes[-1])


def test_a_curve_and_its_area_have_the_models_colour(drawn, arms, tmp_path):
    plot_roc_comparison(tmp_path / "a.png", arms, "empty_negative", True)
    ax = drawn[0].axes[EDEMA]
    curves = [line for line in ax.lines if len(line.get_xdata()) > 2]
    assert len(curves) == len({line.get_color() for line in curves}) == 3
    assert len({line.get_linestyle() for line in curves}) == 3
    y = SCORING_PROTOCOLS["empty_negative"].apply(arms[0].test.raw_labels)[:, EDEMA]
    for arm, curve in zip(arms, curves, strict=True):
        area = sk.auc(curve.get_xdata(), curve.get_ydata())
        assert area == pytest.approx(sk.roc_auc_score(y, arm.test.logits[:, EDEMA]))
        (note,) = [text for text in ax.texts if text.get_text() == f"AUC {area:.3f}"]
        assert note.get_color() == curve.get_color()
    handles = drawn[0].legends[0].get_lines()
    assert [line.get_color() for line in handles] == [line.get_color() for line in curves]


def test_calibration_errors_are_those_before_and_after_each_models_own_temperatures(drawn, arms, tmp_path):
    plot_calibration_comparison(tmp_path / "a.png", arms, "empty_negative", True)
    y = SCORING_PROTOCOLS["empty_negative"].apply(arms[0].test.raw_labels)
    for place, arm in enumerate(arms):
        above, below = drawn[0].axes[2 * place : 2 * place + 2]
        raw, scaled = expit(arm.test.logits.astype(float)), arm.points.calibration.probabilities(arm.test.logits)
        errors = np.array([[expected_calibration_error(p[:, k], y[:, k]) for p in (raw, scaled)] for k in range(14)])
        for column, line in enumerate(below.lines[-2:]):
            np.testing.assert_allclose(line.get_xdata(), errors[:, column])
        assert f"mean {errors[:, 0].mean():.3f} → {errors[:, 1].mean():.3f}" in below.get_title()
        pooled = [expected_calibration_error(p.ravel(), y.ravel()) for p in (raw, scaled)]
        assert f"ECE {pooled[0]:.3f} → {pooled[1]:.3f}" in texts(above)
    bottoms = [drawn[0].axes[place].get_xlim() for place in (1, 3, 5)]
    assert bottoms[0] == bottoms[1] == bottoms[2], "one scale for all models"


@pytest.mark.parametrize("plot", KINDS)
def test_a_label_of_one_class_is_said_and_left_out(plot, drawn, arms, tmp_path):
    raw = arms[0].test.raw_labels.copy()
    raw[:, LESION] = np.nan
    plot(tmp_path / "a.png", relabelled(arms, raw), "empty_negative", True)
    said = texts(drawn[0])
    assert any("one class only" in text for text in said)
    assert any("13" in text for text in said)


@pytest.mark.parametrize("plot", KINDS)
def test_nothing_to_draw_is_still_a_picture(plot, arms, tmp_path):
    empty = relabelled(arms, np.full_like(arms[0].test.raw_labels, np.nan))
    assert plot(tmp_path / "a.png", empty, "empty_masked", True).stat().st_size > 1000


def test_the_errors_of_every_model_lie_within_the_one_scale(drawn, arms, tmp_path):
    # The last model is far worse than the first, whose errors must not set the scale alone.
    loud = replace(arms[2], test=replace(arms[2].test, logits=8 * arms[2].test.logits[::-1]))
    plot_calibration_comparison(tmp_path / "a.png", [*arms[:2], loud], "empty_negative", True)
    panels = [ax for ax in drawn[0].axes if ax.get_xlabel() == "expected calibration error"]
    assert len(panels) == 3
    assert len({ax.get_xlim() for ax in panels}) == 1
    low, high = panels[0].get_xlim()
    errors = np.concatenate([line.get_xdata() for ax in panels for line in ax.lines])
    assert low == 0
    assert np.nanmax(errors) < high
