"""Exponentials, softmax and the gated activation in the form that suits each device.

MLX's CPU backend on x86 calls a scalar exponential for each element: 12 ns, where a product takes 0.2. Half of a small
teacher's time went there. A polynomial in ordinary vector arithmetic takes 2.5 ns and has the same error (1.4e-6
relative within 30 of 0). Other devices and precisions keep MLX's own operations; `switch.use_fast_ops(False)` turns
these off, and `tests/ops/test_activations.py` holds each against the stock operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_cxr.ops.streams import with_gradient
from mlx_cxr.ops.switch import fast_ops_enabled

_LOG2_E = 1.4426950408889634
_POWER_OF_2 = (
    1.0,
    0.6931469775950665,
    0.24022242082587295,
    0.055507337491488506,
    0.0096715127675349,
    0.001326472542224,
)
"""Coefficients of a polynomial that is 1 at 0, and within 9.2e-8 of 2^f (relative) for f in [-1/2, 1/2]."""
_ROUNDING = 12582912.0
"""1.5 * 2^23: added to a float32 of small size, it leaves the nearest integer in the lowest bits."""


def fast(x: mx.array) -> bool:
    """True if the CPU paths serve arrays such as `x`: they are on, and it is float32."""
    return fast_ops_enabled() and x.dtype == mx.float32


def compiled(function: Callable, **state: Any) -> Callable:
    """`mx.compile` of a function, and on the CPU backend the function as it is.

    There each fused loop takes a run of the C++ compiler, 47 of them for a LoRA step or half a minute on two cores,
    and the loops are no faster. `state` is `inputs` and `outputs`.
    """
    return function if mx.default_device().type == mx.DeviceType.cpu else mx.compile(function, **state)


def exp(x: mx.array) -> mx.array:
    """Elementwise exponential; the CPU path saturates at 2^-126 and 2^127, and NaN stays NaN."""
    return with_gradient(_exp, _exp_gradient)(x) if fast(x) else mx.exp(x)


def sigmoid(x: mx.array) -> mx.array:
    """Elementwise 1 / (1 + exp(-x))."""
    return 1 / (1 + exp(-x)) if fast(x) else mx.sigmoid(x)


def softmax(x: mx.array) -> mx.array:
    """Softmax over the last axis."""
    return with_gradient(_softmax, _softmax_gradient)(x) if fast(x) else mx.softmax(x, axis=-1)


def logsumexp(x: mx.array) -> mx.array:
    """log(sum(exp(x))) over the last axis, which is dropped."""
    return with_gradient(_logsumexp, _logsumexp_gradient)(x) if fast(x) else mx.logsumexp(x, axis=-1)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`gate * sigmoid(gate) * up` (Shazeer, arXiv:2002.05202).

    For its gradient it keeps `gate` and `up` and computes the rest again, which saves two arrays of the feed-forward
    width per layer.
    """
    return with_gradient(_swiglu, _swiglu_gradient)(gate, up)


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * sigmoid(gate) * up


def _swiglu_gradient(gate: mx.array, up: mx.array, cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    share = sigmoid(gate)
    active = gate * share
    return cotangent * up * (share + active * (1 - share)), cotangent * active


def _exp(x: mx.array) -> mx.array:
    # 2^y for y = n + f: the polynomial for f in [-1/2, 1/2], and n in the exponent's bits.
    y = mx.clip(x * _LOG2_E, -126.0, 127.0)
    rounded = y + _ROUNDING
    part = y - (rounded - _ROUNDING)
    value = mx.array(_POWER_OF_2[-1])
    for coefficient in _POWER_OF_2[-2::-1]:
        value = value * part + coefficient
    power = ((rounded.view(mx.int32) + 127) << 23).view(mx.float32)
    return value * power


def _exp_gradient(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output


def _softmax(x: mx.array) -> mx.array:
    weights = _exp(x - mx.max(x, axis=-1, keepdims=True))
    return weights * (1 / mx.sum(weights, axis=-1, keepdims=True))


def _softmax_gradient(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    weighted = cotangent * output
    return weighted - output * mx.sum(weighted, axis=-1, keepdims=True)


def _logsumexp(x: mx.array) -> mx.array:
    largest = mx.max(x, axis=-1, keepdims=True)
    return mx.log(mx.sum(_exp(x - largest), axis=-1)) + largest[..., 0]


def _logsumexp_gradient(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent[..., None] * _exp(x - output[..., None])
