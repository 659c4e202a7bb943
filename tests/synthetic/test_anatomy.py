"""Anatomy as drawn has the measures that were asked for."""

from dataclasses import replace

import numpy as np
import pytest

from mlx_cxr.synthetic.anatomy import HEART_WIDTH, LEFT, RIGHT, Anatomy, Shape, sample_patient
from mlx_cxr.synthetic.geometry import View


def patient(seed=1):
    return sample_patient(10_000_001, np.random.default_rng(seed), seed)


def view_of(person, kind="PA"):
    return View(kind, 440, 400, 0.1, 180.0, person.depth + 2.5, (0.0, 0.57 * person.height))


def cardiothoracic_ratio(anatomy):
    """Heart width over inner chest width as drawn: both read off the solids, in true cm."""
    x, _ = anatomy.view.plane(2.0)
    columns = np.flatnonzero((anatomy.heart() > 0).any(axis=0))
    return (x[0, columns[-1]] - x[0, columns[0]]) / (2 * anatomy.patient.width)


def test_heart_width_at_scale_one():
    person = patient()
    anatomy = Anatomy(person, Shape(HEART_WIDTH / (2 * person.width)), view_of(person))
    assert anatomy.heart_scale == pytest.approx(1.0)
    assert cardiothoracic_ratio(anatomy) * 2 * person.width == pytest.approx(HEART_WIDTH, rel=0.015)


@pytest.mark.parametrize("ratio", [0.40, 0.48, 0.58, 0.66])
def test_cardiothoracic_ratio_as_drawn(ratio):
    person = patient(3)
    assert cardiothoracic_ratio(Anatomy(person, Shape(ratio), view_of(person))) == pytest.approx(ratio, abs=0.012)


def test_sex_and_age_shape_the_body():
    rng = np.random.default_rng(0)
    many = [sample_patient(10_000_000 + number, rng, number) for number in range(600)]
    men, women = ([p for p in many if p.sex == sex] for sex in "MF")
    assert 0.4 < len(women) / 600 < 0.56
    assert all(p.breast == 0 for p in men)
    assert all(3 <= p.breast <= 8.5 for p in women)
    assert np.mean([2 * p.width for p in men]) == pytest.approx(26.8, abs=0.5)
    assert np.mean([2 * p.width for p in women]) == pytest.approx(24.9, abs=0.5)
    assert all(0.37 <= p.ratio <= 0.485 for p in many)
    assert all(18 <= p.age <= 91 for p in many)


def test_right_dome_is_higher_and_expiration_lifts_both():
    person = patient()
    full = Anatomy(person, Shape(0.45), view_of(person))
    assert full.dome(LEFT) - full.dome(RIGHT) == pytest.approx(1.1)
    shallow = Anatomy(person, Shape(0.45, dome_right=2.0, dome_left=2.0), view_of(person))
    assert full.dome(RIGHT) - shallow.dome(RIGHT) == pytest.approx(2.0)
    assert shallow.lung(RIGHT).sum() < 0.95 * full.lung(RIGHT).sum()


@pytest.mark.parametrize("kind", ["PA", "LATERAL"])
def test_both_views_see_about_the_same_lung(kind):
    person = replace(patient(), fat=1.0)
    anatomy = Anatomy(person, Shape(0.45), view_of(person, kind))
    area = (0.2 / anatomy.view.magnification(0.0)) ** 2
    litres = (anatomy.lung(RIGHT) + anatomy.lung(LEFT)).sum() * area / 1000
    # Pleural spaces with the heart in them; total lung capacity is about 6 litres.
    assert 4.5 < litres < 9.5


def test_points_of_the_lung_lie_between_ribs_and_dome():
    person = patient()
    anatomy = Anatomy(person, Shape(0.45), view_of(person))
    middle = np.array([[-7.0, 9.0, 0.0], [7.0, 9.0, 0.0]])
    assert anatomy.inside_lung(middle).all()
    outside = np.array([[-person.width - 1, 9, 0], [7, person.height + 8, 0], [7, -6, 0], [7, 9, person.depth + 1]])
    assert not anatomy.inside_lung(outside).any()
