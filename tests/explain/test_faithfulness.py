import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from scipy.stats import spearmanr

from mlx_cxr.core.labels import label_index
from mlx_cxr.explain.faithfulness import _signed_maps, _spearman, randomization_check, randomize_parameters
from mlx_cxr.explain.grad_cam import class_activation_maps
from mlx_cxr.explain.targets import LabelLogit
from mlx_cxr.models.resnet import ResNet18, ResNetConfig, initialize


@pytest.fixture(scope="module")
def resnet() -> ResNet18:
    model = ResNet18(ResNetConfig(output_stride=16))
    initialize(model, 0)
    model.eval()
    return model


def test_spearman_equals_scipy_and_is_nan_for_a_constant_map():
    rng = np.random.default_rng(0)
    a, b = np.maximum(rng.normal(size=(2, 2, 3, 5, 4)), 0)
    expected = [[spearmanr(a[k, n].ravel(), b[k, n].ravel()).statistic for n in range(3)] for k in range(2)]
    np.testing.assert_allclose(_spearman(a, b), expected, atol=1e-12)
    a[1, 2] = 0
    assert np.isnan(_spearman(a, b)[1, 2])


def test_randomizing_changes_maps_and_leaves_the_model_alone(resnet):
    x = mx.array(np.random.default_rng(2).normal(size=(2, 96, 96, 1)).astype(np.float32))
    before = {name: np.array(value) for name, value in tree_flatten(resnet.parameters())}
    result = randomization_check(resnet, x, ["Edema", "Pneumonia", "Fracture"], draws=4)
    assert list(result) == ["fc", "fc+layer4"]
    for correlation in result.values():
        assert correlation.shape == (4, 3, 2)
        assert np.nanmax(correlation) < 0.95
        assert abs(np.nanmean(correlation)) < 0.5
    for name, value in tree_flatten(resnet.parameters()):
        np.testing.assert_array_equal(before[name], np.array(value), err_msg=name)


def test_a_check_that_randomizes_nothing_of_use_finds_no_change(resnet):
    """The bias of the head has no part in a map, so this control must correlate perfectly."""
    x = mx.array(np.random.default_rng(2).normal(size=(1, 96, 96, 1)).astype(np.float32))
    result = randomization_check(resnet, x, ["Edema", "Lung Lesion"], cascade=("fc.bias",), draws=1)
    assert np.nanmin(result["fc.bias"]) == pytest.approx(1.0)


@pytest.mark.parametrize("method", ["grad_cam", "hires_cam"])
def test_the_check_compares_maps_before_their_relu(resnet, method):
    """For average pool + linear that is the head's weights applied cell by cell, with no cell cut to zero."""
    x = mx.array(np.random.default_rng(2).normal(size=(2, 96, 96, 1)).astype(np.float32))
    a = np.array(resnet.features(x))
    signed = np.einsum("nhwc,c->nhw", a, np.array(resnet.fc.weight)[label_index("Edema")]) / (a.shape[1] * a.shape[2])
    assert (signed < 0).any()
    got = _signed_maps(resnet, x, (LabelLogit("Edema"),), method)[0]
    np.testing.assert_allclose(got, signed, atol=1e-4 * np.abs(signed).max())


def test_a_map_that_is_negative_everywhere_can_be_checked_too(resnet):
    x = mx.array(np.random.default_rng(2).normal(size=(1, 96, 96, 1)).astype(np.float32))
    weight = np.array(resnet.fc.weight)
    negative = randomize_parameters(resnet, ["fc"], seed=0)
    negative.load_weights([("fc.weight", mx.array(-np.abs(weight)))], strict=False)
    assert class_activation_maps(negative, x, ["Edema"]).raw.max() == 0
    assert np.isfinite(randomization_check(negative, x, ["Edema"], draws=2)["fc"]).all()


def test_shuffling_keeps_the_values_and_touches_the_named_part_only(resnet):
    shuffled = dict(tree_flatten(randomize_parameters(resnet, ["layer4"], seed=1).parameters()))
    for name, value in tree_flatten(resnet.parameters()):
        old, new = np.array(value), np.array(shuffled[name])
        if name.startswith("layer4."):
            np.testing.assert_array_equal(np.sort(old, axis=None), np.sort(new, axis=None))
            assert old.ndim < 4 or not np.array_equal(old, new)
        else:
            np.testing.assert_array_equal(old, new)


def test_a_part_that_is_not_there_is_named(resnet):
    with pytest.raises(KeyError, match="layer9"):
        randomize_parameters(resnet, ["layer9"], seed=0)
