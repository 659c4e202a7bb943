"""Each fast operation of the CPU backend against MLX's stock one: forward, all gradients, odd shapes."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_cxr.ops import conv
from mlx_cxr.ops.switch import fast_ops

pytestmark = pytest.mark.skipif(
    mx.default_device().type != mx.DeviceType.cpu, reason="the fast operations serve the CPU backend only"
)

SIZES = [(1, 8, 8), (2, 9, 7), (3, 12, 5), (1, 1, 1), (2, 2, 3), (8, 24, 23)]


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def forward_and_gradients(
    function: Callable[..., mx.array], inputs: list[mx.array], fast: bool
) -> tuple[np.ndarray, list[np.ndarray]]:
    with fast_ops(fast):
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
    y = conv.max_pool_3x3_s2(x)
    with fast_ops(False):
        assert mx.array_equal(y, conv.max_pool_3x3_s2(x)).item()
    assert_same(lambda a: conv.max_pool_3x3_s2(a), [x], tolerance=1e-6)


def test_max_pool_of_ties_passes_each_gradient_once():
    """After a ReLU many maxima are equal zeros: wherever the gradient goes, none of it is lost or doubled."""
    x = mx.maximum(normal(2, 13, 11, 3), 0.8) - 0.8
    y, vjp = mx.vjp(lambda a: conv.max_pool_3x3_s2(a), [x], [normal(2, 7, 6, 3, seed=4)])
    assert y[0].shape == (2, 7, 6, 3)
    np.testing.assert_allclose(vjp[0].sum().item(), normal(2, 7, 6, 3, seed=4).sum().item(), rtol=1e-4)
    with fast_ops(False):
        assert mx.array_equal(y[0], conv.max_pool_3x3_s2(x)).item()


@pytest.mark.parametrize(("stride", "dilation"), [(2, 2), (3, 1), (1, 3)])
def test_unsupported_stride_and_dilation_are_refused(stride, dilation):
    with pytest.raises(ValueError, match="stride"):
        conv.Conv3x3(4, 4, stride, dilation)
