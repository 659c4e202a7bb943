import mlx.core as mx
import numpy as np
import pytest

from mlx_cxr.explain.maps import fit_reference, random_maps, scale_maps, upsample


@pytest.mark.parametrize(
    ("old", "new"), [((7, 7), 224), ((3, 5), (96, 64)), ((1, 1), 4), ((14, 14), (10, 9))]
)
def test_upsample_equals_torch(torch, old, new):
    maps = np.random.default_rng(1).random((2, 3, *old), dtype=np.float32)
    size = (new, new) if isinstance(new, int) else new
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(maps), size, mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(upsample(maps, new), expected.numpy(), atol=1e-5)


def test_upsample_by_hand_and_its_errors():
    np.testing.assert_allclose(upsample(np.array([[0.0, 4.0]]), (1, 4)), [[0, 1, 3, 4]])
    np.testing.assert_allclose(upsample(mx.array([[0.0, 4.0]]), (2, 2)), [[0, 4], [0, 4]])
    with pytest.raises(ValueError, match="resize"):
        upsample(np.zeros(4), 8)
    with pytest.raises(ValueError, match="0 x 0"):
        upsample(np.zeros((4, 4)), 0)


def test_random_maps_are_uniform_and_repeatable():
    maps = random_maps((20, 10, 7, 7), seed=4)
    assert maps.dtype == np.float32
    np.testing.assert_array_equal(maps, random_maps((20, 10, 7, 7), seed=4))
    assert not np.array_equal(maps, random_maps((20, 10, 7, 7), seed=5))
    assert 0 <= maps.min() < 0.01
    assert 0.99 < maps.max() < 1
    assert maps.mean() == pytest.approx(0.5, abs=0.01)


def test_scale_is_common_to_all_films():
    raw = np.zeros((2, 101, 2, 2), dtype=np.float32)
    raw[0, :, 1, 0] = np.arange(101)
    reference = fit_reference(raw)
    assert reference[0] == pytest.approx(99.0)
    assert np.isnan(reference[1])
    np.testing.assert_array_equal(fit_reference(raw.max(axis=(2, 3))), reference)
    scaled = scale_maps(raw, reference)
    assert scaled[0, 1].max() == pytest.approx(1 / 99)
    assert scaled[0, 100].max() == pytest.approx(100 / 99)
    assert np.isnan(scaled[1]).all()


def test_bad_scales_are_refused():
    raw = np.ones((2, 3, 2, 2), dtype=np.float32)
    with pytest.raises(ValueError, match="one per target"):
        scale_maps(raw, np.ones(3))
    with pytest.raises(ValueError, match="reference 1 is not positive"):
        scale_maps(raw, np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="negative"):
        fit_reference(-raw)
    with pytest.raises(ValueError, match="quantile"):
        fit_reference(raw, 0.0)
    with pytest.raises(ValueError, match="N >= 1"):
        fit_reference(np.ones((2, 0)))
