"""BatchNorm over a batch that may come in parts, and from several processes, with one set of statistics."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_cxr.ops import streams
from mlx_cxr.ops.switch import fast_ops_enabled

_EPS = 1e-5
_MOMENTUM = 0.1

_ranks: mx.distributed.Group | None = None


def share_statistics(group: mx.distributed.Group | None) -> None:
    """Take training statistics over equal parts of a batch on all ranks of `group`, in graphs built from now on; None
    (default) takes them over this process's batch.
    """
    global _ranks
    _ranks = group


class BatchNorm(nn.Module):
    """BatchNorm over N, H, W with torchvision's names and conventions (eps 1e-5, momentum 0.1).

    Statistics are computed once per step and the gradient is the closed form of Ioffe and Szegedy
    (arXiv:1502.03167, section 3). As in PyTorch, the running variance is the unbiased one. `frozen_statistics`
    normalizes with the running statistics while training too, and leaves them alone.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))
        self.running_mean = mx.zeros((channels,))
        self.running_var = mx.ones((channels,))
        self.frozen_statistics = False
        self.freeze(keys=["running_mean", "running_var"], recurse=False)

    def unfreeze(self, *args: object, **kwargs: object) -> nn.Module:
        """As `nn.Module.unfreeze`, but the running statistics are never trainable."""
        super().unfreeze(*args, **kwargs)
        return self.freeze(keys=["running_mean", "running_var"], recurse=False)

    def affine(self) -> tuple[mx.array, mx.array]:
        """float32 scale and shift (C,) that are equivalent to normalizing with the running statistics."""
        scale = self.weight * mx.rsqrt(self.running_var + _EPS)
        return scale, self.bias - self.running_mean * scale

    def __call__(self, x: mx.array) -> mx.array:
        return self.over([x])[0]

    def over(self, parts: Sequence[mx.array]) -> list[mx.array]:
        """The normalized parts of one batch (`streams.split`)."""
        if not self.training or self.frozen_statistics:
            scale, shift = self.affine()
            return streams.each(lambda x: x * scale.astype(x.dtype) + shift.astype(x.dtype), parts)
        *normalized, mean, var = _batch_norm(parts, self.weight, self.bias)
        count = _positions(parts) * (1 if _ranks is None else _ranks.size())
        unbiased = mx.stop_gradient(var) * (count / max(count - 1, 1))
        self.running_mean = (1 - _MOMENTUM) * self.running_mean + _MOMENTUM * mx.stop_gradient(mean)
        self.running_var = (1 - _MOMENTUM) * self.running_var + _MOMENTUM * unbiased
        return normalized


def _batch_norm(parts: Sequence[mx.array], weight: mx.array, bias: mx.array) -> Sequence[mx.array]:
    """The normalized parts, then mean and biased variance (C,)."""
    dtype = parts[0].dtype

    @mx.custom_function
    def normalize(weight: mx.array, bias: mx.array, *parts: mx.array) -> tuple[mx.array, ...]:
        mean, var, centred = _moments(parts)
        scale = mx.rsqrt(var + _EPS) * weight
        return (*streams.each(lambda x: (x * scale + bias).astype(dtype), centred), mean, var)

    @normalize.vjp
    def gradient(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple[mx.array, ...]:
        weight, _, *parts = primals
        *dys, _, _ = cotangents
        *_, mean, var = outputs
        inverse = mx.rsqrt(var + _EPS)
        normal = streams.each(lambda x: (x.astype(mx.float32) - mean) * inverse, parts)
        dys = streams.each(lambda dy: dy.astype(mx.float32), dys)
        products = streams.each(mx.multiply, dys, normal)
        mean_dy, mean_dy_normal = _mean_over_ranks(_channel_mean(dys), _channel_mean(products))
        scale = inverse * weight
        dx = streams.each(lambda dy, x: ((dy - mean_dy - x * mean_dy_normal) * scale).astype(dtype), dys, normal)
        count = _positions(parts)
        return (mean_dy_normal * count, mean_dy * count, *dx)

    return normalize(weight, bias, *parts)


def _moments(parts: Sequence[mx.array]) -> tuple[mx.array, mx.array, list[mx.array]]:
    """Mean and biased variance of each channel, and the parts less that mean, float32."""
    parts = streams.each(lambda x: x.astype(mx.float32), parts)
    mean = _channel_mean(parts)
    centred = streams.each(lambda x: x - mean, parts)
    var = _channel_mean(streams.each(mx.square, centred))
    if _ranks is None:
        return mean, var, centred
    # Chan et al., Algorithms for computing the sample variance (1983), for parts of equal size: one exchange.
    means, variances = mx.split(mx.distributed.all_gather(mx.concatenate([mean, var])[None], group=_ranks), 2, axis=1)
    mean = mx.mean(means, axis=0)
    var = mx.mean(variances + (means - mean) ** 2, axis=0)
    return mean, var, streams.each(lambda x: x - mean, parts)


def _channel_mean(parts: Sequence[mx.array]) -> mx.array:
    """Mean over all axes but the last of all parts, float32; on the CPU as a matrix product, which is threaded."""
    count = _positions(parts)

    def share(x: mx.array) -> mx.array:
        flat = x.reshape(-1, x.shape[-1])
        if fast_ops_enabled():
            return (mx.full((1, flat.shape[0]), 1.0 / count) @ flat)[0]
        return mx.sum(flat, axis=0) / count

    return sum(streams.each(share, parts))


def _mean_over_ranks(*values: mx.array) -> list[mx.array]:
    if _ranks is None:
        return list(values)
    total = mx.distributed.all_sum(mx.concatenate(values), group=_ranks)
    return mx.split(total / _ranks.size(), len(values))


def _positions(parts: Sequence[mx.array]) -> int:
    return sum(x.size // x.shape[-1] for x in parts)
