import math

import numpy as np
import pytest
from scipy import stats

from mlx_cxr.evaluation.bootstrap import (
    MIN_REPLICATES,
    macro_interval,
    patient_bootstrap,
    patient_resamples,
    percentile_interval,
    weighted_mean,
)


def mean_of(values):
    return lambda weights: weighted_mean(values, weights)


def test_whole_patients_are_drawn_and_as_many_as_there_are():
    resamples = patient_resamples(np.array(["b", "a", "b", "c"]), samples=50, seed=0)
    np.testing.assert_array_equal(resamples.patients, ["a", "b", "c"])
    (weights,) = resamples.row_weights()
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    np.testing.assert_array_equal(weights[:, [0, 1, 3]].sum(axis=1), np.full(50, 3))
    assert len(np.unique(weights, axis=0)) > 3


def test_a_patient_may_be_drawn_more_often_than_a_byte_holds(monkeypatch):
    class First:
        def integers(self, high, size):
            return np.zeros(size, dtype=np.int64)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: First())
    assert patient_resamples(np.arange(300), 1, 0).counts[0, 0] == 300


def test_draws_depend_on_patients_and_seed_not_on_the_order_of_rows():
    ids = np.array(["p1", "p2", "p2", "p3"])
    first, shuffled = patient_resamples(ids, 20, 7), patient_resamples(ids[[3, 0, 2, 1]], 20, 7)
    np.testing.assert_array_equal(first.counts, shuffled.counts)
    assert not np.array_equal(first.counts, patient_resamples(ids, 20, 8).counts)


def test_blocks_are_the_draws_in_order(monkeypatch):
    resamples = patient_resamples(np.arange(10), samples=30, seed=1)
    whole = patient_bootstrap(mean_of(np.arange(10.0)), resamples)
    monkeypatch.setattr("mlx_cxr.evaluation.bootstrap._BLOCK_BYTES", 8 * 10 * 7)
    assert len(list(resamples.row_weights())) == 5
    np.testing.assert_array_equal(patient_bootstrap(mean_of(np.arange(10.0)), resamples), whole)
    expected = [np.repeat(np.arange(10.0), counts).mean() for counts in resamples.counts]
    np.testing.assert_allclose(whole, expected)


def test_interval_of_a_mean_is_the_textbooks():
    values = np.random.default_rng(0).normal(5, 2, 400)
    replicates = patient_bootstrap(mean_of(values), patient_resamples(np.arange(400), 4000, 0))
    interval = percentile_interval(float(values.mean()), replicates)
    low, high = stats.norm.interval(0.95, values.mean(), values.std() / 20)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.02)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        values = rng.normal(size=60)
        replicates = patient_bootstrap(mean_of(values), patient_resamples(np.arange(60), 300, trial))
        interval = percentile_interval(float(values.mean()), replicates)
        covered += interval.low <= 0 <= interval.high
    assert 0.88 <= covered / 200 <= 0.98


def test_resampling_images_would_be_too_sure_of_clustered_data():
    """Ten identical studies per patient carry one patient's information: the interval is sqrt(10) times as wide."""
    values = np.repeat(np.random.default_rng(0).normal(size=80), 10)

    def width(ids):
        replicates = patient_bootstrap(mean_of(values), patient_resamples(ids, 2000, 0))
        interval = percentile_interval(float(values.mean()), replicates)
        return interval.high - interval.low

    assert width(np.repeat(np.arange(80), 10)) / width(np.arange(800)) == pytest.approx(math.sqrt(10), rel=0.1)


def test_undefined_replicates_are_dropped_and_counted():
    replicates = np.r_[np.linspace(0, 1, 101), np.full(9, math.nan)]
    interval = percentile_interval(0.5, replicates)
    assert interval.plain() == pytest.approx(
        {"value": 0.5, "low": 0.025, "high": 0.975, "replicates": 101, "drawn": 110}
    )
    few = percentile_interval(0.5, np.zeros(MIN_REPLICATES - 1))
    assert math.isnan(few.low)
    assert few.replicates == MIN_REPLICATES - 1
    assert math.isnan(percentile_interval(math.nan, replicates).low)


def test_forty_replicates_give_an_interval_and_fewer_none():
    """Of 40, the outermost 2.5 % is the outermost one: 39 / 40 from the least to the next."""
    interval = percentile_interval(20.0, np.arange(40.0))
    assert (interval.low, interval.high, interval.replicates) == pytest.approx((0.975, 38.025, 40))
    assert math.isnan(percentile_interval(20.0, np.arange(39.0)).low)


def test_macro_is_over_the_same_labels_in_every_replicate():
    values = np.array([0.8, math.nan, 0.6])
    replicates = np.tile([0.8, 0.1, 0.6], (60, 1))
    replicates[:10, 0] = math.nan
    interval = macro_interval(values, replicates)
    assert (interval.value, interval.low, interval.replicates, interval.drawn) == pytest.approx((0.7, 0.7, 50, 60))
    assert math.isnan(macro_interval(np.full(2, math.nan), replicates[:, :2]).value)


def test_no_resamples_give_no_interval():
    replicates = patient_bootstrap(mean_of(np.arange(3.0)), patient_resamples(np.arange(3), 0, 0))
    assert replicates.shape == (0,)
    assert math.isnan(percentile_interval(1.0, replicates).high)


def test_weighted_mean_leaves_out_what_is_undefined():
    weights = np.array([[1, 2, 5], [0, 0, 1]])
    np.testing.assert_allclose(weighted_mean(np.array([1.0, 4.0, math.nan]), weights), [3.0, math.nan])


def test_a_mean_of_one_row_is_that_row():
    assert weighted_mean(np.array([3.0, math.nan]), np.array([[1, 4], [0, 4]]))[0] == 3.0
    with np.errstate(all="raise"):
        assert math.isnan(weighted_mean(np.array([3.0]), np.array([[0]]))[0])


def test_a_block_holds_a_resample_however_many_rows_there_are(monkeypatch):
    monkeypatch.setattr("mlx_cxr.evaluation.bootstrap._BLOCK_BYTES", 1)
    resamples = patient_resamples(np.arange(10), samples=3, seed=1)
    assert [block.shape for block in resamples.row_weights()] == [(1, 10)] * 3


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="-1 bootstrap samples"):
        patient_resamples(np.array(["a"]), -1, 0)
    with pytest.raises(ValueError, match="is the split empty"):
        patient_resamples(np.array([]), 10, 0)
