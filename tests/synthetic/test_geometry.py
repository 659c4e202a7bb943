"""Rays through solids against closed forms."""

import numpy as np
import pytest

from mlx_cxr.synthetic.geometry import (
    Ellipsoid,
    View,
    noise_field,
    paint,
    resample,
    smooth_curve,
    splat_sections,
    tube,
)


def make_view(kind="PA", **changes):
    settings = {
        "rows": 200,
        "columns": 160,
        "pixel": 0.2,
        "distance": 180.0,
        "depth_gap": 11.0,
        "center": (0.5, 9.0),
        "tilt": 0.03,
        "turn": 0.05,
    }
    return View(kind, **(settings | changes))


@pytest.mark.parametrize("kind", ["PA", "AP", "LATERAL"])
def test_magnification_is_similar_triangles(kind):
    view = make_view(kind)
    # Towards the detector: +z (sternum) on PA, -z on AP, +x (left side) on laterals.
    sign = -1 if kind == "AP" else 1
    for depth in (-6.0, 0.0, 4.0):
        assert view.magnification(depth) == pytest.approx(180.0 / (180.0 - (11.0 - sign * depth)))


def test_bedside_ap_magnifies_the_heart_more_than_pa():
    pa = View("PA", 200, 160, 0.2, 180.0, 11.0, (0, 9))
    ap = View("AP", 200, 160, 0.2, 110.0, 13.0, (0, 9))
    heart = 3.0
    expected = (110 / (110 - (13 + heart))) / (180 / (180 - (11 - heart)))
    assert ap.magnification(heart) / pa.magnification(heart) == pytest.approx(expected)
    assert 1.10 < expected < 1.18


@pytest.mark.parametrize("kind", ["PA", "AP", "LATERAL"])
@pytest.mark.parametrize("depth", [-5.0, 0.0, 3.5])
def test_projection_undoes_the_plane(kind, depth):
    view = make_view(kind)
    across, down = view.plane(depth)
    flat = np.full(across.size, depth)
    if view.frontal:
        # `plane` gives anatomical x, with the turn taken out: project adds it again.
        points = np.column_stack([across.ravel(), down.ravel(), flat])
    else:
        points = np.column_stack([flat, down.ravel(), across.ravel()])
    column, row = view.project(points)
    rows, columns = np.mgrid[0 : across.shape[0], 0 : across.shape[1]]
    np.testing.assert_allclose(column, columns.ravel() * 2 + 1, atol=2e-3)
    np.testing.assert_allclose(row, rows.ravel() * 2 + 1, atol=2e-3)


def test_patient_left_is_image_right_and_sternum_is_image_left_on_laterals():
    left, right = make_view("PA").project(np.array([[5.0, 9, 0], [-5.0, 9, 0]]))[0]
    assert left > right
    front, back = make_view("LATERAL").project(np.array([[0, 9, 6.0], [0, 9, -6.0]]))[0]
    assert front < back


def test_chord_of_an_untilted_ellipsoid():
    view = make_view(tilt=0.0, turn=0.0)
    solid = Ellipsoid((1.0, 8.0, 2.0), (4.0, 3.0, 2.5))
    x, y = view.plane(2.0)
    expected = 2 * 2.5 * np.sqrt(np.maximum(1 - ((x - 1) / 4) ** 2 - ((y - 8) / 3) ** 2, 0))
    np.testing.assert_allclose(solid.chord(view), expected, atol=1e-4)
    lateral = make_view("LATERAL", tilt=0.0)
    z, y = lateral.plane(1.0)
    expected = 2 * 4.0 * np.sqrt(np.maximum(1 - ((z - 2) / 2.5) ** 2 - ((y - 8) / 3) ** 2, 0))
    np.testing.assert_allclose(solid.chord(lateral), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["PA", "LATERAL"])
def test_chords_of_a_tilted_ellipsoid_hold_its_volume(kind):
    view = make_view(kind)
    solid = Ellipsoid((0.5, 9.0, 1.0), (4.0, 2.0, 3.0), tilt=0.6)
    depth = 1.0 if kind == "PA" else 0.5
    area = (2 * view.pixel / view.magnification(depth)) ** 2
    assert solid.chord(view).sum() * area == pytest.approx(4 / 3 * np.pi * 4 * 2 * 3, rel=0.01)


def test_splat_keeps_the_total_and_its_centre():
    view = make_view()
    rng = np.random.default_rng(0)
    points = rng.uniform((-8, 2, -5), (8, 16, 5), (500, 3))
    weights = rng.uniform(0.5, 1.5, 500)
    layer = splat_sections(view, points, (), (), weights[:, None])
    assert layer.sum() * view.pixel**2 == pytest.approx(weights.sum(), rel=1e-5)
    column, row = view.project(points)
    rows, columns = np.mgrid[0:200, 0:160] + 0.5
    assert (layer * columns).sum() / layer.sum() == pytest.approx((column * weights).sum() / weights.sum(), abs=1e-2)
    assert (layer * rows).sum() / layer.sum() == pytest.approx((row * weights).sum() / weights.sum(), abs=1e-2)
    outside = splat_sections(view, np.array([[500.0, 0, 0]]), (), (), np.array([[1.0]]))
    assert outside.shape == (200, 160)
    assert not outside.any()


def test_sections_fall_where_their_points_do():
    view = make_view("AP")
    rng = np.random.default_rng(0)
    centers = rng.uniform((-8, 2, -5), (8, 16, 5), (50, 3))
    axis = rng.normal(0, 1, (50, 3)) * [1, 1, 0]
    offsets, weights = rng.uniform(-1, 1, (50, 4)), rng.uniform(0.5, 1.5, (50, 4))
    points = centers[:, None] + axis[:, None] * offsets[..., None]
    expected = splat_sections(view, points.reshape(-1, 3), (), (), weights.reshape(-1, 1))
    got = splat_sections(view, centers, (axis,), (offsets,), weights)
    np.testing.assert_allclose(got, expected, atol=2e-3 * expected.max())
    twice = splat_sections(view, centers, (axis,), (offsets,), weights, onto=got.copy())
    np.testing.assert_allclose(twice, 2 * got, rtol=1e-5)


@pytest.mark.parametrize(("radius", "wall"), [(0.5, None), (1.0, None), (0.8, 0.2)])
def test_tube_holds_the_volume_of_a_rod(radius, wall):
    view = make_view(tilt=0.1, turn=0.0, pixel=0.1, rows=400, columns=320)
    path = np.array([[-5.0, 4.0, 1.0], [5.0, 14.0, 1.0]])
    thickness = tube(view, path, radius, wall)
    area = (view.pixel / view.magnification(1.0)) ** 2
    section = np.pi * (radius**2 - ((radius - wall) ** 2 if wall else 0.0))
    assert thickness.sum() * area == pytest.approx(section * np.hypot(10, 10), rel=0.01)


def test_paint_covers_the_polygon():
    view = make_view(tilt=0.0, turn=0.0)
    square = np.array([[-3, 6, 0], [3, 6, 0], [3, 12, 0], [-3, 12, 0]], float)
    layer = paint(view, square, 0.7)
    area = (view.pixel / view.magnification(0.0)) ** 2
    assert layer.sum() * area == pytest.approx(36.0, rel=0.08)
    assert layer.max() == pytest.approx(1.0, abs=1e-3)
    assert not paint(view, square + 500, 0.7).any()


def test_curves_pass_through_their_knots_at_even_steps():
    knots = np.array([[0.0, 0, 0], [1, 2, 0], [4, 2, 1]])
    curve = smooth_curve(knots, 201)
    for knot in knots:
        assert np.linalg.norm(curve - knot, axis=1).min() < 1e-6
    even = resample(np.array([[0.0, 0, 0, 5.0], [3, 4, 0, 10.0]]), 0.5)
    np.testing.assert_allclose(np.linalg.norm(np.diff(even[:, :3], axis=0), axis=1), 0.5)
    np.testing.assert_allclose(even[5, 3], 7.5)


def test_noise_is_standard_and_seeded():
    one, two = (noise_field(np.random.default_rng(7), (90, 70), 20) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert abs(one.mean()) < 1e-5
    assert one.std() == pytest.approx(1.0, abs=1e-4)
