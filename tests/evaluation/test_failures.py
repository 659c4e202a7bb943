import numpy as np
import pandas as pd
import pytest
from judged_studies import K, judged, random_judged
from simulated_runs import NOISE as MODEL_NOISE
from simulated_runs import model, write_run

from mlx_cxr.core.labels import LABELS, label_index
from mlx_cxr.evaluation import failures as f
from mlx_cxr.evaluation.scored_runs import open_scored_run

NAN = np.nan
DEVICES = label_index("Support Devices")


def studies_of(n):
    return pd.DataFrame({"view": ["AP"] * n, "sex": ["F"] * n})


def found_in(studies, teacher=None, margin=0.5, rare=(), bedside=None):
    n = len(studies.study_ids)
    return f.conditions(
        studies,
        teacher=teacher,
        teacher_margin=margin,
        rare=np.isin(LABELS, list(rare)),
        bedside=np.zeros(n, bool) if bedside is None else np.asarray(bedside),
    )


@pytest.mark.parametrize(
    ("p", "t", "margin"),
    [
        (0.6, 0.2, 0.5),
        (0.1, 0.2, -0.5),
        (1.0, 0.7, 1.0),
        (0.0, 0.7, -1.0),
        (0.3, 0.3, 0.0),
        (1.0, 1.0, 0.0),
        (0.5, 0, 0.5),
    ],
)
def test_a_margin_is_the_share_of_the_way_to_the_end_of_the_scale(p, t, margin):
    calls = f.Calls(np.full((1, K), p), np.full(K, t))
    assert calls.margins[0] == pytest.approx(np.full(K, margin))
    assert calls.above_threshold.all() == (p >= t)


def test_replicates_that_are_all_the_same_make_no_interval():
    same = f.plain_interval(0.0, np.zeros(100))
    assert (same["value"], same["replicates"]) == (0, 100)
    assert np.isnan([same["low"], same["high"]]).all()
    drawn = np.linspace(0, 1, 101)
    wanted = {"value": 0.5, "low": 0.025, "high": 0.975, "replicates": 101, "drawn": 101}
    assert f.plain_interval(0.5, drawn) == pytest.approx(wanted)


def test_there_is_no_call_without_a_probability_or_a_threshold():
    calls = f.Calls(np.array([[NAN] + [0.9] * (K - 1)]), np.array([0.5, NAN] + [0.5] * (K - 2)))
    assert np.isnan(calls.margins[0, :2]).all()
    assert calls.above_threshold[0].tolist() == [False, False] + [True] * (K - 2)


def test_a_runs_errors_are_those_of_its_file(tmp_path):
    write_run(tmp_path, "student", model(MODEL_NOISE["student"], 12))
    run = open_scored_run(tmp_path / "student", "student")
    studies = f.judge(run)
    table = pd.read_csv(tmp_path / "student" / "predictions.csv")
    table = table[table["split"] == "test"]
    wrong = (table["above_threshold"] == 1) != (table["raw_label"] == 1)
    np.testing.assert_array_equal(studies.error.ravel(), wrong)
    np.testing.assert_array_equal(studies.false_positive.ravel(), wrong & (table["above_threshold"] == 1))
    assert (studies.false_positive & studies.false_negative).sum() == 0
    other = f.Calls.of(run, np.array([*studies.study_ids[:3][::-1], "nobody"]))
    np.testing.assert_array_equal(other.probabilities[:3], studies.calls.probabilities[:3][::-1])
    assert np.isnan(other.probabilities[3]).all()


def test_a_finding_without_a_threshold_is_left_out():
    thresholds = np.full(K, 0.5)
    thresholds[3] = NAN
    studies = judged(np.ones((2, K)), np.full((2, K), 0.1), thresholds)
    assert studies.false_negative.sum(axis=0).tolist() == [2, 2, 2, 0] + [2] * (K - 4)
    assert not studies.scored[:, 3].any()


def test_the_first_condition_that_holds_names_the_category():
    """One study a row, all called: what decides is the label, then the finding, then the study."""
    raw = np.zeros((6, K))
    raw[0], raw[1], raw[2] = -1, NAN, -1
    raw[4, DEVICES] = 1
    studies = judged(raw, np.full((6, K), 0.9))
    teacher = f.Calls(np.full((6, K), NAN), np.full(K, 0.4))
    teacher.probabilities[2] = 0.75
    found = found_in(studies, teacher, rare=["Fracture"], bedside=[True, True, True, True, False, False])
    assert list(found) == list(f.CATEGORIES[:-1])
    category = f.categorize(found)
    assert set(category[0]) == {f.UNCERTAIN}
    assert set(category[1]) == {f.UNMENTIONED}
    assert set(category[2]) == {f.NOISE}
    assert category[3, label_index("Fracture")] == f.RARE
    assert category[3, label_index("Edema")] == f.BEDSIDE
    assert category[4, label_index("Edema")] == f.DEVICES
    assert category[4, DEVICES] == f.OTHER, "devices do not explain an error on devices"
    assert category[5, label_index("Edema")] == f.OTHER


@pytest.mark.parametrize(
    ("label", "p", "is_noise"),
    # Half the way from 0.4 is 0.7 upwards and 0.2 downwards.
    [(0, 0.71, True), (0, 0.69, False), (1, 0.19, True), (1, 0.21, False), (1, 0.99, False), (0, 0.01, False)],
)
def test_the_teacher_is_confidently_against_a_label_from_its_own_threshold_on(label, p, is_noise):
    studies = judged(np.full((1, K), label), np.full((1, K), 0.5))
    found = found_in(studies, f.Calls(np.full((1, K), p), np.full(K, 0.4)))
    assert found[f.NOISE].all() == found[f.NOISE].any() == is_noise


def test_without_a_teacher_nothing_is_called_noise():
    studies = random_judged(20, 0)
    found = found_in(studies)
    assert f.NOISE not in found
    assert f.NOISE not in f.categorize(found)


def test_the_table_has_a_row_per_error_and_the_most_confident_first():
    studies = random_judged(30, 1)
    category = f.categorize(found_in(studies))
    other = f.Calls(np.full(studies.targets.shape, 0.25), np.full(K, 0.125))
    drawn = (studies.raw_labels == 1).astype(float)
    table = f.failure_table(studies, category, studies_of(30), {"teacher": other}, drawn)
    assert len(table) == studies.error.sum()
    assert table["confidence"].is_monotonic_decreasing
    assert set(table["teacher_probability"]) == {0.25}
    for row in table.to_dict("records"):
        i, k = studies.study_ids.tolist().index(row["study_id"]), LABELS.index(row["label"])
        p = studies.calls.probabilities[i, k]
        assert row["probability"] == p
        assert row["error"] == ("false positive" if p >= 0.5 else "false negative")
        assert row["confidence"] == pytest.approx(abs(p - 0.5) / 0.5)
        assert row["category"] == category[i, k]
        assert row["drawn"] == (row["error"] == "false negative")
    assert "drawn" not in f.failure_table(studies, category, studies_of(30), {})


def test_the_worst_are_taken_in_turn_one_of_a_study_and_few_of_a_finding():
    studies = random_judged(60, 2)
    table = f.failure_table(studies, f.categorize(found_in(studies)), studies_of(60), {})
    labels = LABELS[:6]
    shown = f.worst(table, 10, labels)
    assert f.per_label(10, labels) == 4
    assert f.per_label(10, LABELS) == 2
    assert shown["error"].value_counts().to_dict() == {"false positive": 5, "false negative": 5}
    assert shown["study_id"].is_unique
    assert set(shown["label"]) <= set(labels)
    assert shown["label"].value_counts().max() <= 4
    assert shown["confidence"].is_monotonic_decreasing
    best = table[table["label"].isin(labels)].groupby("error").head(1)
    assert set(best.index) <= set(shown.index), "the most confident of either kind is among them"
    assert len(f.worst(table, 0, labels)) == 0
    one_label = f.worst(table, 40, LABELS[:1])
    assert len(one_label) == len(table[table["label"] == LABELS[0]]["study_id"].unique())
    assert f.worst(table.iloc[:0], 5, labels).empty
