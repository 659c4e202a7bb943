"""Statistics of whole images, against NumPy and SciPy, and of studies."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import laplace

from mlx_cxr.evaluation.image_statistics import STATISTICS, image_statistics, study_statistics


def named(image):
    return dict(zip(STATISTICS, image_statistics(image[None])[0], strict=True))


def test_levels_are_numpys():
    image = np.random.default_rng(0).integers(0, 256, (40, 40)).astype(np.uint8)
    image[:5], image[5:7] = 255, 3
    got, levels = named(image), image / 255
    assert got["brightness"] == pytest.approx(levels.mean())
    assert got["contrast"] == pytest.approx(levels.std())
    for name, percent in (("dark level", 5), ("middle level", 50), ("bright level", 95)):
        assert got[name] == pytest.approx(np.percentile(levels, percent, method="inverted_cdf"))
    assert got["black part"] == pytest.approx((image <= 4).mean())
    assert got["white part"] == pytest.approx((image >= 251).mean())


def test_sharpness_is_the_laplacian_in_units_of_contrast():
    image = np.random.default_rng(0).integers(0, 256, (40, 40)).astype(np.uint8)
    expected = np.abs(laplace(image.astype(float))[1:-1, 1:-1]).mean() / image.std()
    assert named(image)["sharpness"] == pytest.approx(expected, rel=1e-5)
    blurred = ((image.astype(int) + np.roll(image, 1, 0) + np.roll(image, 1, 1)) // 3).astype(np.uint8)
    assert named(blurred)["sharpness"] < 0.7 * expected


@pytest.mark.parametrize(("left", "right", "top", "bottom"), [(0, 0, 0, 0), (6, 4, 0, 0), (0, 0, 3, 9), (2, 0, 0, 1)])
def test_borders_are_measured_from_the_ends(left, right, top, bottom):
    image = np.random.default_rng(0).integers(0, 256, (40, 40)).astype(np.uint8)
    image[:, :left] = image[:, 40 - right :] = image[:top] = image[40 - bottom :] = 0
    got = named(image)
    assert got["border at the sides"] == pytest.approx((left + right) / 40)
    assert got["border at the ends"] == pytest.approx((top + bottom) / 40)


def test_an_image_of_one_level_has_finite_statistics():
    got = named(np.full((40, 40), 7, np.uint8))
    assert np.isfinite(list(got.values())).all()
    assert got["border at the sides"] == got["border at the ends"] == 1
    assert got["contrast"] == pytest.approx(0, abs=1e-7)


def test_a_study_has_the_mean_of_its_images_that_have_pixels():
    images = np.random.default_rng(0).integers(0, 256, (300, 16, 16)).astype(np.uint8)
    ids = [f"i{number}" for number in range(300)]
    store = SimpleNamespace(
        images=images, missing={"i3": "cut"}, rows=lambda wanted: np.array([ids.index(i) for i in wanted])
    )
    frame = pd.DataFrame({"image_id": ids[::-1], "study_id": [f"s{number // 2}" for number in range(300)][::-1]})
    frame.loc[frame["image_id"] == "i2", "study_id"] = "alone"
    got, each = study_statistics(store, frame), image_statistics(images)
    assert got.loc["s0"].to_numpy() == pytest.approx(each[:2].mean(axis=0))
    assert got.loc["alone"].to_numpy() == pytest.approx(each[2])
    assert "s1" not in got.index, "its only image could not be read"
    assert len(got) == 150
