import mlx.core as mx
import numpy as np
import pytest
import scipy.ndimage
from mlx.utils import tree_flatten

from mlx_cxr.explain.maps import fit_reference, random_maps, scale_maps, upsample
from mlx_cxr.models.resnet import ResNet18, ResNetConfig


@pytest.mark.parametrize(
    ("old", "new", "image"),
    [((7, 7), 224, None), ((6, 8), (96, 128), None), ((1, 1), 4, None), ((7, 7), 448, 224), ((14, 14), (10, 9), 224)],
)
def test_upsample_equals_scipy_sampling_at_stride_times_cell(old, new, image):
    maps = np.random.default_rng(1).random(old, dtype=np.float32)
    height, width = (new, new) if isinstance(new, int) else new
    image_height, image_width = (height, width) if image is None else (image, image)
    rows = ((np.arange(height) + 0.5) * image_height / height - 0.5) / (image_height / old[0])
    columns = ((np.arange(width) + 0.5) * image_width / width - 0.5) / (image_width / old[1])
    at = np.meshgrid(rows, columns, indexing="ij")
    expected = scipy.ndimage.map_coordinates(maps, at, order=1, mode="nearest")
    np.testing.assert_allclose(upsample(maps, new, image), expected, atol=1e-5)


def test_upsample_by_hand_and_its_errors():
    np.testing.assert_allclose(upsample(np.array([[0.0, 4.0]]), (1, 4)), [[0, 2, 4, 4]])
    np.testing.assert_allclose(upsample(mx.array([[0.0, 4.0]]), (2, 2)), [[0, 4], [0, 4]])
    with pytest.raises(ValueError, match="resize"):
        upsample(np.zeros(4), 8)
    with pytest.raises(ValueError, match="0 x 0"):
        upsample(np.zeros((4, 4)), 0)


@pytest.mark.parametrize("output_stride", [16, 32])
def test_a_cell_looks_at_the_pixel_where_its_peak_is_drawn(output_stride):
    """Of a network of all-positive weights, the gradient of one cell spreads evenly around what it looks at."""
    side, row, column = 32 * output_stride, 16, 15
    model = ResNet18(ResNetConfig(output_stride=output_stride)).eval()
    ones = [(n, mx.ones_like(v) / v[0].size) for n, v in tree_flatten(model.parameters()) if v.ndim == 4]
    model.load_weights(ones, strict=False)
    seen = mx.grad(lambda x: model.features(x)[0, row, column].sum())(mx.ones((1, side, side, 1)))
    weight = np.array(seen)[0, :, :, 0].astype(np.float64)
    # Max pooling of a constant image hands each window's gradient to some of its pixels: a bias of up to 2 pixels.
    middle = [float((weight.sum(axis=1 - k) * np.arange(side)).sum() / weight.sum()) for k in (0, 1)]
    one = np.zeros((32, 32), np.float32)
    one[row, column] = 1
    peak = np.unravel_index(upsample(one, side).argmax(), (side, side))
    assert peak == (row * output_stride, column * output_stride)
    np.testing.assert_allclose(middle, peak, atol=2.5)


def test_random_maps_are_uniform_and_repeatable():
    maps = random_maps((20, 10, 7, 7), seed=4)
    assert maps.dtype == np.float32
    np.testing.assert_array_equal(maps, random_maps((20, 10, 7, 7), seed=4))
    assert not np.array_equal(maps, random_maps((20, 10, 7, 7), seed=5))
    assert 0 <= maps.min() < 0.01
    assert 0.99 < maps.max() < 1
    assert maps.mean() == pytest.approx(0.5, abs=0.01)


def test_scale_is_common_to_all_images():
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
