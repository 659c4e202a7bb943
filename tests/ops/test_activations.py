"""The CPU paths against float64 and against MLX's own operations, values and gradients."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_cxr.ops import activations
from mlx_cxr.ops.switch import fast_ops

RNG = np.random.default_rng(0)
X = np.concatenate([np.linspace(-30, 30, 4001), RNG.normal(0, 1, 3997), [0.0, -0.0]]).astype(np.float32).reshape(4, -1)


def float64(name: str) -> np.ndarray:
    x = X.astype(np.float64)
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return {
        "exp": np.exp(x),
        "sigmoid": 1 / (1 + np.exp(-x)),
        "softmax": powers / powers.sum(axis=-1, keepdims=True),
        "logsumexp": np.log(powers.sum(axis=-1)) + x.max(axis=-1),
    }[name]


@pytest.mark.parametrize("name", ["exp", "sigmoid", "softmax", "logsumexp"])
def test_values_are_those_of_float64(name):
    ours = np.array(getattr(activations, name)(mx.array(X)))
    np.testing.assert_allclose(ours, float64(name), rtol=5e-6, atol=1e-37)
    assert np.array(activations.exp(mx.array([0.0]))) == 1


@pytest.mark.parametrize("name", ["exp", "sigmoid", "softmax", "logsumexp"])
def test_values_and_gradients_are_those_of_mlx(name):
    x = mx.array(X / 4)
    function = getattr(activations, name)
    weights = mx.array(RNG.normal(size=function(x).shape).astype(np.float32))

    def slope() -> tuple[np.ndarray, np.ndarray]:
        value, gradient = mx.value_and_grad(lambda v: mx.sum(function(v) * weights))(x)
        return np.array(value), np.array(gradient)

    ours = slope()
    with fast_ops(False):
        theirs = slope()
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize("enabled", [True, False], ids=["fast", "stock"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_gated_activation_and_its_gradients_are_those_of_silu(enabled, dtype):
    gate, up, weights = (mx.array(RNG.normal(0, 3, (4, 50)).astype(np.float32)) for _ in range(3))

    def gradients(function, dtype: mx.Dtype) -> list[np.ndarray]:
        def total(a: mx.array, b: mx.array) -> mx.array:
            return mx.sum(function(a, b).astype(mx.float32) * weights)

        out = mx.grad(total, argnums=(0, 1))(gate.astype(dtype), up.astype(dtype))
        return [np.array(a.astype(mx.float32)) for a in (function(gate, up), *out)]

    with fast_ops(enabled):
        ours = gradients(activations.swiglu, dtype)
    theirs = gradients(lambda a, b: nn.silu(a) * b, mx.float32)
    slack = 1e-5 if dtype == mx.float32 else 5e-2
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=slack * np.abs(b).max())


def test_what_is_no_number_stays_none_and_what_is_too_large_saturates():
    x = mx.array([np.nan, np.inf, -np.inf, 200.0, -200.0])
    values = np.array(activations.exp(x))
    assert np.isnan(values[0])
    assert (values[[1, 3]] > 1e38).all()
    assert (values[[2, 4]] < 2e-38).all()
    np.testing.assert_allclose(np.array(activations.sigmoid(x[1:])), [1, 0, 1, 0], atol=1e-37)
    assert np.isnan(np.array(activations.softmax(x))).all()
    assert np.isnan(np.array(activations.swiglu(x[:1], x[:1]))).all()


def test_turned_off_and_for_other_precisions_the_operations_are_mlx_own():
    x = mx.array(X)
    with fast_ops(False):
        np.testing.assert_array_equal(np.array(activations.exp(x)), np.array(mx.exp(x)))
        np.testing.assert_array_equal(np.array(activations.softmax(x)), np.array(mx.softmax(x, axis=-1)))
    half = x.astype(mx.float16)
    np.testing.assert_array_equal(np.array(activations.sigmoid(half)), np.array(mx.sigmoid(half)))
    assert not activations.fast(half)
