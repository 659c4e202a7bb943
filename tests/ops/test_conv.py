"""Each fast operation of the CPU backend against MLX's stock one: forward, all gradients, odd shapes."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_cxr.ops import conv
from mlx_cxr.ops.batch_norm import BatchNorm

pytestmark = pytest.mark.skipif(
    mx.default_device().type != mx.DeviceType.cpu, reason="the fast operations serve the CPU backend only"
)

SIZES = [(1, 8, 8), (2, 9, 7), (3, 12, 5), (1, 1, 1), (2, 2, 3), (8, 24, 23)]


@pytest.fixture(autouse=True)
def _fast_ops_afterwards():
    yield
    conv.use_fast_ops(True)


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def forward_and_gradients(
    function: Callable[..., mx.array], inputs: list[mx.array], fast: bool
) -> tuple[np.ndarray, list[np.ndarray]]:
    conv.use_fast_ops(fast)
    y = function(*inputs)
    cotangent = normal(*y.shape, seed=99)
    _, gradients = mx.vjp(function, inputs, [cotangent])
    return np.array(y), [np.array(g) for g in gradients]


def assert_same(function: Callable[..., mx.array], inputs: list[mx.array], tolerance: float = 2e-5) -> None:
    y, gradients = forward_and_gradients(function, inputs, fast=True)
    wanted, wanted_gradients = forward_and_gradients(function, inputs, fast=False)
    assert y.shape == wanted.shape
    np.testing.assert_allclose(y, wanted, atol=tolerance * np.abs(wanted).max())
    for got, expected in zip(gradients, wanted_gradients, strict=True):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=tolerance * max(np.abs(expected).max(), 1e-6))


def with_weight(layer: nn.Module) -> Callable[[mx.array, mx.array], mx.array]:
    def call(x: mx.array, weight: mx.array) -> mx.array:
        layer.weight = weight
        return layer(x)

    return call


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize(("inside", "outside"), [(3, 5), (64, 64), (16, 8)])
def test_conv3x3(size, stride, dilation, inside, outside):
    layer = conv.Conv3x3(inside, outside, stride, dilation)
    x, weight = normal(*size, inside), normal(outside, 3, 3, inside, seed=1)
    assert_same(with_weight(layer), [x, weight])


@pytest.mark.parametrize(("side", "slices"), [(24, 8), (20, 4), (40, 1)])
def test_conv3x3_cut_into_batch_slices(side, slices):
    """Batches whose patches do not fit the cache are cut, unless not even one image's do."""
    x, weight = normal(8, side, side, 64), normal(16, 3, 3, 64, seed=1)
    assert conv._slices(x) == slices
    assert_same(with_weight(conv.Conv3x3(64, 16)), [x, weight])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [1, 2])
def test_conv1x1(size, stride):
    layer = conv.Conv1x1(6, 10, stride)
    assert_same(with_weight(layer), [normal(*size, 6), normal(10, 1, 1, 6, seed=1)])


@pytest.mark.parametrize("size", [(1, 16, 16), (2, 17, 13), (1, 7, 8), (3, 33, 20)])
@pytest.mark.parametrize("channels", [1, 3])
def test_stem(size, channels):
    layer = conv.StemConv(channels, 8)
    assert_same(with_weight(layer), [normal(*size, channels), normal(8, 7, 7, channels, seed=1)])


@pytest.mark.parametrize("size", [*SIZES, (2, 31, 30), (1, 5, 1)])
def test_max_pool_without_ties(size):
    count = int(np.prod(size)) * 4
    x = mx.array(np.random.default_rng(2).permutation(count).reshape(*size, 4).astype(np.float32) - count / 2)
    conv.use_fast_ops(True)
    y = conv.max_pool_3x3_s2(x)
    conv.use_fast_ops(False)
    assert mx.array_equal(y, conv.max_pool_3x3_s2(x)).item()
    assert_same(lambda a: conv.max_pool_3x3_s2(a), [x], tolerance=1e-6)


def test_max_pool_of_ties_passes_each_gradient_once():
    """After a ReLU many maxima are equal zeros: wherever the gradient goes, none of it is lost or doubled."""
    x = mx.maximum(normal(2, 13, 11, 3), 0.8) - 0.8
    y, vjp = mx.vjp(lambda a: conv.max_pool_3x3_s2(a), [x], [normal(2, 7, 6, 3, seed=4)])
    assert y[0].shape == (2, 7, 6, 3)
    np.testing.assert_allclose(vjp[0].sum().item(), normal(2, 7, 6, 3, seed=4).sum().item(), rtol=1e-4)
    conv.use_fast_ops(False)
    assert mx.array_equal(y[0], conv.max_pool_3x3_s2(x)).item()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("size", [(4, 8, 8), (2, 9, 7), (3, 1, 1), (16, 30, 31)])
def test_batchnorm_against_stock_layer_and_its_autograd(size, fast):
    conv.use_fast_ops(fast)
    ours, stock = BatchNorm(6), nn.BatchNorm(6)
    x = normal(*size, 6) * 2 + 3
    weight, bias = normal(6, seed=1), normal(6, seed=2)
    cotangent = normal(*size, 6, seed=3)

    def call(layer: nn.Module) -> Callable[..., mx.array]:
        def inner(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
            layer.weight, layer.bias = weight, bias
            return layer(x)

        return inner

    # vjp traces state updates, so each layer's statistics come from a plain call.
    (got,), got_gradients = mx.vjp(call(BatchNorm(6)), [x, weight, bias], [cotangent])
    (wanted,), wanted_gradients = mx.vjp(call(nn.BatchNorm(6)), [x, weight, bias], [cotangent])
    np.testing.assert_allclose(np.array(got), np.array(wanted), atol=2e-5)
    for ours_gradient, stock_gradient in zip(got_gradients, wanted_gradients, strict=True):
        scale = max(np.abs(np.array(stock_gradient)).max(), 1e-3)
        np.testing.assert_allclose(np.array(ours_gradient), np.array(stock_gradient), atol=1e-4 * scale)
    ours(x)
    stock(x)
    np.testing.assert_allclose(np.array(ours.running_mean), np.array(stock.running_mean), rtol=1e-4)
    flat = np.array(x).reshape(-1, 6)
    expected = 0.9 + 0.1 * flat.var(axis=0, ddof=1)
    np.testing.assert_allclose(np.array(ours.running_var), expected, rtol=1e-4)


def test_batchnorm_of_large_offset_keeps_its_precision():
    """Mean 1000, deviation 1: the one-pass variance E[x²] - E[x]² would lose it in float32."""
    x = normal(8, 10, 10, 4) + 1000.0
    y = np.array(BatchNorm(4)(x))
    np.testing.assert_allclose(y.reshape(-1, 4).std(axis=0), 1.0, atol=1e-3)
    np.testing.assert_allclose(y.reshape(-1, 4).mean(axis=0), 0.0, atol=1e-3)


def test_frozen_statistics_are_used_and_left_alone_while_training():
    norm = BatchNorm(3)
    norm.running_mean = mx.array([1.0, 2.0, 3.0])
    norm.frozen_statistics = True
    x = normal(2, 4, 4, 3)
    y = np.array(norm(x))
    np.testing.assert_allclose(y, (np.array(x) - [1.0, 2.0, 3.0]) / np.sqrt(1 + 1e-5), atol=1e-5)
    assert norm.running_mean.tolist() == [1.0, 2.0, 3.0]


def test_unfreeze_leaves_running_statistics_untrainable():
    norm = BatchNorm(3)
    norm.freeze()
    assert norm.trainable_parameters() == {}
    norm.unfreeze()
    assert set(norm.trainable_parameters()) == {"weight", "bias"}


@pytest.mark.parametrize(("stride", "dilation"), [(2, 2), (3, 1), (1, 3)])
def test_unsupported_stride_and_dilation_are_refused(stride, dilation):
    with pytest.raises(ValueError, match="stride"):
        conv.Conv3x3(4, 4, stride, dilation)
