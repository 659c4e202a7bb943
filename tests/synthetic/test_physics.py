"""Attenuation to grey: closed forms and orderings."""

from dataclasses import replace

import numpy as np
import pytest

from mlx_cxr.synthetic.geometry import View
from mlx_cxr.synthetic.physics import MU_BONE, MU_FAT, MU_LUNG, MU_METAL, MU_SOFT, Exposure, display, expose

VIEW = View("PA", 120, 100, 0.3, 180.0, 11.0, (0.0, 9.0))
CLEAN = Exposure(
    quanta=1e12, scatter=0.0, sharpness=0.0, equalize=0.0, latitude=0.0, edge=0.0, gamma=1.0, shutter=(0, 0, 0, 0)
)


def test_attenuation_coefficients_in_order():
    assert MU_LUNG < MU_FAT < MU_SOFT < MU_BONE < MU_METAL
    assert pytest.approx(0.2173, abs=1e-4) == MU_SOFT


def test_a_slab_without_scatter_follows_beer_and_lambert():
    thickness = np.tile(np.linspace(0, 25, 100, dtype=np.float32), (120, 1))
    density = expose(MU_SOFT * thickness, VIEW, CLEAN, np.random.default_rng(0))
    np.testing.assert_allclose(density, MU_SOFT * thickness, atol=2e-3)


def test_noise_goes_with_the_inverse_root_of_the_dose():
    slab = np.full((120, 100), 2.0, np.float32)
    low, high = (expose(slab, VIEW, replace(CLEAN, quanta=q), np.random.default_rng(1)).std() for q in (1e5, 4e5))
    assert low / high == pytest.approx(2.0, rel=0.05)


def test_scatter_flattens_contrast_and_spares_the_open_beam():
    slab = np.full((120, 100), 3.0, np.float32)
    slab[:, 60:] = 2.0
    slab[:, 95:] = 0.0
    clean = expose(slab, VIEW, CLEAN, np.random.default_rng(0))
    hazy = expose(slab, VIEW, replace(CLEAN, scatter=0.6), np.random.default_rng(0))
    assert clean[60, 20] - clean[60, 75] == pytest.approx(1.0, abs=1e-3)
    assert hazy[60, 20] - hazy[60, 75] < 0.9
    air = np.zeros((120, 100), np.float32)
    np.testing.assert_allclose(expose(air, VIEW, replace(CLEAN, scatter=0.6), np.random.default_rng(0)), 0, atol=1e-4)


def test_display_is_monotone_and_blackens_the_shutter():
    ramp = np.tile(np.linspace(0.5, 5, 100, dtype=np.float32), (120, 1))
    image = display(ramp, VIEW, replace(CLEAN, equalize=0.5, gamma=0.8, shutter=(3, 4, 5, 6)))
    assert image.dtype == np.uint8
    assert (np.diff(image[60, 3:95].astype(int)) >= 0).all()
    assert not image[:4].any()
    assert not image[-6:].any()
    assert not image[:, :3].any()
    assert not image[:, -5:].any()
    assert image[4:-6, 3:-5].max() > 200
