"""The kernel distance against scikit-learn's kernel pair by pair, moments in closed form, and an exact test by hand."""

import math
import time
from itertools import combinations

import numpy as np
import pytest
from sklearn.metrics.pairwise import polynomial_kernel

from mlx_cxr.evaluation.feature_distance import feature_distance, one_of_each


def test_the_distance_is_the_mean_of_scikit_learns_kernel_over_pairs_of_different_images():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(7, 12)), rng.normal(0.3, 2, size=(5, 12))
    kernel = {"degree": 3, "gamma": 1 / 12, "coef0": 1}

    def among(part):
        return np.mean([polynomial_kernel([a], [b], **kernel)[0, 0] for a, b in combinations(part, 2)])

    expected = among(first) + among(second) - 2 * polynomial_kernel(first, second, **kernel).mean()
    got = feature_distance(first, second, 0)
    assert got["value"] == pytest.approx(expected)
    assert got["patients"] == [7, 5]


def test_few_images_give_the_distance_of_the_distributions_on_average():
    """In one dimension the kernel is 1 + 3xy + 3x²y² + x³y³, so the distance is that of three moments."""
    rng = np.random.default_rng(1)
    moments = [np.array([mean, mean**2 + sd**2, mean**3 + 3 * mean * sd**2]) for mean, sd in ((0, 1), (0.4, 0.8))]
    expected = np.array([3, 3, 1]) @ (moments[0] - moments[1]) ** 2
    apart, alike = (
        np.array(
            [
                feature_distance(rng.normal(0, 1, (6, 1)), rng.normal(mean, sd, (6, 1)), 0, 0)["value"]
                for _ in range(8000)
            ]
        )
        for mean, sd in ((0.4, 0.8), (0, 1))
    )
    for values, truth in ((apart, expected), (alike, 0)):
        assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(len(values))
    assert (alike < 0).mean() > 0.4, "an unbiased distance of images of one kind is below 0 as often"


def test_the_p_value_is_the_share_of_permutations_that_are_as_far_apart():
    """Three and three numbers far apart: of the 20 ways to share them out, 2 are as far apart as they are."""
    low, high = np.array([[0.0], [0.1], [0.2]]), np.array([[3.0], [3.1], [3.2]])
    got = feature_distance(low, high, 0, 4000)["p_value"]
    assert got == pytest.approx(2 / 20, abs=4 * math.sqrt(0.1 * 0.9 / 4000))
    assert feature_distance(low, low, 0, 4000)["p_value"] > 0.5


def test_of_images_of_one_kind_one_in_twenty_has_a_p_value_below_5_percent():
    rng = np.random.default_rng(2)
    p = [feature_distance(*rng.normal(size=(2, 20, 16)), 0, 199)["p_value"] for _ in range(400)]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 400))
    assert np.mean(p) == pytest.approx(0.5, abs=0.06)


def test_a_set_of_one_image_has_no_distance():
    got = feature_distance(np.ones((1, 4)), np.ones((9, 4)), 0)
    assert math.isnan(got["value"])
    assert math.isnan(got["p_value"])
    assert got["patients"] == [1, 9]


def test_one_image_of_each_patient_is_drawn_and_of_many_patients_some():
    patients = np.array([f"p{i % 40}" for i in range(200)])
    rows = one_of_each(patients, 3)
    assert sorted(patients[rows]) == sorted(set(patients))
    assert set(rows // 40) == set(range(5)), "not always the first of them"
    np.testing.assert_array_equal(rows, one_of_each(patients, 3))
    some = one_of_each(patients, 3, most=10)
    assert len(set(patients[some])) == 10
    assert not np.array_equal(some, one_of_each(patients, 4, most=10))


def test_copies_of_a_patients_image_do_not_make_sets_differ():
    rng = np.random.default_rng(5)
    people = [rng.normal(size=(40, 8)).repeat(6, axis=0) for _ in range(2)]
    patients = np.array([f"p{i}" for i in range(40)]).repeat(6)
    drawn = [part[one_of_each(patients, 0)] for part in people]
    assert feature_distance(*drawn, 0)["p_value"] > 0.05
    assert feature_distance(*people, 0)["p_value"] < 0.01, "taken for independent, the copies would"


def test_five_thousand_images_take_seconds():
    rng = np.random.default_rng(6)
    sets = [rng.normal(shift, 1, size=(5000, 512)).astype(np.float32) for shift in (0, 0.02)]
    patients = np.array([f"p{i}" for i in range(5000)])
    start = time.perf_counter()
    got = feature_distance(*(one[one_of_each(patients, 0)] for one in sets), 0)
    assert time.perf_counter() - start < 10
    assert got["patients"] == [500, 500]
