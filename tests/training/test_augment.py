"""Augmentation against SciPy's affine transform, and against its documented directions."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from scipy import ndimage

from mlx_cxr.core.config_schema import AugmentConfig
from mlx_cxr.training.augment import affine, augment

IDENTITY = AugmentConfig(shift=0, scale=0, rotate=0, brightness=0, contrast=0)


def images(count: int = 3, side: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side)).astype(np.uint8)


def moved(image: np.ndarray, degrees: float = 0, zoom: float = 1, down: float = 0, right: float = 0) -> np.ndarray:
    out = affine(
        mx.array(image[None].astype(np.float32)),
        mx.full((1, 1, 1), math.radians(degrees)),
        mx.full((1, 1, 1), zoom),
        mx.array([down, right]).reshape(1, 1, 1, 2),
    )
    return np.array(out)[0]


def spot(row: int, column: int, side: int = 25) -> np.ndarray:
    image = np.zeros((side, side), dtype=np.float32)
    image[row, column] = 1
    return image


def brightest(image: np.ndarray) -> tuple[int, int]:
    return tuple(int(i) for i in np.unravel_index(image.argmax(), image.shape))


def test_no_amounts_give_the_image():
    image = images()
    out = augment(mx.array(image), mx.random.key(0), IDENTITY)
    assert out.dtype == mx.float32
    np.testing.assert_allclose(np.array(out), image / 255, atol=1e-6)
    np.testing.assert_allclose(
        np.array(augment(mx.array(image / 255), mx.random.key(0), IDENTITY)), image / 255, atol=1e-6
    )


def test_shift_moves_down_and_right():
    assert brightest(moved(spot(10, 10), down=4, right=-3)) == (14, 7)


def test_rotation_is_counter_clockwise():
    """What is right of the centre (12, 12) comes to stand above it."""
    assert brightest(moved(spot(12, 20), degrees=90)) == (4, 12)
    assert brightest(moved(spot(4, 12), degrees=90)) == (12, 4)


def test_zoom_above_one_enlarges():
    assert brightest(moved(spot(12, 16), zoom=2)) == (12, 20)
    assert brightest(moved(spot(12, 20), zoom=0.5)) == (12, 16)


@pytest.mark.parametrize("side", [24, 25, 96])
@pytest.mark.parametrize(
    ("degrees", "zoom", "down", "right"), [(7, 1.1, 1.3, -2.6), (-45, 0.7, 0, 5), (0, 1, 0.5, 0.25)]
)
def test_values_are_those_of_scipy(side, degrees, zoom, down, right):
    image = images(1, side)[0].astype(np.float32)
    angle, middle = math.radians(degrees), (side - 1) / 2
    # Output to input, as SciPy wants it: undo the shift, the rotation and the zoom about the centre.
    matrix = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]) / zoom
    offset = middle - matrix @ (middle + np.array([down, right]))
    wanted = ndimage.affine_transform(image, matrix, offset, order=1, mode="grid-constant", cval=0.0)
    got = moved(image, degrees, zoom, down, right)
    # Bilinear weights in float32, times 255.
    np.testing.assert_allclose(got, wanted, atol=255 * side * 1e-6 * 4)


def test_nothing_comes_in_from_outside():
    bright = np.ones((16, 16), dtype=np.float32)
    assert np.array_equal(moved(bright, down=8)[:8], np.zeros((8, 16)))
    assert np.array_equal(moved(bright, down=-8)[8:], np.zeros((8, 16)))
    assert np.array_equal(moved(bright, right=8)[:, :8], np.zeros((16, 8)))
    assert np.array_equal(moved(bright, right=-8)[:, 8:], np.zeros((16, 8)))
    assert not moved(bright, right=100).any()
    assert moved(bright, zoom=0.5)[0, 0] == 0


def test_the_same_key_gives_the_same_variants():
    image, config = mx.array(images()), AugmentConfig()
    first = np.array(augment(image, mx.random.key(1), config))
    np.testing.assert_array_equal(first, np.array(augment(image, mx.random.key(1), config)))
    assert np.abs(first - np.array(augment(image, mx.random.key(2), config))).max() > 0.05


def test_images_of_a_batch_vary_independently():
    image = np.repeat(images(1), 4, axis=0)
    out = np.array(augment(mx.array(image), mx.random.key(0), AugmentConfig()))
    for i in range(3):
        assert np.abs(out[i] - out[i + 1]).max() > 0.05


@pytest.mark.parametrize("seed", range(3))
def test_values_stay_in_range_at_the_largest_amounts(seed):
    strongest = AugmentConfig(shift=1, scale=0.9, rotate=45, brightness=1, contrast=0.9)
    out = np.array(augment(mx.array(images(16)), mx.random.key(seed), strongest))
    assert out.min() >= 0
    assert out.max() <= 1
    assert np.isfinite(out).all()


def test_left_stays_left_and_up_stays_up():
    """No draw at the default amounts moves a mark across the midline or turns the image over."""
    side, config = 96, AugmentConfig(brightness=0, contrast=0)
    image = np.zeros((side, side), dtype=np.uint8)
    image[20:28, 14:22] = 255  # upper left
    out = np.array(augment(mx.array(np.repeat(image[None], 256, axis=0)), mx.random.key(7), config))
    total = out.sum(axis=(1, 2))
    assert (total > 0).all()
    rows = (out.sum(axis=2) @ np.arange(side)) / total
    columns = (out.sum(axis=1) @ np.arange(side)) / total
    assert columns.max() < side / 2 - 10
    assert rows.max() < side / 2 - 5
    assert np.ptp(columns) > 5, "the mark does move"


def test_amounts_reach_but_do_not_pass_their_limits():
    side = 64
    image = np.zeros((side, side), dtype=np.uint8)
    image[32, 32] = 255
    config = AugmentConfig(shift=0.25, scale=0, rotate=0, brightness=0, contrast=0)
    out = np.array(augment(mx.array(np.repeat(image[None], 500, axis=0)), mx.random.key(0), config))
    rows = (out.sum(axis=2) @ np.arange(side)) / out.sum(axis=(1, 2)) - 32
    assert np.abs(rows).max() <= 16 + 1e-3
    assert rows.min() < -14
    assert rows.max() > 14
    assert abs(rows.mean()) < 1.5


def test_brightness_and_contrast_by_hand():
    image = mx.full((400, 2, 2), 0.75)
    lifted = np.array(
        augment(image, mx.random.key(0), AugmentConfig(shift=0, scale=0, rotate=0, contrast=0, brightness=0.1))
    )
    assert 0.65 - 1e-6 <= lifted.min() < 0.66
    assert 0.84 < lifted.max() <= 0.85 + 1e-6
    # (x - 0.5) * gain + 0.5, gain within 1 +- 0.2.
    gained = np.array(
        augment(image, mx.random.key(0), AugmentConfig(shift=0, scale=0, rotate=0, brightness=0, contrast=0.2))
    )
    assert 0.70 - 1e-6 <= gained.min() < 0.705
    assert 0.795 < gained.max() <= 0.80 + 1e-6
