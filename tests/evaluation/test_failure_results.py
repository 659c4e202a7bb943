import numpy as np
import pandas as pd
import pytest
from judged_studies import K, judged, random_judged
from simulated_runs import model, write_run, write_three

from mlx_cxr.core.labels import LABELS
from mlx_cxr.evaluation import failure_results as r
from mlx_cxr.evaluation.bootstrap import patient_resamples
from mlx_cxr.evaluation.failures import CATEGORIES, NOISE, OTHER
from mlx_cxr.evaluation.operating_points import ABSTAIN
from mlx_cxr.evaluation.predictions import read_predictions
from mlx_cxr.evaluation.scored_runs import open_scored_run


def resamples_of(studies, samples=200):
    return patient_resamples(studies.patient_ids, samples, 0)


def test_a_ratio_is_the_error_rate_in_the_category_over_that_of_all():
    """Ten studies, all labels absent; in the first four two calls of 14 are wrong, in the others one is."""
    p = np.full((10, K), 0.1)
    p[:4, :2] = p[4:, :1] = 0.9
    studies = judged(np.zeros((10, K)), p)
    member = np.zeros((10, K), bool)
    member[:4] = True
    entry = r.category_rates(studies, {"first": member}, resamples_of(studies, 50))["first"]
    assert (entry["false_positives"], entry["false_negatives"], entry["pairs"]) == (8, 0, 4 * K)
    assert entry["share_of_errors"] == pytest.approx(8 / 14)
    assert entry["share_of_pairs"] == pytest.approx(0.4)
    assert entry["ratio"]["value"] == pytest.approx((2 / K) / (14 / (10 * K)))
    assert entry["fp_ratio"]["value"] == pytest.approx(entry["ratio"]["value"])
    assert np.isnan(entry["fn_ratio"]["value"]), "no label says present"


def test_replicates_are_the_ratio_on_the_drawn_patients():
    studies = random_judged(40, 0)
    member = np.random.default_rng(1).random((40, K)) < 0.3
    resamples = resamples_of(studies, 60)
    entry = r.category_rates(studies, {"x": member}, resamples)["x"]
    direct = []
    for weights in np.concatenate(list(resamples.row_weights())):
        rows = np.repeat(np.arange(40), weights.astype(int))
        wrong, inside, pool = studies.false_negative[rows], member[rows], studies.targets[rows] == 1
        direct.append((wrong & inside).sum() / wrong.sum() / ((pool & inside).sum() / pool.sum()))
    low, high = np.percentile(direct, [2.5, 97.5])
    assert (entry["fn_ratio"]["low"], entry["fn_ratio"]["high"]) == pytest.approx((low, high))


def test_a_category_that_merely_is_common_is_not_blamed_and_a_planted_one_is():
    studies = random_judged(300, 3, accuracy=0.9)
    rng = np.random.default_rng(4)
    common = rng.random((300, K)) < 0.8
    planted = rng.random((300, K)) < 0.1
    p = studies.calls.probabilities.copy()
    flip = planted & (rng.random(p.shape) < 0.3)
    p[flip] = 1 - p[flip]
    studies = judged(studies.raw_labels, p, patients=studies.patient_ids)
    rates = r.category_rates(studies, {"common": common, "planted": planted}, resamples_of(studies))
    assert rates["common"]["share_of_errors"] > 0.75
    assert rates["common"]["ratio"]["low"] < 1 < rates["common"]["ratio"]["high"]
    assert rates["planted"]["share_of_errors"] < 0.4
    assert rates["planted"]["ratio"]["low"] > 1.5


def test_labels_of_errors_are_checked_against_the_drawing():
    """Four studies with one error each: two noise (one rightly so), two other (one with a wrong label)."""
    raw = np.zeros((4, K))
    raw[1, 0] = raw[3, 0] = 1
    p = np.full((4, K), 0.1)
    p[0, 0] = p[2, 0] = 0.9
    drawn = np.zeros((4, K))
    drawn[0, 0] = drawn[1, 0] = drawn[2, 0] = 1
    category = np.full((4, K), OTHER, dtype=object)
    category[:2, 0] = NOISE
    studies = judged(raw, p)
    check = r.label_check(studies, category, [NOISE, OTHER], drawn, resamples_of(studies))
    entries = check["categories"]
    assert [(entries[n]["errors"], entries[n]["wrong_labels"]) for n in (NOISE, OTHER)] == [(2, 1), (2, 2)]
    assert entries["all errors"]["share"]["value"] == 0.75
    assert entries["all pairs"]["share"]["value"] == pytest.approx(3 / (4 * K))
    assert check["false_positives"]["share"]["value"] == 1
    assert check["false_negatives"]["share"]["value"] == 0
    assert check["caught"]["value"] == pytest.approx(1 / 3)
    without = r.label_check(studies, category, [OTHER], drawn, resamples_of(studies))
    assert without["caught"] is without["false_positives"] is None


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    write_three(folder, 30)
    return folder


def analysed(outputs, *names, **changes):
    student = open_scored_run(outputs / changes.pop("student", "student"), "student")
    others = {name: open_scored_run(outputs / name, name) for name in names}
    n = len(student.test)
    views = student.test.view_groups()
    studies = pd.DataFrame({"view": views, "sex": ["F", "M"] * (n // 2) + ["F"] * (n % 2), "age_band": "40-59"})
    settings = {"teacher_margin": 0.5, "rare_share": 0.05, "samples": 50, "seed": 0, "provenance": {}}
    return r.analyse(student, others, studies, np.linspace(0.01, 0.5, K), **{**settings, **changes})


def test_counts_add_up_over_findings_and_categories(outputs):
    analysis = analysed(outputs, "cnn", "teacher")
    results = analysis.results
    counts = results["counts"]
    assert len(analysis.failures) == counts["false_positives"] + counts["false_negatives"]
    assert counts["pairs"] == counts["positives"] + counts["negatives"] == analysis.judged.targets.size
    for kind in ("false_positives", "false_negatives"):
        assert sum(entry[kind] for entry in results["categories"].values()) == counts[kind]
        assert sum(entry[kind] for entry in results["per_label"].values()) == counts[kind]
    assert sum(entry["pairs"] for entry in results["categories"].values()) == counts["pairs"]
    assert list(results["categories"]) == list(CATEGORIES)
    by_label = analysis.failures.groupby(["label", "category"]).size()
    for (label, name), count in by_label.items():
        assert results["per_label"][label]["categories"][name] == count
    scored = read_predictions(outputs / "student" / "predictions.csv")
    row_of = {study: row for row, study in enumerate(scored.predictions.study_ids.tolist())}
    abstain = [
        scored.states[row_of[study], LABELS.index(label)] == ABSTAIN
        for study, label in zip(analysis.failures["study_id"], analysis.failures["label"], strict=True)
    ]
    assert (analysis.failures["abstention"] != "").tolist() == abstain
    assert 0 < counts["abstained_failures"] == sum(abstain) < len(abstain)
    assert results["settings"]["rare"] == [LABELS[0], LABELS[1]]
    assert results["models"]["teacher"] == {
        "run": "teacher",
        "scored": counts["studies"],
        "reads": "findings",
        "reads_label_source": False,
    }
    assert results["subgroups"]["age"] == {}, "all are of one band"
    assert results["drawing"] is None


def test_a_teacher_that_lacks_studies_has_no_say_in_them(outputs):
    whole = model(0.5, 11, 30)
    write_run(outputs, "half", whole.select(np.arange(len(whole)) % 2 == 0), reads="findings")
    student = open_scored_run(outputs / "student", "student")
    half = open_scored_run(outputs / "half", "teacher")
    assert half.test.study_ids[0] in student.test.study_ids
    studies = pd.DataFrame({"view": student.test.view_groups(), "sex": "", "age_band": "unknown"})
    analysis = r.analyse(
        student, {"teacher": half}, studies, np.full(K, 0.5),
        teacher_margin=0.2, rare_share=0.05, samples=0, seed=0, provenance={},
    )  # fmt: skip
    assert analysis.results["models"]["teacher"]["scored"] == len(half.test) < len(student.test)
    noise = analysis.failures[analysis.failures["category"] == NOISE]
    assert len(noise)
    assert set(noise["study_id"]) <= set(half.test.study_ids.tolist())
    unknown = ~analysis.failures["study_id"].isin(half.test.study_ids)
    assert analysis.failures.loc[unknown, "teacher_probability"].isna().all()
    assert analysis.results["gaps"] == {"looked_at": 0, "apart": 0, "largest": None}
