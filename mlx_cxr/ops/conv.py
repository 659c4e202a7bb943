"""Convolution and pooling whose gradients suit the CPU backend; other devices keep MLX's own kernels.

On the CPU backend only the forward convolution with stride and padding reaches the BLAS: MLX's gradient of a
strided convolution, any dilated convolution and the scatter behind `nn.MaxPool2d` run in plain loops and are tens
of times slower. Here those are rewritten as sums of shifted matrix products, which are the same sums in another
order; `tests/ops/test_conv.py` holds each against the stock operation. `switch.use_fast_ops(False)` turns them off.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_cxr.ops.streams import with_gradient
from mlx_cxr.ops.switch import fast_ops_enabled


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
        return conv3x3(x, self.weight, self.stride, self.dilation)


class Conv1x1(nn.Module):
    """1x1 convolution without bias: a strided slice and a matrix product. `weight` is (out, 1, 1, in)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        scale = in_channels**-0.5
        self.weight = mx.random.uniform(-scale, scale, (out_channels, 1, 1, in_channels))
        self.stride = stride

    def __call__(self, x: mx.array) -> mx.array:
        return conv1x1(x, self.weight, self.stride)


class StemConv(nn.Module):
    """The 7x7, stride-2 first convolution. `weight` is (out, 7, 7, in)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        scale = (49 * in_channels) ** -0.5
        self.weight = mx.random.uniform(-scale, scale, (out_channels, 7, 7, in_channels))

    def __call__(self, x: mx.array) -> mx.array:
        return stem_conv(x, self.weight)


def conv3x3(x: mx.array, weight: mx.array, stride: int, dilation: int) -> mx.array:
    """(N, H, W, C) and (O, 3, 3, C) -> (N, ceil(H / stride), ceil(W / stride), O); padding equals dilation."""
    if not fast_ops_enabled():
        return mx.conv2d(x, weight, stride, dilation, dilation)
    if dilation == 2:
        return _dilated(x, weight)
    if stride == 2:
        return with_gradient(lambda x, weight: mx.conv2d(x, weight, 2, 1), _stride2_gradients)(x, weight)
    return with_gradient(_sliced_conv, _stride1_gradients)(x, weight)


def conv1x1(x: mx.array, weight: mx.array, stride: int) -> mx.array:
    """(N, H, W, C) and (O, 1, 1, C) -> (N, ceil(H / stride), ceil(W / stride), O)."""
    if not fast_ops_enabled():
        return mx.conv2d(x, weight, stride)
    return x[:, ::stride, ::stride] @ weight[:, 0, 0].T


def stem_conv(x: mx.array, weight: mx.array) -> mx.array:
    """(N, H, W, C) and (O, 7, 7, C) -> (N, ceil(H / 2), ceil(W / 2), O); stride 2, padding 3."""
    if not fast_ops_enabled():
        return mx.conv2d(x, weight, 2, 3)
    return with_gradient(lambda x, weight: mx.conv2d(x, weight, 2, 3), _stem_gradients)(x, weight)


def _dilated(x: mx.array, weight: mx.array) -> mx.array:
    """Dilation 2 as a plain convolution of the four interleaved half-size grids."""
    n, h, w, c = x.shape
    padded = mx.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
    half_h, half_w = padded.shape[1] // 2, padded.shape[2] // 2
    grids = padded.reshape(n, half_h, 2, half_w, 2, c).transpose(2, 4, 0, 1, 3, 5).reshape(4 * n, half_h, half_w, c)
    y = with_gradient(_sliced_conv, _stride1_gradients)(grids, weight)
    y = y.reshape(2, 2, n, half_h, half_w, -1).transpose(2, 3, 0, 4, 1, 5).reshape(n, 2 * half_h, 2 * half_w, -1)
    return y[:, :h, :w]


_CACHE_BYTES = 2_000_000
"""Patches of a batch slice should stay within a core's L2 cache; measured best between 1 and 2 MB."""
_DEEP = 256
"""Output channels from which writing out patches costs less than turning the weights round in full."""


def _slices(x: mx.array) -> int:
    """Number of batch slices of a 3x3 convolution of `x`, such that each slice's patches stay in cache.

    Only the wide maps of few channels gain: with many channels the matrix product outweighs the patches.
    """
    n, h, w, c = x.shape
    fitting = _CACHE_BYTES // (h * w * 9 * c * 4)
    return n // fitting if c <= 128 and fitting and n % fitting == 0 else 1


def _sliced_conv(x: mx.array, weight: mx.array) -> mx.array:
    parts = _slices(x)
    if parts == 1:
        return mx.conv2d(x, weight, 1, 1)
    return mx.concatenate([mx.conv2d(part, weight, 1, 1) for part in mx.split(x, parts)])


# The gradient goes on to the layers before when the weights' is taken: MLX would take all of those last, with every
# layer's arrays in memory until then (2.3 GB where it is 1.4: batch 32, 224 px).


def _stride1_gradients(x: mx.array, weight: mx.array, dy: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    parts = _slices(x)
    pairs = zip(mx.split(x, parts), mx.split(dy, parts), strict=True)
    d_weight = sum(_weight_gradient(part, d_part, 3, 1, 1) for part, d_part in pairs)
    (dy,) = mx.depends([dy], [d_weight])
    if weight.shape[0] < _DEEP:
        return _sliced_conv(dy, weight[:, ::-1, ::-1].transpose(3, 1, 2, 0)), d_weight
    # Rows of the turned weights are still whole runs of channels in memory here, which copy ten times as fast.
    turned = weight[:, ::-1, ::-1].transpose(1, 2, 0, 3).reshape(-1, weight.shape[-1])
    return (_patches(dy, 3, 1, 1) @ turned).reshape(x.shape), d_weight


def _stride2_gradients(x: mx.array, weight: mx.array, dy: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    d_weight = _weight_gradient(x, dy, 3, 2, 1)
    (dy,) = mx.depends([dy], [d_weight])
    return _stride2_input_gradient(dy, weight, x.shape[1], x.shape[2]), d_weight


def _stem_gradients(x: mx.array, weight: mx.array, dy: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    _, (dx,) = mx.vjp(lambda image: mx.conv2d(image, weight, 2, 3), [x], [dy])
    return dx, _weight_gradient(x, dy, 7, 2, 3)


def _stride2_input_gradient(dy: mx.array, weight: mx.array, height: int, width: int) -> mx.array:
    """Gradient of a 3x3 stride-2 convolution's input: even and odd rows and columns each see their own taps.

    With padding 1, output i reads rows 2i-1, 2i, 2i+1: an even row 2i gets tap 1 of output i; an odd row 2i+1 gets
    tap 2 of output i and tap 0 of output i+1.
    """
    n, rows, columns, out_channels = dy.shape
    dy = mx.contiguous(mx.pad(dy, ((0, 0), (0, 1), (0, 1), (0, 0))))
    taps = weight.transpose(1, 2, 0, 3)
    steps = ((rows + 1) * (columns + 1) * out_channels, (columns + 1) * out_channels, out_channels)

    def phase(row_taps: list[int], column_taps: list[int]) -> mx.array:
        shape = (n, rows, columns, len(row_taps), len(column_taps), out_channels)
        patches = mx.as_strided(dy, shape, (*steps, *steps[1:], 1)).reshape(n, rows, columns, -1)
        return patches @ taps[mx.array(row_taps)][:, mx.array(column_taps)].reshape(-1, weight.shape[-1])

    even, odd = [1], [2, 0]
    top = mx.stack([phase(even, even), phase(even, odd)], axis=3)
    bottom = mx.stack([phase(odd, even), phase(odd, odd)], axis=3)
    dx = mx.stack([top, bottom], axis=2).reshape(n, 2 * rows, 2 * columns, -1)
    return dx[:, :height, :width]


def _weight_gradient(x: mx.array, dy: mx.array, kernel: int, stride: int, padding: int) -> mx.array:
    """Weight gradient (out, k, k, in) as one matrix product with all patches of `x` written out."""
    out_channels = dy.shape[-1]
    product = dy.reshape(-1, out_channels).T @ _patches(x, kernel, stride, padding)
    return product.reshape(out_channels, kernel, kernel, -1)


def _patches(x: mx.array, kernel: int, stride: int, padding: int) -> mx.array:
    """(positions of the output, k * k * channels): the patch of `x` under each output of a convolution."""
    padded = mx.contiguous(mx.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0))))
    n, height, width, c = padded.shape
    rows, columns = (height - kernel) // stride + 1, (width - kernel) // stride + 1
    steps = (height * width * c, stride * width * c, stride * c, width * c, c, 1)
    return mx.as_strided(padded, (n, rows, columns, kernel, kernel, c), steps).reshape(n * rows * columns, -1)


def max_pool_3x3_s2(x: mx.array) -> mx.array:
    """3x3 max pool, stride 2, padding 1: (N, H, W, C) -> (N, ceil(H/2), ceil(W/2), C).

    On the CPU the maximum is taken along columns and then along rows, over shifted slices; the gradient goes to
    the first maximum of each, as in the stock operation unless equal maxima stand in different rows.
    """
    if not fast_ops_enabled():
        return nn.MaxPool2d(3, 2, 1)(x)
    pool_rows = with_gradient(_pool_rows, _pool_rows_gradient)
    return pool_rows(pool_rows(x.swapaxes(1, 2)).swapaxes(1, 2))


def _row_phases(x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Rows 2i-1, 2i and 2i+1 for every output row i, with -inf outside."""
    rows = (x.shape[1] + 1) // 2
    x = mx.pad(x, ((0, 0), (1, 2 * rows - x.shape[1]), (0, 0), (0, 0)), constant_values=-mx.inf)
    pairs = x[:, : 2 * rows].reshape(x.shape[0], rows, 2, *x.shape[2:])
    return pairs[:, :, 0], pairs[:, :, 1], x[:, 2 : 2 * rows + 1 : 2]


def _pool_rows(x: mx.array) -> mx.array:
    before, centre, after = _row_phases(x)
    return mx.maximum(mx.maximum(before, centre), after)


def _pool_rows_gradient(x: mx.array, dy: mx.array, y: mx.array) -> mx.array:
    before, centre, _ = _row_phases(x)
    nothing = mx.zeros_like(dy)
    to_before = mx.where(before == y, dy, nothing)
    to_centre = mx.where((before != y) & (centre == y), dy, nothing)
    to_after = dy - to_before - to_centre
    # Row 2i+1 is the last of window i and the first of window i+1.
    odd = to_after + mx.pad(to_before[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    dx = mx.stack([to_centre, odd], axis=2).reshape(x.shape[0], -1, *x.shape[2:])
    return dx[:, : x.shape[1]]
