"""A run on another cohort: its figures against scikit-learn, the verdicts, and the shift between two sets of images."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from simulated_predictions import simulated
from sklearn.metrics import roc_auc_score

from mlx_cxr.core.labels import LABELS, SCORING_PROTOCOLS, label_index
from mlx_cxr.data.tables import DataError
from mlx_cxr.evaluation.external import against_own, cohort_shift, verdict
from mlx_cxr.evaluation.feature_distance import feature_distance
from mlx_cxr.evaluation.results import fit_operating_points

POINTS = fit_operating_points(simulated(120, "validate", 0), "empty_negative", "f1", 0.1)
OWN, OTHER = simulated(150, "test", 1), simulated(150, "external", 2)


def test_figures_are_scikit_learns_over_the_findings_that_both_have():
    raw = OTHER.raw_labels.copy()
    raw[:, label_index("Fracture")] = np.nan  # never annotated there
    other = replace(OTHER, raw_labels=raw)
    got = against_own(OWN, other, POINTS, 100, 0)
    assert got["findings"] == [label for label in LABELS if label != "Fracture"]
    policy, aucs = SCORING_PROTOCOLS["empty_negative"], {"own": [], "external": []}
    for label in got["findings"]:
        k = label_index(label)
        for side, part in (("own", OWN), ("external", other)):
            y = policy.apply(part.raw_labels)[:, k]
            aucs[side].append(roc_auc_score(y, part.logits[:, k]))
            assert got["per_label"][label][side]["value"] == pytest.approx(aucs[side][-1])
        y = policy.apply(other.raw_labels)[:, k]
        assert got["per_label"][label]["positives"] == (y == 1).sum()
        assert got["per_label"][label]["external_prevalence"] == pytest.approx(np.nanmean(y))
    for side in ("own", "external"):
        assert got["macro"][side]["value"] == pytest.approx(np.mean(aucs[side]))
        assert got["macro"][side]["low"] < got["macro"][side]["value"] < got["macro"][side]["high"]
    assert got["macro"]["verdict"] == verdict(got["macro"]["own"], got["macro"]["external"])
    same = against_own(OWN, replace(OWN, split=np.repeat("external", len(OWN))), POINTS, 100, 0)
    assert same["macro"]["verdict"] == "not told apart"


def test_a_model_that_fails_elsewhere_is_below_its_own_figures():
    logits = OTHER.logits.copy()
    k = label_index("Edema")
    logits[:, k] = -logits[:, k]
    got = against_own(OWN, replace(OTHER, logits=logits), POINTS, 100, 0)
    assert got["per_label"]["Edema"]["verdict"] == "below"
    assert got["per_label"]["Edema"]["external"]["high"] < 0.5
    noise = np.random.default_rng(0).normal(size=logits.shape).astype(np.float32)
    assert against_own(OWN, replace(OTHER, logits=noise), POINTS, 100, 0)["macro"]["verdict"] == "below"


def test_cohorts_without_a_finding_in_common_are_refused():
    raw = np.full_like(OTHER.raw_labels, 1)
    with pytest.raises(
        DataError, match=r"no finding is both present and absent in both cohorts: .* the other cohort none"
    ):
        against_own(OWN, replace(OTHER, raw_labels=raw), POINTS, 0, 0)


@pytest.mark.parametrize(
    ("external", "expected"),
    [
        ((0.6, 0.7), "below"),
        ((0.85, 0.9), "above"),
        ((0.7, 0.81), "not told apart"),
        ((math.nan, math.nan), "no interval"),
    ],
)
def test_verdicts(external, expected):
    own = {"value": 0.8, "low": 0.75, "high": 0.85}
    assert verdict(own, {"value": 0.75, "low": external[0], "high": external[1]}) == expected


class TestShift:
    def table(self, count, brightness, seed):
        rng = np.random.default_rng(seed)
        values = {"brightness": rng.normal(brightness, 0.1, count), "sharpness": rng.normal(0, 1, count)}
        return pd.DataFrame(values, index=[f"s{number}" for number in range(count)])

    def features(self, external=60):
        rng = np.random.default_rng(9)
        counts = {"test": 50, "validate": 40, "external": external}
        return {name: rng.normal(size=(count, 16)) for name, count in counts.items()}

    def test_cohorts_of_one_kind_are_not_told_apart(self):
        patients = np.array([f"p{number}" for number in range(600)])
        got = cohort_shift(self.table(300, 0.5, 0), self.table(300, 0.5, 1), patients, self.features(), 0)
        assert 0.4 < got["told_apart"] < 0.6
        assert abs(got["per_statistic"]["brightness"]["difference"]) < 0.2

    def test_brighter_films_are_told_apart_and_the_difference_is_in_deviations(self):
        patients = np.array([f"p{number}" for number in range(600)])
        own, other = self.table(300, 0.5, 0), self.table(300, 0.8, 1)
        got = cohort_shift(own, other, patients, self.features(), 0)
        expected = (other["brightness"].mean() - own["brightness"].mean()) / own["brightness"].std(ddof=0)
        assert got["per_statistic"]["brightness"]["difference"] == pytest.approx(expected)
        assert got["told_apart"] > 0.95

    def test_a_patient_s_studies_do_not_tell_for_each_other(self):
        """Ten copies of each patient's image: by study the cohorts could be told apart, by patient they cannot."""
        own, other = (pd.concat([self.table(30, 0.5, seed)] * 10) for seed in (0, 1))
        patients = np.array([f"p{number % 30}" for number in range(600)])
        assert cohort_shift(own, other, patients, self.features(), 0)["told_apart"] < 0.65

    def test_a_cohort_of_one_patient_has_no_figure(self):
        features = self.features(external=1)
        got = cohort_shift(self.table(20, 0.5, 0), self.table(1, 0.5, 1), np.array(["p"] * 21), features, 0)
        assert math.isnan(got["told_apart"])
        assert math.isnan(got["features"]["external"]["value"])
        assert not math.isnan(got["features"]["own"]["value"])

    def test_features_are_set_against_those_of_the_own_test_split(self):
        features = self.features()
        features["external"] += 0.3
        patients = np.array([f"p{number}" for number in range(600)])
        got = cohort_shift(self.table(300, 0.5, 0), self.table(300, 0.5, 1), patients, features, 0)["features"]
        assert got["external"] == feature_distance(features["external"], features["test"], 0)
        assert got["own"] == feature_distance(features["validate"], features["test"], 0)
        assert got["external"]["value"] > 5 * abs(got["own"]["value"])
        assert (got["external"]["p_value"], got["external"]["patients"]) == (0.001, [60, 50])
