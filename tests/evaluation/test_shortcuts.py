import math

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from mlx_cxr.core.labels import LABELS, label_index
from mlx_cxr.evaluation import shortcuts
from mlx_cxr.evaluation.bootstrap import auc_intervals, patient_resamples

K = len(LABELS)


@pytest.fixture
def cohort():
    """200 studies of 100 patients; the first label is ranked well in PA and at random in AP."""
    rng = np.random.default_rng(0)
    y = (rng.random((200, K)) < 0.3).astype(float)
    view = np.where(np.arange(200) % 4 == 0, "PA", "AP")
    z = rng.normal(size=(200, K)) + np.where(view == "PA", 2, 0)[:, None] * y
    return y, z, view, patient_resamples(np.repeat(np.arange(100), 2), 200, 0)


def test_auc_by_view_is_that_of_the_view_alone(cohort):
    y, z, view, resamples = cohort
    y[view == "PA", 5] = 0
    got = shortcuts.auc_by_group(y, z, view, ("AP", "PA", "mixed"), resamples)
    assert set(got) == {"AP", "PA"}
    assert got["PA"]["studies"] == 50
    entry = got["PA"]["per_label"][LABELS[0]]
    rows = view == "PA"
    assert entry["roc_auc"]["value"] == pytest.approx(roc_auc_score(y[rows, 0], z[rows, 0]))
    assert (entry["positives"], entry["negatives"]) == (y[rows, 0].sum(), 50 - y[rows, 0].sum())
    assert entry["roc_auc"]["low"] < entry["roc_auc"]["value"] < entry["roc_auc"]["high"]
    assert math.isnan(got["PA"]["per_label"][LABELS[5]]["roc_auc"]["value"])
    shared = [k for k in range(K) if k != 5]
    for name in ("AP", "PA"):
        rows = view == name
        macro = got[name]["macro"]
        assert macro["labels"] == [LABELS[k] for k in shared], "both means are over the same labels"
        expected = np.mean([roc_auc_score(y[rows, k], z[rows, k]) for k in shared])
        assert macro["roc_auc"]["value"] == pytest.approx(expected)
    assert shortcuts.auc_by_group(y, z, view, (), resamples) == {}


def test_pneumothorax_with_and_without_devices(cohort):
    y, z, _, resamples = cohort
    finding, devices = label_index("Pneumothorax"), label_index("Support Devices")
    y[:20, devices] = math.nan
    got = shortcuts.pneumothorax_by_devices(y, z, resamples)
    for name, value in (("with_devices", 1), ("without_devices", 0)):
        rows = y[:, devices] == value
        assert got[name]["roc_auc"]["value"] == pytest.approx(roc_auc_score(y[rows, finding], z[rows, finding]))
        assert got[name]["positives"] + got[name]["negatives"] == rows.sum()


def test_metadata_of_studies_is_one_row_each():
    frame = pd.DataFrame(
        {
            "study_id": ["s2", "s1", "s2", "s3"],
            "view": ["PA", "AP", "AP", ""],
            "age": ["64", "", "64", "9"],
            "sex": ["F", "M", "F", ""],
        }
    )
    got = shortcuts.study_metadata(frame)
    assert got["view"].tolist() == ["AP+PA", "AP", "missing"]
    np.testing.assert_array_equal(got["age"], [64, math.nan, 9])
    assert got["sex"].tolist() == ["F", "M", ""]
    bare = shortcuts.study_metadata(frame[["study_id", "view"]])
    assert bare["age"].isna().all()
    assert set(bare["sex"]) == {""}


def metadata(n, seed):
    rng = np.random.default_rng(seed)
    age = np.where(rng.random(n) < 0.1, math.nan, rng.normal(60, 15, n).round())
    return pd.DataFrame({"view": rng.choice(["AP", "PA"], n), "age": age, "sex": rng.choice(["F", "M"], n)})


def test_a_label_that_follows_the_view_is_found_from_metadata_alone_and_another_is_not():
    train, test = metadata(800, 0), metadata(400, 1)

    def targets(frame, seed):
        rng = np.random.default_rng(seed)
        y = (rng.random((len(frame), K)) < 0.3).astype(float)
        chance = np.where(frame["view"] == "AP", 0.7, 0.1)
        y[:, 0] = rng.random(len(frame)) < chance
        y[:, 1] = rng.random(len(frame)) < expit((frame["age"].fillna(60) - 60) / 8)
        return y

    train_y, test_y = targets(train, 2), targets(test, 3)
    train_y[:, 7] = 0
    train_y[:50, 0] = math.nan
    resamples = patient_resamples(np.arange(400), 100, 0)
    model = test_y + np.random.default_rng(4).normal(size=test_y.shape)
    got = shortcuts.against_control(train, train_y, test, test_y, model, resamples)
    auc = {label: got["per_label"][label]["roc_auc"]["value"] for label in LABELS}
    assert got["features"] == ["view", "age", "sex"]
    assert auc[LABELS[0]] > 0.75
    assert auc[LABELS[1]] > 0.75
    assert 0.4 < auc[LABELS[2]] < 0.6
    assert math.isnan(auc[LABELS[7]])
    assert got["macro"]["labels"] == K - 1
    difference = got["per_label"][LABELS[2]]["model_minus_it"]
    assert difference["value"] == pytest.approx(roc_auc_score(test_y[:, 2], model[:, 2]) - auc[LABELS[2]])
    assert difference["low"] > 0


def test_scores_are_scikit_learns_on_the_same_features():
    """View alone, by hand: one indicator per value, an unseen view is neither, and age and sex are constant."""
    train = pd.DataFrame({"view": ["AP", "AP", "AP", "PA", "PA", "PA"], "age": math.nan, "sex": ""})
    y = np.array([1, 1, 0, 0, 0, 1.0])
    test = pd.DataFrame({"view": ["PA", "AP", "AP+PA"], "age": [math.nan] * 3, "sex": [""] * 3})
    got = shortcuts.control_scores(train, y[:, None], test)[:, 0]
    one_hot = np.array([[v == "AP", v == "PA", 1, 1] for v in train["view"]], dtype=float)
    reference = LogisticRegression(max_iter=1000).fit(one_hot, y)
    expected = reference.decision_function(np.array([[0, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 1.0]]))
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert got[1] > got[2] > got[0]


def test_numbers_are_standardized_on_training_and_unknown_ones_are_a_feature():
    """Against scikit-learn on features built by hand; a number that training has but once is taken as it is."""
    train = pd.DataFrame({"age": [30.0, 50.0, math.nan, 70.0, 90.0, math.nan], "height": 5.0})
    test = pd.DataFrame({"age": [90.0, math.nan, 10.0], "height": [5.0, 7.0, math.nan]})
    y = np.array([0, 0, 1, 1, 1, 1.0])
    age = train["age"].to_numpy()
    scaled = np.nan_to_num((age - 60) / math.sqrt(500))
    features = np.stack([scaled, np.isnan(age), np.zeros(6), np.zeros(6)], axis=1)
    reference = LogisticRegression(max_iter=1000).fit(features, y)
    others = np.array([[30 / math.sqrt(500), 0, 0, 0], [0, 1, 2, 0], [-50 / math.sqrt(500), 0, 0, 1.0]])
    got = shortcuts.control_scores(train, y[:, None], test)[:, 0]
    np.testing.assert_allclose(got, reference.decision_function(others), atol=1e-4)


def test_replicates_are_the_auc_of_the_drawn_studies_and_a_difference_is_taken_draw_by_draw(cohort):
    y, z, view, resamples = cohort
    _, replicates = auc_intervals(y[:, :2], z[:, :2], resamples)
    drawn = next(resamples.row_weights())
    for b in range(20):
        for k in range(2):
            assert replicates[b, k] == pytest.approx(roc_auc_score(y[:, k], z[:, k], sample_weight=drawn[b]))
    table = pd.DataFrame({"view": view, "age": math.nan, "sex": ""})
    same = shortcuts.control_scores(table, y, table)
    entry = shortcuts.against_control(table, y, table, y, same, resamples)["macro"]["model_minus_it"]
    assert (entry["value"], entry["low"], entry["high"]) == (0, 0, 0), "the control itself adds nothing in any draw"
