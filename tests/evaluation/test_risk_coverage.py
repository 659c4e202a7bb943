import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_predictions import simulated

from mlx_cxr.core.labels import LABELS, SCORING_PROTOCOLS
from mlx_cxr.evaluation.operating_points import ABSTAIN
from mlx_cxr.evaluation.results import fit_operating_points
from mlx_cxr.evaluation.risk_coverage import call_confidences, risk_coverage, weighted_aurc


def test_the_curve_by_hand():
    """The surest call is right, the next wrong, then two that are equally sure, one of them wrong."""
    wrong, confidence = np.array([1, 0, 1, 0]), np.array([0.4, 0.9, 0.7, 0.4])
    coverage, risk = risk_coverage(wrong, confidence)
    np.testing.assert_allclose(coverage, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(risk, [0, 1 / 2, 1.5 / 3, 2 / 4])
    assert weighted_aurc(wrong, confidence, np.ones((1, 4)))[0] == pytest.approx((0 + 1 / 2 + 1 / 2 + 1 / 2) / 4)


def test_equal_confidences_are_the_mean_over_their_orders():
    rng = np.random.default_rng(0)
    wrong, confidence = rng.integers(0, 2, 12), rng.integers(0, 3, 12)
    orders = []
    for _ in range(20_000):
        order = np.lexsort((rng.random(12), -confidence))
        orders.append(np.cumsum(wrong[order]) / np.arange(1, 13))
    np.testing.assert_allclose(risk_coverage(wrong, confidence)[1], np.mean(orders, axis=0), atol=0.015)


def test_the_area_of_perfect_random_and_reversed_rankings():
    """n calls, e of them wrong. All alike: the risk e / n. The wrong ones last: sum over j = 1 ... e of j / (n - e + j)
    over n (the optimum of Geifman, Uziel and El-Yaniv, arXiv:1805.08206); first: 1 while they last, then e / i."""
    n, e = 40, 7
    wrong = np.r_[np.zeros(n - e), np.ones(e)]
    ones, rank = np.ones((1, n)), np.arange(n, 0, -1)
    assert weighted_aurc(wrong, np.zeros(n), ones)[0] == pytest.approx(e / n)
    best = sum(j / (n - e + j) for j in range(1, e + 1)) / n
    assert weighted_aurc(wrong, rank, ones)[0] == pytest.approx(best)
    worst = (e + sum(e / i for i in range(e + 1, n + 1))) / n
    assert weighted_aurc(wrong, -rank, ones)[0] == pytest.approx(worst)
    assert weighted_aurc(np.zeros(n), rank, ones)[0] == 0
    assert weighted_aurc(np.ones(n), rank, ones)[0] == pytest.approx(1)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)), min_size=1),
)
def test_weights_are_rows_that_are_repeated(rows):
    wrong, confidence, *weights = (np.array(column) for column in zip(*rows, strict=True))
    got = weighted_aurc(wrong, confidence, np.stack(weights))
    for area, weight in zip(got, weights, strict=True):
        drawn = np.repeat(np.arange(len(rows)), weight)
        if not len(drawn):
            assert math.isnan(area)
            continue
        assert area == pytest.approx(risk_coverage(wrong[drawn], confidence[drawn])[1].mean(), abs=1e-12)
        assert -1e-12 <= area <= 1 + 1e-12


def test_nothing_to_rank_has_no_area():
    assert np.isnan(weighted_aurc(np.empty(0), np.empty(0), np.empty((3, 0)))).all()


@pytest.fixture(scope="module")
def ranked():
    validation, test = simulated(60, "validate", 0), simulated(70, "test", 1)
    points = fit_operating_points(validation, "empty_negative", "f1", 0.1)
    probabilities = points.calibration.probabilities(test.logits)
    return validation, probabilities, points, call_confidences(validation, probabilities, points)


def test_confidences_count_the_validation_studies_of_the_class_that_is_not_called(ranked):
    validation, p, points, confidences = ranked
    y = SCORING_PROTOCOLS["empty_negative"].apply(validation.raw_labels)
    q = points.calibration.probabilities(validation.logits)
    rng = np.random.default_rng(0)
    for row, k in zip(rng.integers(0, len(p), 60), rng.integers(0, len(LABELS), 60), strict=True):
        called = p[row, k] >= points.thresholds.values[k]
        others = q[y[:, k] == (0 if called else 1), k]
        beyond = others >= p[row, k] if called else others <= p[row, k]
        assert confidences["conformal"][row, k] == pytest.approx(1 - (1 + beyond.sum()) / (1 + len(others)))
        assert confidences["probability"][row, k] == pytest.approx(p[row, k] if called else 1 - p[row, k])


def test_calls_that_are_made_have_a_conformal_confidence_of_at_least_what_alpha_asks(ranked):
    _, p, points, confidences = ranked
    made = points.states(p) != ABSTAIN
    assert 0.1 < made.mean() < 0.95
    assert confidences["conformal"][made].min() >= 0.9 - 1e-12
