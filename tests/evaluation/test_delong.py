import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from mlx_cxr.evaluation.delong import holm, paired_delong


def clustered_sample(seed, patients=25, studies=4):
    """One label with ties and masked rows; patients with both classes, one, or none."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), rng.integers(1, studies + 1, patients))
    truth = rng.normal(size=patients)[patient] + 0.7 * rng.normal(size=len(patient))
    y = np.where(rng.random(len(patient)) < 0.1, math.nan, truth > 0.3)
    first, second = (np.round(truth + rng.normal(size=len(patient)), 1) for _ in range(2))
    return y, first, second, patient.astype(str)


def pair_components(y, s):
    """DeLong's components by counting pairs: of each positive, and of each negative; ties half."""
    x, z = s[y == 1], s[y == 0]
    wins = (x[:, None] > z) + 0.5 * (x[:, None] == z)
    return wins.mean(axis=1), wins.mean(axis=0)


def brute_force_error(y, first, second, patient):
    """Obuchowski's formulas, literally: covariances of both AUCs from S10, S01 and S11 by patient."""
    kept = ~np.isnan(y)
    y, patient, scores = y[kept], patient[kept], [s[kept] for s in (first, second)]
    everyone = sorted(set(patient))
    m, n = (y == 1).sum(), (y == 0).sum()
    deviations = []
    for s in scores:
        v10, v01 = pair_components(y, s)
        auc = v10.mean()
        x = np.array([v10[patient[y == 1] == p].sum() - (patient[y == 1] == p).sum() * auc for p in everyone])
        z = np.array([v01[patient[y == 0] == p].sum() - (patient[y == 0] == p).sum() * auc for p in everyone])
        deviations.append((x, z))
    i10, i01, i = len(set(patient[y == 1])), len(set(patient[y == 0])), len(everyone)

    def covariance(a, b):
        s10 = i10 / ((i10 - 1) * m) * np.sum(a[0] * b[0])
        s01 = i01 / ((i01 - 1) * n) * np.sum(a[1] * b[1])
        s11 = i / (i - 1) * np.sum(a[0] * b[1])
        s11_other = i / (i - 1) * np.sum(b[0] * a[1])
        return s10 / m + s01 / n + (s11 + s11_other) / (m * n)

    a, b = deviations
    return math.sqrt(covariance(a, a) + covariance(b, b) - 2 * covariance(a, b))


@pytest.mark.parametrize("seed", range(5))
def test_clustered_test_is_obuchowskis_formula_and_scikit_learns_aucs(seed):
    y, first, second, patient = clustered_sample(seed)
    got = paired_delong(y, first, second, patient)
    kept = ~np.isnan(y)
    assert got.difference == pytest.approx(
        roc_auc_score(y[kept], first[kept]) - roc_auc_score(y[kept], second[kept]), abs=1e-14
    )
    error = brute_force_error(y, first, second, patient)
    assert got.standard_error == pytest.approx(error, rel=1e-12)
    assert got.p_value == pytest.approx(2 * norm.sf(abs(got.difference) / error))


@pytest.mark.parametrize("seed", range(3))
def test_one_study_per_patient_is_delongs_own_test(seed):
    """DeLong 1988: the sample covariances of the components, over m and n."""
    y, first, second, _ = clustered_sample(seed)
    kept = ~np.isnan(y)
    (a10, a01), (b10, b01) = (pair_components(y[kept], s[kept]) for s in (first, second))
    s10, s01 = np.cov(a10, b10), np.cov(a01, b01)
    contrast = np.array([1, -1])
    variance = contrast @ (s10 / len(a10) + s01 / len(a01)) @ contrast
    got = paired_delong(y, first, second, np.arange(len(y)))
    assert got.standard_error == pytest.approx(math.sqrt(variance), rel=1e-12)


def test_a_study_told_twice_is_no_more_evidence():
    y, first, second, patient = clustered_sample(0)
    once = paired_delong(y, first, second, patient)
    twice = paired_delong(*(np.tile(x, 2) for x in (y, first, second, patient)))
    assert twice.difference == pytest.approx(once.difference)
    assert twice.standard_error == pytest.approx(once.standard_error, rel=1e-12)
    as_if_independent = paired_delong(*(np.tile(x, 2) for x in (y, first, second)), np.arange(2 * len(y)))
    assert as_if_independent.standard_error < 0.8 * once.standard_error


def test_equal_models_are_called_different_about_as_often_as_allowed_only_by_the_clustered_test():
    """Two models whose errors stick to the patient: of 600 true null hypotheses, those rejected at 0.05."""
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(60), 5)
    rejected = np.zeros(2)
    for _ in range(600):
        truth = rng.normal(size=60)[patient] + 0.5 * rng.normal(size=300)
        y = (truth + 0.7 * rng.normal(size=300) > 1).astype(float)
        first, second = (truth + rng.normal(size=60)[patient] + 0.3 * rng.normal(size=300) for _ in range(2))
        for place, ids in enumerate((patient, np.arange(300))):
            rejected[place] += paired_delong(y, first, second, ids).p_value < 0.05
    clustered, independent = rejected / 600
    assert 0.03 <= clustered <= 0.075
    assert independent > 0.1


def test_only_ranks_count_and_the_order_of_the_pair_only_turns_the_sign():
    y, first, second, patient = clustered_sample(1)
    got = paired_delong(y, first, second, patient)
    assert paired_delong(y, np.exp(first), 3 * second - 7, patient) == got
    turned = paired_delong(y, second, first, patient)
    assert (turned.difference, turned.p_value) == pytest.approx((-got.difference, got.p_value))


def test_models_that_rank_alike_are_not_different():
    y, first, _, patient = clustered_sample(2)
    got = paired_delong(y, first, 2 * first + 1, patient)
    assert (got.difference, got.standard_error, got.p_value) == (0, 0, 1)


def test_what_cannot_be_tested_is_nan():
    s, ids = np.array([0.1, 0.2, 0.3, 0.4]), np.array(["a", "b", "c", "d"])
    one_class = paired_delong(np.array([1, 1, math.nan, 1]), s, s[::-1], ids)
    assert math.isnan(one_class.difference)
    one_positive = paired_delong(np.array([0, 0, 0, 1.0]), s, s[::-1], ids)
    assert one_positive.difference == 1
    assert math.isnan(one_positive.p_value)
    one_patient_with_positives = paired_delong(np.array([0, 0, 1.0, 1]), s, s[::-1], np.array(["a", "b", "c", "c"]))
    assert math.isnan(one_patient_with_positives.standard_error)
    perfect_against_reversed = paired_delong(np.array([0, 0, 1.0, 1]), s, s[::-1], ids)
    assert (perfect_against_reversed.difference, perfect_against_reversed.standard_error) == (1, 0)
    assert math.isnan(perfect_against_reversed.p_value)


def test_bad_input_is_named():
    y, ids = np.array([0.0, 1.0]), np.array(["a", "b"])
    with pytest.raises(ValueError, match=r"shapes \(2,\), \(2,\), \(1,\), \(2,\)"):
        paired_delong(y, y, y[:1], ids)
    with pytest.raises(ValueError, match="not 1, 0 or NaN"):
        paired_delong(y - 1, y, y, ids)
    with pytest.raises(ValueError, match="a score is not finite"):
        paired_delong(y, y, np.array([0, math.inf]), ids)


def test_holm_by_hand():
    got = holm(np.array([0.04, math.nan, 0.01, 0.03, 0.9]))
    # Sorted 0.01, 0.03, 0.04, 0.9 times 4, 3, 2, 1, and never falling.
    np.testing.assert_allclose(got, [0.09, math.nan, 0.04, 0.09, 0.9])
    np.testing.assert_array_equal(holm(np.array([0.6, 0.7])), [1, 1])
    assert holm(np.array([])).shape == (0,)


@given(
    st.lists(st.integers(0, 200).map(lambda i: i / 200), min_size=1, max_size=20), st.sampled_from([0.01, 0.05, 0.2])
)
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values, alpha):
    """The definition: from the smallest on, reject while p <= alpha / (tests left)."""
    rejected = set()
    for step, index in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[index] * (len(p_values) - step) > alpha:
            break
        rejected.add(int(index))
    assert set(np.flatnonzero(holm(np.array(p_values)) <= alpha).tolist()) == rejected
