"""BatchNorm against MLX's stock layer: forward, gradients, running statistics; frozen, and at its limits."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_cxr.ops.batch_norm import BatchNorm
from mlx_cxr.ops.switch import fast_ops


@pytest.fixture(params=[True, False], ids=["fast", "stock"])
def either(request):
    """With the CPU paths and without."""
    with fast_ops(request.param):
        yield


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("size", [(4, 8, 8), (2, 9, 7), (3, 1, 1), (16, 30, 31)])
def test_batchnorm_against_stock_layer_and_its_autograd(size, either):
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
