"""Convolution, pooling and BatchNorm whose gradients suit the CPU backend; other devices keep MLX's own kernels.

On the CPU backend only the forward convolution with stride and padding reaches the BLAS: MLX's gradient of a
strided convolution, any dilated convolution and the scatter behind `nn.MaxPool2d` run in plain loops and are tens
of times slower. Here those are rewritten as sums of shifted matrix products, which are the same sums in another
order; `tests/models/test_ops.py` holds each against the stock operation. `use_fast_ops(False)` turns them off.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

_enabled = True


def use_fast_ops(enabled: bool) -> None:
    """Choose between the CPU paths of this module (default) and MLX's own operations, for graphs built from now on."""
    global _enabled
    _enabled = enabled


def _fast() -> bool:
    return _enabled and mx.default_device().type == mx.DeviceType.cpu


class Conv3x3(nn.Module):
    """3x3 convolution without bias; padding equals dilation, so stride 1 keeps the size.

    `weight` is (out_channels, 3, 3, in_channels).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        if stride not in (1, 2) or dilation not in (1, 2) or stride * dilation > 2:
            raise ValueError(f"stride {stride} with dilation {dilation}: 1 or 2, and not both 2")
        scale = (9 * in_channels) ** -0.5
        self.weight = mx.random.uniform(-scale, scale, (out_channels, 3, 3, in_channels))
        self.stride = stride
        self.dilation = dilation

    def __call__(self, x: mx.array) -> mx.array:
        if not _fast():
            return mx.conv2d(x, self.weight, self.stride, self.dilation, self.dilation)
        if self.dilation == 2:
            return _dilated(x, self.weight)
        return (_conv_s2 if self.stride == 2 else _conv_s1)(x, self.weight)


class Conv1x1(nn.Module):
    """1x1 convolution without bias: a strided slice and a matrix product. `weight` is (out, 1, 1, in)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        scale = in_channels**-0.5
        self.weight = mx.random.uniform(-scale, scale, (out_channels, 1, 1, in_channels))
        self.stride = stride

    def __call__(self, x: mx.array) -> mx.array:
        if not _fast():
            return mx.conv2d(x, self.weight, self.stride)
        return x[:, :: self.stride, :: self.stride] @ self.weight[:, 0, 0].T


class StemConv(nn.Module):
    """The 7x7, stride-2 first convolution. `weight` is (out, 7, 7, in)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        scale = (49 * in_channels) ** -0.5
        self.weight = mx.random.uniform(-scale, scale, (out_channels, 7, 7, in_channels))

    def __call__(self, x: mx.array) -> mx.array:
        return _stem(x, self.weight) if _fast() else mx.conv2d(x, self.weight, 2, 3)


def _dilated(x: mx.array, weight: mx.array) -> mx.array:
    """Dilation 2 as a plain convolution of the four interleaved half-size grids."""
    n, h, w, c = x.shape
    padded = mx.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
    half_h, half_w = padded.shape[1] // 2, padded.shape[2] // 2
    grids = padded.reshape(n, half_h, 2, half_w, 2, c).transpose(2, 4, 0, 1, 3, 5).reshape(4 * n, half_h, half_w, c)
    y = _conv_s1(grids, weight)
    y = y.reshape(2, 2, n, half_h, half_w, -1).transpose(2, 3, 0, 4, 1, 5).reshape(n, 2 * half_h, 2 * half_w, -1)
    return y[:, :h, :w]


_CACHE_BYTES = 2_000_000
"""Patches of a batch slice should stay within a core's L2 cache; measured best between 1 and 2 MB."""


def _slices(x: mx.array) -> int:
    """Into how many batch slices a 3x3 convolution of `x` is cut, so that each slice's patches stay in cache.

    Only the wide maps of few channels gain: with many channels the matrix product outweighs the patches.
    """
    n, h, w, c = x.shape
    fitting = _CACHE_BYTES // (h * w * 9 * c * 4)
    return n // fitting if c <= 64 and fitting and n % fitting == 0 else 1


def _sliced_conv(x: mx.array, weight: mx.array) -> mx.array:
    return mx.concatenate([mx.conv2d(part, weight, 1, 1) for part in mx.split(x, _slices(x))])


@mx.custom_function
def _conv_s1(x: mx.array, weight: mx.array) -> mx.array:
    return _sliced_conv(x, weight)


@_conv_s1.vjp
def _conv_s1_vjp(primals: tuple[mx.array, mx.array], dy: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    x, weight = primals
    dx = _sliced_conv(dy, weight[:, ::-1, ::-1].transpose(3, 1, 2, 0))
    parts = _slices(x)
    if parts == 1:
        return dx, _weight_gradient(x, dy, 1)
    pairs = zip(mx.split(x, parts), mx.split(dy, parts), strict=True)
    return dx, sum(_patch_weight_gradient(part, d_part, 3, 1, 1) for part, d_part in pairs)


@mx.custom_function
def _conv_s2(x: mx.array, weight: mx.array) -> mx.array:
    return mx.conv2d(x, weight, 2, 1)


@_conv_s2.vjp
def _conv_s2_vjp(primals: tuple[mx.array, mx.array], dy: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    x, weight = primals
    return _stride2_input_gradient(dy, weight, x.shape[1], x.shape[2]), _weight_gradient(x, dy, 2)


def _stride2_input_gradient(dy: mx.array, weight: mx.array, height: int, width: int) -> mx.array:
    """Gradient of a 3x3 stride-2 convolution's input: even and odd rows and columns each see their own taps.

    With padding 1, output i reads rows 2i-1, 2i, 2i+1: an even row 2i gets tap 1 of output i; an odd row 2i+1 gets
    tap 2 of output i and tap 0 of output i+1.
    """
    n, rows, columns, _ = dy.shape
    dy = mx.pad(dy, ((0, 0), (0, 1), (0, 1), (0, 0)))
    taps = weight.transpose(1, 2, 0, 3)

    def phase(row_taps: tuple[tuple[int, int], ...], column_taps: tuple[tuple[int, int], ...]) -> mx.array:
        return sum(dy[:, r : r + rows, c : c + columns] @ taps[ky, kx] for ky, r in row_taps for kx, c in column_taps)

    even, odd = ((1, 0),), ((2, 0), (0, 1))
    top = mx.stack([phase(even, even), phase(even, odd)], axis=3)
    bottom = mx.stack([phase(odd, even), phase(odd, odd)], axis=3)
    dx = mx.stack([top, bottom], axis=2).reshape(n, 2 * rows, 2 * columns, -1)
    return dx[:, :height, :width]


def _weight_gradient(x: mx.array, dy: mx.array, stride: int) -> mx.array:
    """Weight gradient (out, 3, 3, in) as one matrix product per tap, each over all output positions."""
    _, rows, columns, out_channels = dy.shape
    x = mx.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    flat = dy.reshape(-1, out_channels).T
    row_span, column_span = stride * (rows - 1) + 1, stride * (columns - 1) + 1
    taps = [
        flat @ x[:, ky : ky + row_span : stride, kx : kx + column_span : stride].reshape(-1, x.shape[-1])
        for ky in range(3)
        for kx in range(3)
    ]
    return mx.stack(taps, axis=1).reshape(out_channels, 3, 3, -1)


def _patch_weight_gradient(x: mx.array, dy: mx.array, kernel: int, stride: int, padding: int) -> mx.array:
    """Weight gradient (out, k, k, in) as one matrix product with all patches of `x` written out."""
    n, rows, columns, out_channels = dy.shape
    padded = mx.contiguous(mx.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0))))
    _, height, width, c = padded.shape
    steps = (height * width * c, stride * width * c, stride * c, width * c, c, 1)
    patches = mx.as_strided(padded, (n, rows, columns, kernel, kernel, c), steps).reshape(n * rows * columns, -1)
    return (dy.reshape(-1, out_channels).T @ patches).reshape(out_channels, kernel, kernel, c)


@mx.custom_function
def _stem(x: mx.array, weight: mx.array) -> mx.array:
    return mx.conv2d(x, weight, 2, 3)


@_stem.vjp
def _stem_vjp(primals: tuple[mx.array, mx.array], dy: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    x, weight = primals
    _, (dx,) = mx.vjp(lambda image: mx.conv2d(image, weight, 2, 3), [x], [dy])
    return dx, _patch_weight_gradient(x, dy, 7, 2, 3)


def max_pool_3x3_s2(x: mx.array) -> mx.array:
    """3x3 max pool, stride 2, padding 1: (N, H, W, C) -> (N, ceil(H/2), ceil(W/2), C).

    On the CPU the maximum is taken along columns and then along rows, over shifted slices; the gradient goes to
    the first maximum of each, as in the stock operation unless equal maxima stand in different rows.
    """
    if not _fast():
        return nn.MaxPool2d(3, 2, 1)(x)
    x = _pool_rows(x.swapaxes(1, 2)).swapaxes(1, 2)
    return _pool_rows(x)


def _row_phases(x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Rows 2i-1, 2i and 2i+1 for every output row i, with -inf outside."""
    rows = (x.shape[1] + 1) // 2
    x = mx.pad(x, ((0, 0), (1, 2 * rows - x.shape[1]), (0, 0), (0, 0)), constant_values=-mx.inf)
    pairs = x[:, : 2 * rows].reshape(x.shape[0], rows, 2, *x.shape[2:])
    return pairs[:, :, 0], pairs[:, :, 1], x[:, 2 : 2 * rows + 1 : 2]


@mx.custom_function
def _pool_rows(x: mx.array) -> mx.array:
    before, centre, after = _row_phases(x)
    return mx.maximum(mx.maximum(before, centre), after)


@_pool_rows.vjp
def _pool_rows_vjp(x: mx.array, dy: mx.array, y: mx.array) -> mx.array:
    before, centre, _ = _row_phases(x)
    nothing = mx.zeros_like(dy)
    to_before = mx.where(before == y, dy, nothing)
    to_centre = mx.where((before != y) & (centre == y), dy, nothing)
    to_after = dy - to_before - to_centre
    # Row 2i+1 is the last of window i and the first of window i+1.
    odd = to_after + mx.pad(to_before[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    dx = mx.stack([to_centre, odd], axis=2).reshape(x.shape[0], -1, *x.shape[2:])
    return dx[:, : x.shape[1]]


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

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training or self.frozen_statistics:
            scale = self.weight * mx.rsqrt(self.running_var + _EPS)
            return x * scale.astype(x.dtype) + (self.bias - self.running_mean * scale).astype(x.dtype)
        y, mean, var = _batch_norm(x, self.weight, self.bias)
        count = x.size // x.shape[-1]
        unbiased = mx.stop_gradient(var) * (count / max(count - 1, 1))
        self.running_mean = (1 - _MOMENTUM) * self.running_mean + _MOMENTUM * mx.stop_gradient(mean)
        self.running_var = (1 - _MOMENTUM) * self.running_var + _MOMENTUM * unbiased
        return y


_EPS = 1e-5
_MOMENTUM = 0.1


def _channel_mean(x: mx.array) -> mx.array:
    """Mean over all axes but the last, in float32; on the CPU as a matrix product, which is threaded."""
    flat = x.reshape(-1, x.shape[-1]).astype(mx.float32)
    if _fast():
        return (mx.full((1, flat.shape[0]), 1.0 / flat.shape[0]) @ flat)[0]
    return mx.mean(flat, axis=0)


@mx.custom_function
def _batch_norm(x: mx.array, weight: mx.array, bias: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    mean = _channel_mean(x)
    centred = x.astype(mx.float32) - mean
    var = _channel_mean(centred * centred)
    y = centred * (mx.rsqrt(var + _EPS) * weight) + bias
    return y.astype(x.dtype), mean, var


@_batch_norm.vjp
def _batch_norm_vjp(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple[mx.array, mx.array, mx.array]:
    x, weight, _ = primals
    dy = cotangents[0].astype(mx.float32)
    _, mean, var = outputs
    inverse = mx.rsqrt(var + _EPS)
    normal = (x.astype(mx.float32) - mean) * inverse
    mean_dy, mean_dy_normal = _channel_mean(dy), _channel_mean(dy * normal)
    dx = (dy - mean_dy - normal * mean_dy_normal) * (inverse * weight)
    count = x.size // x.shape[-1]
    return dx.astype(x.dtype), mean_dy_normal * count, mean_dy * count
