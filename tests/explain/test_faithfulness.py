import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr

from mlx_cxr.core.labels import label_index
from mlx_cxr.explain.faithfulness import (
    Curves,
    _ranks,
    _signed_maps,
    _spearman,
    faithfulness_curves,
    gaussian_blur,
    randomization_check,
    randomize_parameters,
)
from mlx_cxr.explain.grad_cam import class_activation_maps
from mlx_cxr.explain.targets import LabelLogit
from mlx_cxr.models.resnet import ResNet18, ResNetConfig, initialize


class QuarterNet(nn.Module):
    """The logit of Edema is the mean brightness of the upper left quarter of the image."""

    def features(self, x: mx.array) -> mx.array:
        return x

    def head(self, a: mx.array) -> mx.array:
        edema = mx.mean(a[:, : a.shape[1] // 2, : a.shape[2] // 2], axis=(1, 2))
        return mx.concatenate([mx.zeros((a.shape[0], 3)), edema, mx.zeros((a.shape[0], 10))], axis=1)


@pytest.fixture
def quarter() -> QuarterNet:
    model = QuarterNet()
    model.eval()
    return model


@pytest.fixture(scope="module")
def resnet() -> ResNet18:
    model = ResNet18(ResNetConfig(output_stride=16))
    initialize(model, 0)
    model.eval()
    return model


def quarter_map(corner: str, n: int = 2) -> np.ndarray:
    heat = np.zeros((n, 16, 16), dtype=np.float32)
    heat[:, :8, slice(0, 8) if corner == "true" else slice(8, 16)] = 1.0
    return heat


def test_deletion_of_the_true_region_falls_as_computed_by_hand(quarter):
    """All-ones images: a quarter of the pixels holds the whole score, and the map names that quarter."""
    x = mx.ones((2, 16, 16, 1))
    maps = np.zeros((2, 16, 16), dtype=np.float32)
    maps[:, :8, :8] = 1
    curves = faithfulness_curves(quarter, x, maps, LabelLogit("Edema"), steps=4)
    np.testing.assert_allclose(curves.deletion[:, 0], [1, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(curves.areas()["deletion"], [0.125, 0.125])
    np.testing.assert_allclose(curves.random_deletion.mean(axis=1), [1, 0.75, 0.5, 0.25, 0], atol=0.3)
    np.testing.assert_allclose(curves.insertion, 1, atol=1e-5)


def test_the_true_region_beats_random_and_the_wrong_one_does_not(quarter):
    x = mx.array(np.random.default_rng(0).uniform(0.5, 1.5, (3, 16, 16, 1)).astype(np.float32))
    right = faithfulness_curves(quarter, x, quarter_map("true", 3), LabelLogit("Edema"), steps=8, random_draws=6)
    wrong = faithfulness_curves(quarter, x, quarter_map("wrong", 3), LabelLogit("Edema"), steps=8, random_draws=6)
    assert (right.areas()["deletion"] < right.areas()["random_deletion"] - 0.1).all()
    assert (wrong.areas()["deletion"] > wrong.areas()["random_deletion"]).all()
    summary = right.summary()
    assert summary["n"] == 3
    assert summary["deletion_better"] == 1.0
    json.dumps(summary)


def test_insertion_rises_where_the_image_differs_from_its_blur(quarter):
    image = np.zeros((1, 32, 32, 1), dtype=np.float32)
    image[:, 4:12, 4:12] = 1
    curves = faithfulness_curves(
        quarter, mx.array(image), image[..., 0], LabelLogit("Edema"), steps=16, random_draws=4, blur=0.2
    )
    assert curves.insertion[0, 0] < curves.insertion[-1, 0] == pytest.approx(0.25)
    assert curves.areas()["insertion"][0] > curves.areas()["random_insertion"][0]


def test_ends_of_the_curves_are_the_image_and_the_blank(resnet):
    x = mx.array(np.random.default_rng(1).normal(size=(2, 32, 32, 1)).astype(np.float32))
    target = LabelLogit("Pneumonia")
    raw = class_activation_maps(resnet, x, [target]).raw[0]
    curves = faithfulness_curves(resnet, x, raw, target, steps=3, random_draws=1)
    whole, blank = np.array(target(resnet(x))), np.array(target(resnet(mx.zeros_like(x))))
    for curve, first, last in [
        (curves.deletion, whole, blank),
        (curves.random_deletion, whole, blank),
        (curves.insertion, np.array(target(resnet(gaussian_blur(x, 32 * 5 / 224)))), whole),
    ]:
        np.testing.assert_allclose(curve[0], first, rtol=1e-5)
        np.testing.assert_allclose(curve[-1], last, rtol=1e-5)


def test_areas_are_trapezoids():
    curve = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=np.float32)
    curves = Curves(np.array([0.0, 0.5, 1.0]), curve, curve, curve, curve)
    np.testing.assert_allclose(curves.areas()["deletion"], [0.25, 0.75])


def test_equal_pixels_are_ranked_at_random_and_strongest_come_first():
    ranks = _ranks(np.array([[[0.0, 5.0], [3.0, 0.0]]] * 400), seed=0)
    assert (ranks[:, 0, 1] == 0).all()
    assert (ranks[:, 1, 0] == 0.25).all()
    assert (ranks[:, 0, 0] == 0.5).mean() == pytest.approx(0.5, abs=0.1)


def test_blur_equals_scipy_away_from_the_edge_and_keeps_constants():
    x = np.random.default_rng(0).normal(size=(1, 64, 48, 2)).astype(np.float32)
    blurred = np.array(gaussian_blur(mx.array(x), 2.0))
    expected = gaussian_filter(x, (0, 2.0, 2.0, 0), truncate=8)
    np.testing.assert_allclose(blurred[:, 16:-16, 16:-16], expected[:, 16:-16, 16:-16], atol=1e-4)
    np.testing.assert_allclose(np.array(gaussian_blur(mx.ones((1, 9, 7, 1)), 3.0)), 1, atol=1e-6)


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


def test_bad_input_is_named(quarter, resnet):
    x = mx.ones((2, 16, 16, 1))
    target = LabelLogit("Edema")
    with pytest.raises(ValueError, match="expected"):
        faithfulness_curves(quarter, x, quarter_map("true", 3), target)
    with pytest.raises(ValueError, match="steps 0"):
        faithfulness_curves(quarter, x, quarter_map("true"), target, steps=0)
    with pytest.raises(KeyError, match="layer9"):
        randomize_parameters(resnet, ["layer9"], seed=0)
    training = QuarterNet()
    with pytest.raises(RuntimeError, match="eval"):
        faithfulness_curves(training, x, quarter_map("true"), target)
