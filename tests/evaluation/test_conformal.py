import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from mlx_cxr.evaluation.conformal import conformal_p_values, coverage_range, fit_bands, quantile_rank

NAN = math.nan
ALPHAS = (0.01, 0.05, 0.07, 0.1, 0.2, 0.25, 0.5, 0.9)


def bands_of(with_it, without, alpha):
    p = np.r_[with_it, without].astype(float)
    y = np.r_[np.ones(len(with_it)), np.zeros(len(without))]
    return fit_bands(p[:, None], y[:, None], alpha)


def test_bounds_by_hand():
    """Ten positives at alpha 0.2: ceil(11 x 0.8) = 9 of them stay, and the 9th largest is 0.15. Of nine negatives
    ceil(10 x 0.8) = 8, and the 8th smallest is 0.5."""
    with_it = [0.9, 0.05, 0.95, 0.15, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85]
    without = [0.01, 0.02, 0.04, 0.6, 0.1, 0.2, 0.3, 0.5, 0.03]
    bands = bands_of(with_it, without, 0.2)
    assert (bands.lower[0], bands.upper[0]) == (0.15, 0.5)
    assert (bands.positives[0], bands.negatives[0], bands.needed) == (10, 9, 4)
    p = np.array([[0.149], [0.15], [0.5], [0.501]])
    assert bands.present_plausible(p)[:, 0].tolist() == [False, True, True, True]
    assert bands.absent_plausible(p)[:, 0].tolist() == [True, True, True, False]


def test_equal_probabilities_stay_together():
    """Of twelve positives ten share 0.4: the 12th largest of which 0.1 may be cut is one of the ten."""
    bands = bands_of([0.9, *[0.4] * 10, 0.2], np.full(19, 0.3), 0.25)
    assert quantile_rank(12, 0.25) == 10
    assert (bands.lower[0], bands.upper[0]) == (0.4, 0.3)
    assert bands.present_plausible(np.array([[0.4]]))[0, 0]
    assert bands.absent_plausible(np.array([[0.3]]))[0, 0]


@pytest.mark.parametrize(("alpha", "needed"), [(0.1, 9), (0.05, 19), (0.2, 4), (0.15, 6), (0.3, 3), (0.5, 1), (0.9, 1)])
def test_too_few_of_a_class_rule_nothing_out(alpha, needed):
    few = np.linspace(0.3, 0.6, needed - 1)
    bands = bands_of(few, few, alpha)
    assert bands.needed == needed
    assert (bands.lower[0], bands.upper[0]) == (0, 1)
    enough = np.linspace(0.3, 0.6, needed)
    bands = bands_of(enough, enough, alpha)
    assert (bands.lower[0], bands.upper[0]) == (enough[0], enough[-1])


def test_the_rank_is_that_of_the_decimal_not_of_its_nearest_binary_fraction():
    assert (249 + 1) * (1 - 0.18) > 205, "what the ceiling would be taken of"
    assert quantile_rank(249, 0.18) == 205
    for alpha in (*ALPHAS, 0.18, 0.41):
        for n in range(400):
            assert quantile_rank(n, alpha) == math.ceil((n + 1) * (1 - Fraction(str(alpha))))


def test_studies_without_a_target_have_no_say_and_columns_are_apart():
    rng = np.random.default_rng(0)
    p, y = rng.random((60, 2)), rng.integers(0, 2, (60, 2)).astype(float)
    y[::3, 1] = NAN
    both, kept = fit_bands(p, y, 0.1), np.arange(60) % 3 > 0
    for k, rows in ((0, slice(None)), (1, kept)):
        one = fit_bands(p[rows, k : k + 1], y[rows, k : k + 1], 0.1)
        assert (both.lower[k], both.upper[k]) == (one.lower[0], one.upper[0])
        assert (both.positives[k], both.negatives[k]) == (one.positives[0], one.negatives[0])


@pytest.mark.parametrize(("n", "alpha"), [(9, 0.1), (29, 0.1), (50, 0.07), (6, 0.2)])
def test_coverage_over_draws_is_the_exact_one(n, alpha):
    """Over draws of n calibration positives and one more, coverage is exactly k / (n + 1); given the draw it follows
    Beta(k, n + 1 - k), which of uniform probabilities is the distribution of 1 - lower."""
    rng, draws, k = np.random.default_rng(1), 4000, quantile_rank(n, alpha)
    p = rng.random((n + 1, draws))
    bands = fit_bands(p[:-1], np.ones((n, draws)), alpha)
    covered = bands.present_plausible(p[-1:]).mean()
    expected = k / (n + 1)
    assert 1 - alpha <= expected < 1 - alpha + 1 / (n + 1)
    assert abs(covered - expected) < 4 * math.sqrt(expected * (1 - expected) / draws)
    assert stats.kstest(1 - bands.lower, stats.beta(k, n + 1 - k).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("n", "alpha", "tested"), [(9, 0.1, 40), (29, 0.1, 7), (50, 0.07, 300), (6, 0.2, 1)])
def test_coverage_on_a_finite_test_set_lies_in_its_range_as_often_as_it_says(n, alpha, tested):
    """scipy's beta-binomial by its probabilities, and 4,000 draws of both sets scored by the bands themselves."""
    low, high = coverage_range(n, alpha, tested)
    k = quantile_rank(n, alpha)
    mass = stats.betabinom(tested, k, n + 1 - k).pmf(np.arange(tested + 1))
    shares = np.arange(tested + 1) / tested
    below, above = mass[shares < low].sum(), mass[shares > high].sum()
    assert max(below, above) <= 0.025 + 1e-12
    # The ends are no further out than they have to be.
    assert mass[shares <= low].sum() >= 0.025
    assert mass[shares >= high].sum() >= 0.025
    rng = np.random.default_rng(3)
    bands = fit_bands(rng.random((n, 4000)), np.ones((n, 4000)), alpha)
    covered = bands.present_plausible(rng.random((tested, 4000))).mean(axis=0)
    assert np.mean(covered < low) == pytest.approx(below, abs=0.01)
    assert np.mean(covered > high) == pytest.approx(above, abs=0.01)


def test_ranges_that_say_nothing():
    assert coverage_range(8, 0.1, 50) == (1, 1)
    # So many tested that coverage is that of the draw: Beta(9, 1), whose percentiles are 0.025^(1/9) and 0.975^(1/9).
    assert coverage_range(9, 0.1, 100_000) == pytest.approx((0.025 ** (1 / 9), 0.975 ** (1 / 9)), abs=1e-3)
    assert np.isnan(coverage_range(50, 0.1, 0)).all()


def test_coverage_of_negatives_and_of_ties_is_at_least_what_was_asked_for():
    rng, draws = np.random.default_rng(2), 4000
    p = rng.integers(0, 6, (20, draws)) / 5
    bands = fit_bands(p[:-1], np.zeros((19, draws)), 0.2)
    assert bands.absent_plausible(p[-1:]).mean() > 0.8 + 0.02
    smooth = rng.random((20, draws))
    bands = fit_bands(smooth[:-1], np.zeros((19, draws)), 0.2)
    assert abs(bands.absent_plausible(smooth[-1:]).mean() - 0.8) < 4 * math.sqrt(0.16 / draws)


columns = st.integers(1, 30).flatmap(
    lambda n: st.tuples(
        hnp.arrays(np.float64, (n, 1), elements=st.integers(0, 8).map(lambda i: i / 8)),
        hnp.arrays(np.float64, (n, 1), elements=st.sampled_from([0.0, 1.0, NAN])),
    )
)


@settings(max_examples=150, deadline=None)
@given(columns=columns, alpha=st.sampled_from(ALPHAS), p=st.integers(0, 16).map(lambda i: i / 16))
def test_sets_are_the_classes_whose_p_value_is_above_alpha(columns, alpha, p):
    """By the definition, counted study by study in exact fractions."""
    probabilities, y = columns
    bands, asked = fit_bands(probabilities, y, alpha), np.array([[p]])
    with_it, without = probabilities[y == 1].tolist(), probabilities[y == 0].tolist()
    present = Fraction(1 + sum(x <= p for x in with_it), 1 + len(with_it))
    absent = Fraction(1 + sum(x >= p for x in without), 1 + len(without))
    assert bands.present_plausible(asked)[0, 0] == (present > Fraction(str(alpha)))
    assert bands.absent_plausible(asked)[0, 0] == (absent > Fraction(str(alpha)))
    values = conformal_p_values(asked, probabilities, y)
    assert [v[0, 0] for v in values] == pytest.approx([float(present), float(absent)], abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(columns=columns)
def test_the_more_may_be_ruled_out_the_smaller_the_sets(columns):
    bands = [fit_bands(*columns, alpha) for alpha in sorted(ALPHAS)]
    assert all(np.diff([b.lower[0] for b in bands]) >= 0)
    assert all(np.diff([b.upper[0] for b in bands]) <= 0)


@settings(max_examples=60, deadline=None)
@given(columns=columns, power=st.sampled_from([0.2, 3.0]))
def test_only_the_order_of_the_probabilities_matters(columns, power):
    p, y = columns
    plain, warped = fit_bands(p, y, 0.2), fit_bands(p**power, y, 0.2)
    np.testing.assert_array_equal(plain.present_plausible(p), warped.present_plausible(p**power))
    np.testing.assert_array_equal(plain.absent_plausible(p), warped.absent_plausible(p**power))


def test_bad_input_is_named():
    p, y = np.full((3, 1), 0.5), np.array([[1.0], [0.0], [NAN]])
    for alpha in (0.0, 1.0, -0.1, NAN):
        with pytest.raises(ValueError, match="alpha is"):
            fit_bands(p, y, alpha)
    with pytest.raises(ValueError, match=r"both must be \(N, L\)"):
        fit_bands(p, y[:2], 0.1)
    with pytest.raises(ValueError, match="SCORING_PROTOCOLS"):
        fit_bands(p, -y, 0.1)
    for value in (1.5, NAN):
        with pytest.raises(ValueError, match="pass probabilities, not logits"):
            fit_bands(np.full((3, 1), value), y, 0.1)
