import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit

from mlx_cxr.evaluation.calibration import (
    TEMPERATURE_RANGE,
    expected_calibration_error,
    fit_temperature,
    fit_temperatures,
    reliability,
)

NAN = math.nan


def simulated(n: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z = rng.normal(-1, 2, n)
    return z * temperature, (rng.random(n) < expit(z)).astype(float)


def negative_log_likelihood(temperature: float, z: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean(np.logaddexp(0, z / temperature) - y * z / temperature))


@pytest.mark.parametrize("true", [0.06, 0.4, 1.0, 3.0, 15.0])
def test_temperature_is_the_minimum_of_the_likelihood_and_near_the_truth(true):
    z, y = simulated(4000, true)
    found, source = fit_temperature(z, y)
    best = minimize_scalar(
        negative_log_likelihood, bounds=(0.05, 20), args=(z, y), method="bounded", options={"xatol": 1e-9}
    )
    assert found == pytest.approx(best.x, rel=1e-6)
    assert found == pytest.approx(true, rel=0.1)
    assert source == "validation"


def test_scaling_lowers_the_calibration_error_of_an_overconfident_model():
    z, y = simulated(4000, 3.0)
    calibration = fit_temperatures(z[:2000, None], y[:2000, None])
    test_z, test_y = z[2000:, None], y[2000:]
    after = expected_calibration_error(calibration.probabilities(test_z)[:, 0], test_y)
    assert after < 0.5 * expected_calibration_error(expit(test_z[:, 0]), test_y)


def test_bounds_and_defaults_say_so():
    z = np.array([-2.0, -1.0, 1.0, 2.0])
    assert fit_temperature(z, np.array([0, 0, 1, 1])) == (TEMPERATURE_RANGE[0], "bound")
    assert fit_temperature(z, np.array([1, 1, 0, 0])) == (TEMPERATURE_RANGE[1], "bound")
    assert fit_temperature(z, np.array([1, 1, 1, NAN])) == (1.0, "default")
    assert TEMPERATURE_RANGE == (0.05, 20.0)
    # A logit of 0 says nothing, and takes nothing from what the others say.
    assert fit_temperature(np.r_[0.0, z], np.array([1, 0, 0, 1, 1])) == (TEMPERATURE_RANGE[0], "bound")
    assert fit_temperature(z, np.full(4, NAN)) == (1.0, "default")
    assert fit_temperature(np.zeros(4), np.array([0, 0, 1, 1])) == (1.0, "default")


def test_masked_rows_have_no_say_and_columns_are_apart():
    z, y = simulated(600, 2.0)
    masked = np.where(np.arange(600) < 300, y, NAN)
    both = fit_temperatures(np.stack([z, z], axis=1), np.stack([y, masked], axis=1))
    assert both.temperatures[0] == fit_temperature(z, y)[0]
    assert both.temperatures[1] == fit_temperature(z[:300], y[:300])[0]
    np.testing.assert_allclose(both.probabilities(np.array([[1.0, 1.0]]))[0], expit(1 / both.temperatures))


def test_reliability_and_error_by_hand():
    p = np.array([0.1, 0.2, 0.3, 0.6, 0.9, 1.0, 0.7])
    y = np.array([0.0, 1.0, 0.0, 1.0, 1.0, 1.0, NAN])
    table = reliability(p, y, bins=2)
    np.testing.assert_array_equal(table.counts, [3, 3])
    np.testing.assert_allclose(table.mean_probability, [0.2, 2.5 / 3])
    np.testing.assert_allclose(table.observed_rate, [1 / 3, 1.0])
    assert table.ece == pytest.approx(0.5 * abs(0.2 - 1 / 3) + 0.5 * abs(2.5 / 3 - 1))
    four = reliability(p, y, bins=4)
    np.testing.assert_array_equal(four.counts, [2, 1, 1, 2])
    assert four.ece == pytest.approx((2 * abs(0.15 - 0.5) + 0.3 + 0.4 + 2 * 0.05) / 6)


def test_edges_belong_to_the_bin_above_and_empty_bins_are_nan():
    table = reliability(np.array([0.0, 0.5, 1.0]), np.array([0.0, 1.0, 1.0]), bins=4)
    np.testing.assert_array_equal(table.counts, [1, 0, 1, 1])
    assert math.isnan(table.observed_rate[1])
    assert math.isnan(expected_calibration_error(np.array([0.5]), np.array([NAN])))


def test_one_bin_is_the_mean_against_the_rate_and_fifteen_are_made_unless_asked_otherwise():
    p, y = np.array([0.2, 0.9, 0.4]), np.array([0.0, 1.0, 1.0])
    assert expected_calibration_error(p, y, bins=1) == pytest.approx(abs(1.5 / 3 - 2 / 3))
    assert len(reliability(p, y).counts) == 15
    grid = (np.arange(15) + 0.5) / 15
    # In fifteen bins each value has one of its own; with fewer, a 0 and a 1 would make up for each other.
    y = np.arange(15) % 2.0
    assert expected_calibration_error(grid, y) == pytest.approx(np.abs(grid - y).mean())


def test_bins_of_equal_mass():
    p = np.linspace(0.01, 0.2, 20) ** 2
    table = reliability(p, np.zeros(20), bins=4, binning="equal_mass")
    np.testing.assert_array_equal(table.counts, [4, 5, 5, 6])
    tied = reliability(np.full(9, 0.3), np.zeros(9), bins=4, binning="equal_mass")
    assert tied.counts.sum() == 9
    assert tied.ece == pytest.approx(0.3)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="row 1, column 0: logit nan is not finite"):
        fit_temperatures(np.array([[0.0], [NAN]]), np.zeros((2, 1)))
    with pytest.raises(ValueError, match=r"both must be \(N, L\)"):
        fit_temperatures(np.zeros((2, 1)), np.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"logits \(2,\) and targets \(2,\): both must be"):
        fit_temperatures(np.zeros(2), np.zeros(2))
    with pytest.raises(ValueError, match="pass probabilities, not logits"):
        reliability(np.array([1.2]), np.array([1.0]))
    with pytest.raises(ValueError, match="bins is 0"):
        reliability(np.array([0.2]), np.array([1.0]), bins=0)
    with pytest.raises(ValueError, match="'width': choose"):
        reliability(np.array([0.2]), np.array([1.0]), binning="width")
