import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
from simulated_runs import NOISE, model, write_run, write_three
from sklearn import metrics as sk

from mlx_cxr.core.files import read_record, write_record
from mlx_cxr.core.labels import LABELS, SCORING_PROTOCOLS
from mlx_cxr.evaluation.bootstrap import patient_resamples
from mlx_cxr.evaluation.comparison import COMPARED, compare, enough_patients, ratio_interval, retention, verdict
from mlx_cxr.evaluation.delong import holm, paired_delong
from mlx_cxr.evaluation.metrics import METRICS
from mlx_cxr.evaluation.results import evaluate
from mlx_cxr.evaluation.scored_runs import ComparisonError, open_scored_run

SAMPLES = 60
EDEMA, LESION = LABELS.index("Edema"), LABELS.index("Lung Lesion")
THREE = {"cnn": "cnn", "teacher": "teacher", "student": "student"}
ROLES = THREE | {"shuffled": "control", "whole": "graded teacher"}


def compared(outputs, roles=ROLES, samples=SAMPLES, min_retention=0.9):
    runs = [open_scored_run(outputs / name, role) for name, role in roles.items()]
    settings = {"experiment": "toy", "samples": samples, "seed": 3, "bins": 15, "provenance": {"commit": "c"}}
    return compare(runs, min_retention=min_retention, **settings)


def without(predictions, studies):
    """Predictions without the first of the test studies."""
    rows = np.flatnonzero(predictions.split == "test")[:studies]
    return predictions.select(np.delete(np.arange(len(predictions)), rows))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    write_three(folder)
    write_run(folder, "shuffled", model(NOISE["shuffled"], 13), targets="shuffled")
    # Reads everything, but could not read seven of the reports.
    whole = without(model(0.2, 14), 7)
    write_run(folder, "whole", whole, reads="whole report", sections=("whole",))
    return folder


@pytest.fixture
def copy(outputs, tmp_path):
    """The same runs, for a test that replaces some of them."""
    return shutil.copytree(outputs, tmp_path / "outputs")


@pytest.fixture(scope="module")
def comparison(outputs):
    return compared(outputs)


def test_each_models_figures_are_those_of_its_own_evaluation_on_the_same_studies(outputs, comparison):
    run = open_scored_run(outputs / "student", "student")
    settings = {"run": "r", "synthetic": True, "samples": SAMPLES, "seed": 3, "bins": 15, "provenance": {}}
    own = evaluate(model(NOISE["student"], 12), run.points, **settings)
    for name in SCORING_PROTOCOLS:
        mine = comparison["protocols"][name]["models"]["student"]
        theirs = own["protocols"][name]
        assert mine["macro"]["roc_auc"] == pytest.approx(theirs["macro"]["roc_auc"])
        assert mine["per_label"]["Edema"]["f1"] == pytest.approx(theirs["per_label"]["Edema"]["f1"])
        assert mine["macro"]["ece"] == pytest.approx(theirs["macro"]["ece"])


@pytest.mark.parametrize("protocol", list(SCORING_PROTOCOLS))
def test_differences_are_scikit_learns_resample_by_resample(outputs, comparison, protocol):
    """Rows repeated as often as their patient is drawn, both models on the same rows; no weights, no shared code."""
    tests = [open_scored_run(outputs / name, name).test for name in ("student", "cnn")]
    y = SCORING_PROTOCOLS[protocol].apply(tests[0].raw_labels)[:, EDEMA]
    first, second = (test.logits[:, EDEMA] for test in tests)
    resamples = patient_resamples(tests[0].patient_ids, SAMPLES, 3)

    def difference(rows, score):
        rows = rows[~np.isnan(y[rows])]
        return score(y[rows], first[rows]) - score(y[rows], second[rows])

    for metric, score in (("roc_auc", sk.roc_auc_score), ("average_precision", sk.average_precision_score)):
        draws = [np.repeat(np.arange(len(y)), counts[resamples.patient_of_row]) for counts in resamples.counts]
        replicates = [difference(rows, score) for rows in draws]
        entry = comparison["protocols"][protocol]["differences"]["student_minus_cnn"]["per_label"]["Edema"][metric]
        low, high = np.percentile(replicates, [2.5, 97.5])
        counts = {"replicates": SAMPLES, "drawn": SAMPLES}
        expected = {"value": difference(np.arange(len(y)), score), "low": low, "high": high, **counts}
        assert entry == pytest.approx(expected)


def test_macro_differences_pair_labels_and_resamples(comparison):
    section = comparison["protocols"]["empty_negative"]
    entry = section["differences"]["teacher_minus_cnn"]
    models = section["models"]
    for metric in COMPARED:
        value = models["teacher"]["macro"][metric]["value"] - models["cnn"]["macro"][metric]["value"]
        assert entry["macro"][metric]["value"] == pytest.approx(value)
    # Correlated models: the paired interval is narrower than one from two intervals that know nothing of each other.
    widths = [models[run]["macro"]["roc_auc"]["high"] - models[run]["macro"]["roc_auc"]["low"] for run in models]
    paired = entry["macro"]["roc_auc"]["high"] - entry["macro"]["roc_auc"]["low"]
    assert paired < math.hypot(widths[0], widths[1])
    assert "precision" not in entry["macro"]
    assert set(COMPARED) | {"precision"} == set(METRICS)


def test_p_values_are_the_clustered_delong_test_and_holms_over_the_pairs_labels(outputs, comparison):
    student, cnn = (open_scored_run(outputs / name, name).test for name in ("student", "cnn"))
    y = SCORING_PROTOCOLS["empty_masked"].apply(student.raw_labels)
    p = [paired_delong(y[:, k], student.logits[:, k], cnn.logits[:, k], cnn.patient_ids).p_value for k in range(14)]
    per_label = comparison["protocols"]["empty_masked"]["differences"]["student_minus_cnn"]["per_label"]
    assert [per_label[label]["p_value"] for label in LABELS] == pytest.approx(p)
    assert [per_label[label]["p_holm"] for label in LABELS] == pytest.approx(holm(np.array(p)).tolist())


def test_calls_follow_each_runs_own_validation(outputs, comparison):
    for name in ("cnn", "teacher"):
        test = open_scored_run(outputs / name, name).test
        point = read_record(outputs / name / "test_results.json")["operating_points"]["Edema"]
        call = 1 / (1 + np.exp(-test.logits[:, EDEMA].astype(float) / point["temperature"])) >= point["threshold"]
        y = SCORING_PROTOCOLS["empty_negative"].apply(test.raw_labels)[:, EDEMA]
        entry = comparison["protocols"]["empty_negative"]["models"][name]["per_label"]["Edema"]
        assert entry["f1"]["value"] == pytest.approx(sk.f1_score(y, call))
        assert entry["sensitivity"]["value"] == pytest.approx(sk.recall_score(y, call))


def test_retention_and_gates_follow_the_macro_figures(comparison):
    section = comparison["protocols"]["empty_negative"]
    cnn, teacher, student = (
        section["models"][run]["macro"]["roc_auc"]["value"] for run in ("cnn", "teacher", "student")
    )
    kept = section["retention"]
    assert kept["share"]["value"] == pytest.approx(student / teacher)
    assert kept["chance_share"] == pytest.approx(0.5 / teacher)
    assert kept["gap_closed"]["value"] == pytest.approx((student - cnn) / (teacher - cnn))
    assert kept["gap_closed"]["low"] < kept["gap_closed"]["value"] < kept["gap_closed"]["high"]
    assert kept["gap"] == pytest.approx(section["differences"]["teacher_minus_cnn"]["macro"]["roc_auc"])
    assert kept["gain"] == pytest.approx(section["differences"]["student_minus_cnn"]["macro"]["roc_auc"])


def test_gates_are_decided_on_validation_with_the_test_figures_beside(outputs, comparison):
    """Macro ROC-AUC by scikit-learn, on the validation studies of each run's predictions."""
    auc = {}
    for name in ("cnn", "teacher", "student"):
        part = open_scored_run(outputs / name, name).validation
        assert set(part.split.tolist()) == {"validate"}
        y = SCORING_PROTOCOLS["empty_negative"].apply(part.raw_labels)
        auc[name] = np.mean([sk.roc_auc_score(y[:, k], part.logits[:, k]) for k in range(14)])
    gates, section = comparison["gates"], comparison["protocols"]["empty_negative"]
    beats, keeps = gates["teacher_beats_cnn"], gates["retention"]
    assert beats["difference"]["value"] == pytest.approx(auc["teacher"] - auc["cnn"])
    assert beats["difference"]["low"] < beats["difference"]["value"] < beats["difference"]["high"]
    assert (beats["met"], beats["interval_above_0"]) == (True, True)
    assert keeps["share"]["value"] == pytest.approx(auc["student"] / auc["teacher"])
    assert keeps["met"] is bool(auc["student"] / auc["teacher"] >= 0.9)
    assert beats["test"] == section["differences"]["teacher_minus_cnn"]["macro"]["roc_auc"]
    assert keeps["test"] == section["retention"]["share"] != keeps["share"]
    assert beats["protocol"] == comparison["fitted_under"] == "empty_negative"


def test_the_retention_gate_takes_the_least_share_asked_for(outputs, comparison):
    gate = comparison["gates"]["retention"]
    share = gate["share"]["value"]
    assert gate["minimum"] == 0.9 > share
    assert gate["met"] is False
    assert compared(outputs, THREE, 0, share)["gates"]["retention"]["met"] is True
    assert compared(outputs, THREE, 0, share + 1e-9)["gates"]["retention"]["met"] is False


def test_a_teacher_below_the_cnn_fails_its_gate_and_leaves_the_quotient_undefined(copy):
    write_run(copy, "teacher", model(NOISE["shuffled"], 10), reads="findings")
    got = compared(copy, THREE)
    section = got["protocols"]["empty_negative"]
    assert got["gates"]["teacher_beats_cnn"]["met"] is False
    assert got["gates"]["teacher_beats_cnn"]["interval_above_0"] is False
    assert section["differences"]["teacher_minus_cnn"]["verdict"] == "worse"
    assert section["retention"]["gap_closed"] is None
    assert section["retention"]["gap_closed_undefined"] == "the teacher is not above the CNN"
    assert section["retention"]["share"]["value"] > 1
    assert got["gates"]["retention"]["met"] is True


def test_controls_are_judged_by_the_paired_difference(comparison, copy):
    section = comparison["protocols"]["empty_negative"]
    entry = section["controls"]["shuffled"]
    models = section["models"]
    value = models["student"]["macro"]["roc_auc"]["value"] - models["shuffled"]["macro"]["roc_auc"]["value"]
    assert entry["macro"]["roc_auc"]["value"] == pytest.approx(value)
    assert entry["verdict"] == "better"
    about = next(one for one in comparison["models"] if one["run"] == "shuffled")
    assert (about["role"], about["targets"], about["alpha"]) == ("control", "shuffled", 0.3)
    # A control that answers like the student is within noise of it; one that answers like the teacher is better.
    write_run(copy, "alike", model(NOISE["student"], 30), targets="hard")
    write_run(copy, "best", model(NOISE["teacher"], 31), targets="smoothed")
    controls = compared(copy, THREE | {"alike": "control", "best": "control"})["protocols"]["empty_negative"][
        "controls"
    ]
    assert {run: one["verdict"] for run, one in controls.items()} == {"alike": "within noise", "best": "worse"}


def test_a_verdict_is_over_findings_of_enough_patients_and_names_what_it_rests_on(comparison, outputs, tmp_path):
    runs = {name: open_scored_run(outputs / name, name) for name in ("student", "cnn")}
    section = comparison["protocols"]["empty_negative"]
    entry = section["differences"]["student_minus_cnn"]
    test = runs["cnn"].on(np.array(sorted(runs["cnn"].test.study_ids), dtype=str))
    targets = np.nan_to_num(np.where(test.raw_labels == 1, 1.0, 0.0))
    patients = {
        label: [len(set(test.patient_ids[targets[:, k] == value])) for value in (0, 1)]
        for k, label in enumerate(LABELS)
    }
    enough = [label for label in LABELS if min(patients[label]) >= 5]
    assert entry["judged_labels"] == enough
    each = {label: entry["per_label"][label]["roc_auc"]["value"] for label in enough}
    assert entry["judged"]["value"] == pytest.approx(np.mean(list(each.values())))
    for left_out in enough:
        rest = [value for label, value in each.items() if label != left_out]
        assert entry["without_each"][left_out]["value"] == pytest.approx(np.mean(rest))
    resting = [label for label, one in entry["without_each"].items() if verdict(one) != entry["verdict"]]
    assert entry["verdict"] == "better"
    assert entry["rests_on"] == resting
    # Of what is within noise there is nothing to rest.
    write_run(tmp_path, "cnn", model(NOISE["student"], 12))
    for name in ("teacher", "student"):
        shutil.copytree(outputs / name, tmp_path / name)
    same = compared(tmp_path, THREE)["protocols"]["empty_negative"]["differences"]["student_minus_cnn"]
    assert (same["verdict"], same["rests_on"]) == ("within noise", [])


def test_a_finding_of_four_patients_is_not_judged():
    targets = np.zeros((30, 14))
    targets[:, 1:] = np.nan
    patients = np.array([f"p{i // 3}" for i in range(30)])
    targets[0:12, 0] = 1
    assert not enough_patients(targets, patients)[0], "12 studies, but 4 patients"
    targets[12, 0] = 1
    assert enough_patients(targets, patients)[0]
    targets[14:, 0] = 1
    assert not enough_patients(targets, patients)[0], "and one patient without it"
    assert not enough_patients(targets, patients)[1:].any()


def test_a_difference_that_one_finding_makes_is_said_to_rest_on_it(copy):
    """The CNN with the student's answers, but for Edema: what is left of the difference is that finding's."""
    student = model(NOISE["student"], 12)
    logits = student.logits.copy()
    logits[:, EDEMA] = 0.0
    write_run(copy, "cnn", replace(student, logits=logits))
    entry = compared(copy, THREE)["protocols"]["empty_negative"]["differences"]["student_minus_cnn"]
    assert (entry["verdict"], entry["rests_on"]) == ("better", ["Edema"])
    assert entry["without_each"]["Edema"]["value"] == 0


def test_without_controls_and_graded_teachers_there_are_none(outputs):
    got = compared(outputs, THREE, 0)
    assert got["protocols"]["empty_negative"]["controls"] == {}
    assert got["graded_teachers"] is None
    assert [one["role"] for one in got["models"]] == ["cnn", "teacher", "student"]


def test_without_resamples_nothing_is_judged_by_an_interval(outputs):
    section = compared(outputs, samples=0)["protocols"]["empty_negative"]
    assert section["controls"]["shuffled"]["verdict"] == "no interval"
    assert section["retention"]["gap_closed"] is None
    assert section["retention"]["gap_closed_undefined"] == "there is no interval of the gap"
    assert math.isnan(section["differences"]["student_minus_cnn"]["macro"]["roc_auc"]["low"])
    assert section["differences"]["student_minus_cnn"]["per_label"]["Edema"]["p_value"] <= 1


def test_models_are_compared_on_what_all_scored_and_the_rest_is_counted(copy):
    write_run(copy, "teacher", without(model(NOISE["teacher"], 11), 9), reads="findings")
    got = compared(copy, THREE, 0)
    cnn = open_scored_run(copy / "cnn", "cnn").test
    n = len(cnn)
    assert got["counts"]["studies"] == n - 9
    assert got["counts"]["patients"] == len(set(cnn.patient_ids[9:].tolist()))
    assert got["counts"]["runs"]["cnn"] == {"test_studies": n, "left_out": 9}
    assert got["counts"]["runs"]["teacher"] == {"test_studies": n - 9, "left_out": 0}
    y = SCORING_PROTOCOLS["empty_negative"].apply(cnn.raw_labels)[9:]
    expected = np.mean([sk.roc_auc_score(y[:, k], cnn.logits[9:, k]) for k in range(14)])
    macro = got["protocols"]["empty_negative"]["models"]["cnn"]["macro"]["roc_auc"]["value"]
    assert macro == pytest.approx(expected)


def test_graded_teachers_are_compared_on_their_own_studies_and_change_nothing_else(outputs, comparison):
    graded = comparison["graded_teachers"]
    n = comparison["counts"]["studies"]
    assert graded["counts"]["studies"] == n - 7
    assert graded["counts"]["runs"]["teacher"] == {"test_studies": n, "left_out": 7}
    first, second = graded["models"]
    assert (first["run"], first["minus_teacher"], first["reads_findings"]) == ("teacher", None, True)
    assert (second["run"], second["reads"], second["reads_label_source"]) == ("whole", "whole report", True)
    difference = second["macro"]["roc_auc"]["value"] - first["macro"]["roc_auc"]["value"]
    assert second["minus_teacher"]["value"] == pytest.approx(difference)
    assert second["zero_shot_auc"] == 0.52
    alone = compared(outputs, {name: role for name, role in ROLES.items() if role != "graded teacher"})
    assert alone["protocols"] == comparison["protocols"]


def test_a_label_of_one_class_has_no_figure_and_is_left_out_of_every_mean(tmp_path):
    def no_lesion(predictions):
        raw = predictions.raw_labels.copy()
        rows = predictions.split == "test"
        raw[rows, LESION] = np.where(raw[rows, LESION] == 1, math.nan, raw[rows, LESION])
        return replace(predictions, raw_labels=raw)

    for name, seed in (("cnn", 10), ("teacher", 11), ("student", 12)):
        reads = "findings" if name == "teacher" else None
        write_run(tmp_path, name, no_lesion(model(NOISE[name], seed)), reads=reads)
    got = compared(tmp_path, THREE)
    for section in got["protocols"].values():
        assert section["single_class"] == ["Lung Lesion"]
        difference = section["differences"]["student_minus_cnn"]
        entry = difference["per_label"]["Lung Lesion"]
        assert math.isnan(entry["roc_auc"]["value"])
        assert math.isnan(entry["p_value"])
        assert math.isnan(entry["p_holm"])
        others = [e["roc_auc"]["value"] for label, e in difference["per_label"].items() if label != "Lung Lesion"]
        assert difference["macro"]["roc_auc"]["value"] == pytest.approx(np.mean(others))
        assert difference["macro"]["roc_auc"]["replicates"] > 50
        least = min(e["p_value"] for label, e in difference["per_label"].items() if label != "Lung Lesion")
        assert min(e["p_holm"] for e in difference["per_label"].values()) == pytest.approx(min(1, 13 * least))


def test_runs_of_other_data_are_refused_also_among_graded_teachers(copy):
    write_run(copy, "whole", model(0.2, 14), reads="whole report", manifest="b" * 64)
    with pytest.raises(ComparisonError, match=r"manifest: .*teacher/test_results\.json has a+, .*whole/"):
        compared(copy, THREE | {"whole": "graded teacher"}, 0)


def test_the_file_holds_what_was_computed(comparison, tmp_path):
    back = read_record(write_record(tmp_path / "final_comparison.json", comparison))
    assert back["provenance"] == {"commit": "c"}
    assert back["notice"] == "Synthetic cohort. Research only, not for clinical use."
    assert back["gates"] == comparison["gates"]
    assert back["manifest"] == "a" * 64
    assert back["bootstrap"] == {"unit": "patient", "samples": SAMPLES, "seed": 3, "level": 0.95}
    assert back["models"][1]["cost"]["what"] == "one report, up to 768 tokens"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.01, 0.2, "better"),
        (-0.2, -0.01, "worse"),
        (-0.1, 0.1, "within noise"),
        (0.0, 0.1, "within noise"),
        (-0.1, 0.0, "within noise"),
        (math.nan, math.nan, "no interval"),
        (None, None, "no interval"),
    ],
)
def test_a_verdict_needs_an_interval_clear_of_0(low, high, expected):
    assert verdict({"value": 0.05, "low": low, "high": high}) == expected


def test_the_quotient_has_no_bounds_where_the_interval_of_the_gap_reaches_0():
    rng = np.random.default_rng(0)
    cnn = 0.8 + np.r_[0, 0.01 * rng.normal(size=999)]
    for gap, defined in ((0.1, True), (0.01, False), (-0.05, False)):
        teacher = cnn + gap + np.r_[0, 0.01 * rng.normal(size=999)]
        got = retention((cnn + teacher) / 2, teacher, cnn)
        assert (got["gap_closed"] is not None) is defined
        assert (got["gap_closed_undefined"] is None) is defined
        if defined:
            assert [got["gap_closed"][key] for key in ("value", "low", "high")] == pytest.approx([0.5] * 3)
    assert "not above" in got["gap_closed_undefined"]


def test_retention_without_a_label_to_score_is_undefined():
    nothing = np.full(101, math.nan)
    got = retention(nothing, nothing, nothing)
    assert math.isnan(got["share"]["value"])
    assert got["gap_closed"] is None


def test_the_interval_of_a_quotient_is_fiellers():
    """Closed form for normal numerator and denominator, which are correlated here (Fieller 1954)."""
    rng = np.random.default_rng(1)
    mean, covariance = np.array([0.05, 0.10]), np.array([[4e-4, 1.5e-4], [1.5e-4, 6.25e-4]])
    draws = rng.multivariate_normal(mean, covariance, 200_000)
    got = ratio_interval(np.r_[mean[0], draws[:, 0]], np.r_[mean[1], draws[:, 1]])
    z2 = 1.959964**2
    # Roots of (a - r b)^2 = z^2 (s_aa - 2 r s_ab + r^2 s_bb).
    coefficients = [
        mean[1] ** 2 - z2 * covariance[1, 1],
        -2 * (mean[0] * mean[1] - z2 * covariance[0, 1]),
        mean[0] ** 2 - z2 * covariance[0, 0],
    ]
    low, high = sorted(np.roots(coefficients).real)
    assert (got["low"], got["high"]) == pytest.approx((low, high), abs=0.02)
    assert got["value"] == pytest.approx(0.5)


def test_the_interval_of_a_quotient_holds_what_the_difference_does_not_exclude():
    """By brute force over r, with some replicates of the denominator below 0, as an interval just above 0 has."""
    rng = np.random.default_rng(2)
    over, under = rng.normal(0.03, 0.02, 400), rng.normal(0.08, 0.036, 400)
    assert 3 <= (under <= 0).sum() <= 9
    got = ratio_interval(np.r_[0.03, over], np.r_[0.08, under])
    grid = np.linspace(-3, 6, 9001)
    inside = [r for r in grid if np.quantile(over - r * under, 0.025) <= 0 <= np.quantile(over - r * under, 0.975)]
    assert (got["low"], got["high"]) == pytest.approx((min(inside), max(inside)), abs=0.1)
    assert got["replicates"] == 400


def test_few_or_unbounded_replicates_give_no_bounds():
    few = ratio_interval(np.ones(20), np.full(20, 2.0))
    assert few["value"] == 0.5
    assert math.isnan(few["low"])
    unbounded = ratio_interval(np.ones(101), np.r_[1.0, np.ones(90), np.full(10, -1.0)])
    assert math.isnan(unbounded["high"])
