import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from mlx_cxr.evaluation.metrics import (
    METRICS,
    both_classes,
    choose_thresholds,
    label_metrics,
    macro_auc,
    roc_auc_per_label,
    weighted_auc,
    weighted_metrics,
)

NAN = math.nan


def pair_counting_auc(y, s):
    """The definition: share of (positive, negative) pairs in the right order, ties half."""
    wins = [(p > n) + 0.5 * (p == n) for p in s[y == 1] for n in s[y == 0]]
    return np.mean(wins)


@pytest.fixture
def label():
    """One label with ties, masked rows and both classes."""
    rng = np.random.default_rng(0)
    y = rng.choice([0.0, 0.0, 1.0, NAN], 80)
    s = np.round(rng.normal(size=80) + np.nan_to_num(y), 1)
    return y, s, 1 / (1 + np.exp(-s))


def test_auc_is_the_share_of_ordered_pairs(label):
    y, s, _ = label
    assert roc_auc_per_label(y[:, None], s[:, None])[0] == pytest.approx(pair_counting_auc(y, s))


def test_auc_of_logits_that_saturate_the_sigmoid_in_float32():
    y, s = np.array([0.0, 1.0]), np.array([40.0, 41.0])
    assert roc_auc_per_label(y[:, None], s[:, None])[0] == 1.0


def test_single_class_columns_are_nan_and_left_out_of_the_macro_mean():
    y = np.array([[1, 1, 0, NAN], [1, 0, 0, NAN], [1, 1, NAN, NAN]])
    s = np.array([[3, 3, 1, 0], [2, 1, 0, 0], [1, 2, 5, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        auc = roc_auc_per_label(y, s)
    np.testing.assert_array_equal(auc, [NAN, 1.0, NAN, NAN])
    assert macro_auc(auc) == 1.0
    assert math.isnan(macro_auc(auc[:1]))
    np.testing.assert_array_equal(both_classes(y), [False, True, False, False])


def test_every_metric_equals_scikit_learns(label):
    y, s, p = label
    kept = ~np.isnan(y)
    got = label_metrics(y, s, p, 0.6)
    y, s, p = y[kept], s[kept], p[kept]
    call = p >= 0.6
    expected = {
        "roc_auc": sk.roc_auc_score(y, s),
        "average_precision": sk.average_precision_score(y, s),
        "f1": sk.f1_score(y, call),
        "sensitivity": sk.recall_score(y, call),
        "specificity": sk.recall_score(y, call, pos_label=0),
        "precision": sk.precision_score(y, call),
        "brier": np.mean((p - y) ** 2),
    }
    assert tuple(got) == METRICS
    assert got == pytest.approx(expected)


@pytest.mark.parametrize(
    ("y", "threshold", "defined"),
    [
        ([1, 1], 0.5, {"sensitivity": 0.5, "brier": (0.1**2 + 0.8**2) / 2}),
        ([0, 0], 0.5, {"specificity": 0.5, "brier": (0.9**2 + 0.2**2) / 2}),
        ([NAN, NAN], 0.5, {}),
        (
            [1, 0],
            0.95,
            {"roc_auc": 1, "average_precision": 1, "f1": 0, "sensitivity": 0, "specificity": 1, "brier": 0.025},
        ),
    ],
    ids=["positives only", "negatives only", "nothing", "no call"],
)
def test_what_is_undefined_is_nan(y, threshold, defined):
    p = np.array([0.9, 0.2])
    got = label_metrics(np.array(y), p, p, threshold)
    assert {k: v for k, v in got.items() if not math.isnan(v)} == pytest.approx(defined)


def test_weighted_metrics_equal_repeating_the_rows(label):
    y, s, p = label
    rng = np.random.default_rng(1)
    weights = rng.multinomial(len(y), np.full(len(y), 1 / len(y)), size=20)
    weights[0] = 0
    weights[1] = np.where(y == 1, 2, 0)
    weights[2] = np.where(y == 0, 1, 0)
    got = weighted_metrics(y, s, p, 0.6, weights)
    for row, counts in enumerate(weights):
        drawn = np.repeat(np.arange(len(y)), counts)
        expected = list(label_metrics(y[drawn], s[drawn], p[drawn], 0.6).values())
        np.testing.assert_allclose(got[row], expected, rtol=1e-12)


def test_unit_weights_give_the_metrics_themselves(label):
    got = weighted_metrics(*label, 0.3, np.ones((1, 80)))[0]
    np.testing.assert_allclose(got, list(label_metrics(*label, 0.3).values()), rtol=1e-12)


@pytest.mark.parametrize("most_pairs", [10**9, 0])
def test_auc_alone_is_that_of_all_metrics_by_pairs_and_by_sorting(label, monkeypatch, most_pairs):
    """Also against scikit-learn, with ties, masked rows, and resamples that lack a class or everything."""
    monkeypatch.setattr("mlx_cxr.evaluation.metrics._MOST_PAIRS", most_pairs)
    y, s, p = label
    weights = np.random.default_rng(1).multinomial(len(y), np.full(len(y), 1 / len(y)), size=20)
    weights[0], weights[1] = 0, np.where(y == 1, 2, 0)
    got, kept = weighted_auc(y, s, weights), ~np.isnan(y)
    np.testing.assert_allclose(got, weighted_metrics(y, s, p, 0.5, weights)[:, 0], rtol=1e-12)
    assert np.isnan(got[:2]).all()
    for row in range(2, 20):
        assert got[row] == pytest.approx(sk.roc_auc_score(y[kept], s[kept], sample_weight=weights[row, kept]))
    assert np.isnan(weighted_auc(np.zeros(4), np.arange(4.0), np.ones((3, 4)))).all()
    with pytest.raises(ValueError, match="row 1, column 0: target 2"):
        weighted_auc(np.array([0, 2.0]), np.zeros(2), np.ones((1, 2)))


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 1.0])
def test_a_probability_at_the_threshold_is_a_call(threshold):
    """Counted by hand, with one and with all rows on the threshold; the resampled metrics agree."""
    y, p = np.array([1.0, 1.0, 0.0, 0.0, 0.0]), np.array([threshold] * 3 + [0.0, 1.0])
    calls = {0.0: [1, 1, 1, 1, 1], 0.25: [1, 1, 1, 0, 1], 0.5: [1, 1, 1, 0, 1], 1.0: [1, 1, 1, 0, 1]}[threshold]
    wanted = {"sensitivity": 1.0, "specificity": 1 - sum(calls[2:]) / 3, "precision": 2 / sum(calls)}
    got = label_metrics(y, p, p, threshold)
    assert {name: got[name] for name in wanted} == pytest.approx(wanted)
    resampled = dict(zip(METRICS, weighted_metrics(y, p, p, threshold, np.ones((1, 5)))[0], strict=True))
    assert {name: resampled[name] for name in wanted} == pytest.approx(wanted)


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.integers(0, 8)), min_size=2, max_size=40).filter(
        lambda rows: len({y for y, _ in rows}) == 2
    )
)
def test_thresholds_are_the_best_and_of_equal_ones_the_highest(rows):
    y, p = np.array([r[0] for r in rows]), np.array([r[1] for r in rows]) / 8
    candidates = sorted(set(p), reverse=True)
    youden = [
        np.sum((p >= t) & (y == 1)) * np.sum(y == 0) - np.sum((p >= t) & (y == 0)) * np.sum(y == 1) for t in candidates
    ]
    f1 = [sk.f1_score(y, p >= t) for t in candidates]
    assert choose_thresholds(y[:, None], p[:, None], "youden").values[0] == candidates[int(np.argmax(youden))]
    chosen = choose_thresholds(y[:, None], p[:, None], "f1").values[0]
    assert sk.f1_score(y, p >= chosen) == pytest.approx(max(f1))
    assert all(score < max(f1) - 1e-12 for t, score in zip(candidates, f1, strict=True) if t > chosen)


def test_threshold_ignores_masked_rows_and_falls_back_where_a_class_lacks():
    y = np.array([[1, 1], [0, 1], [NAN, NAN], [NAN, 1]])
    p = np.array([[0.7, 0.2], [0.6, 0.3], [0.99, 0.4], [0.1, 0.5]])
    thresholds = choose_thresholds(y, p, "f1")
    np.testing.assert_array_equal(thresholds.values, [0.7, 0.5])
    assert thresholds.sources == ("validation", "default")


def test_bad_input_is_named():
    y, s = np.zeros((3, 2)), np.zeros((3, 2))
    with pytest.raises(ValueError, match=r"targets \(3, 2\) and scores \(2, 2\)"):
        roc_auc_per_label(y, s[:2])
    with pytest.raises(ValueError, match=r"row 1, column 0: target -1\.0 is not 1, 0 or NaN"):
        roc_auc_per_label(np.array([[0, 1], [-1, 1]]), s[:2])
    with pytest.raises(ValueError, match="row 2, column 1: score inf is not finite"):
        roc_auc_per_label(y, np.array([[0, 0], [0, 0], [0, math.inf]]))
    with pytest.raises(ValueError, match=r"row 1: probability 1\.5 is outside"):
        label_metrics(y[:, 0], s[:, 0], np.array([0, 1.5, 0]), 0.5)
    with pytest.raises(ValueError, match=r"row 2: probability -0\.5 is outside"):
        label_metrics(y[:, 0], s[:, 0], np.array([0, 1, -0.5]), 0.5)
    with pytest.raises(ValueError, match=r"targets \(3,\) and scores \(3,\): both must be"):
        roc_auc_per_label(y[:, 0], s[:, 0])
    with pytest.raises(ValueError, match=r"weights have shape \(2, 3, 1\), expected"):
        weighted_metrics(y[:, 0], s[:, 0], s[:, 0], 0.5, np.ones((2, 3, 1)))
    with pytest.raises(ValueError, match=r"weights have shape \(2, 2\), expected \(B, 3\)"):
        weighted_metrics(y[:, 0], s[:, 0], s[:, 0], 0.5, np.ones((2, 2)))
    with pytest.raises(ValueError, match="'cost': choose 'youden' or 'f1'"):
        choose_thresholds(y, s, "cost")
