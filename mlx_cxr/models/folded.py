"""The ResNet-18 for inference: BatchNorm folded into the convolutions, in the precision that suits the device.

In evaluation a BatchNorm is one factor and one constant per channel, `BatchNorm.affine`; the factor goes into the
kernel before it (Jacob et al., arXiv:1712.05877, section 3.2), and the constant becomes its bias.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn

from mlx_cxr.models.resnet import BasicBlock, ResNet18, ResNetConfig
from mlx_cxr.ops import conv, streams
from mlx_cxr.ops.batch_norm import BatchNorm

HALF_PRECISION_TOLERANCE = 0.02
"""Largest difference of a logit that a network in float16 may have from float32 to be taken in its place."""
_WORTH_IT = 0.9
_TOGETHER = 16


class _FoldedConv(nn.Module):
    """A convolution and the BatchNorm after it."""

    def __init__(self, layer: nn.Module, norm: BatchNorm, dtype: mx.Dtype) -> None:
        super().__init__()
        scale, shift = norm.affine()
        self.weight = (layer.weight * scale[:, None, None, None]).astype(dtype)
        self.bias = shift.astype(dtype)
        self.stride = getattr(layer, "stride", 2)
        self.dilation = getattr(layer, "dilation", 1)

    def __call__(self, x: mx.array) -> mx.array:
        kernel = self.weight.shape[1]
        if kernel == 3:
            return conv.conv3x3(x, self.weight, self.stride, self.dilation) + self.bias
        if kernel == 1:
            return conv.conv1x1(x, self.weight, self.stride) + self.bias
        return conv.stem_conv(x, self.weight) + self.bias


class _FoldedBlock(nn.Module):
    """A `BasicBlock` of folded convolutions."""

    def __init__(self, block: BasicBlock, dtype: mx.Dtype) -> None:
        super().__init__()
        self.first = _FoldedConv(block.conv1, block.bn1, dtype)
        self.second = _FoldedConv(block.conv2, block.bn2, dtype)
        self.projection = _FoldedConv(*block.downsample, dtype) if "downsample" in block else None

    def __call__(self, x: mx.array) -> mx.array:
        shortcut = x if self.projection is None else self.projection(x)
        return nn.relu(shortcut + self.second(nn.relu(self.first(x))))


class FoldedResNet18(nn.Module):
    """A copy of a `ResNet18` in evaluation, cut at the last feature map like it (`explain.grad_cam.SplitNetwork`)."""

    def __init__(self, model: ResNet18, dtype: mx.Dtype) -> None:
        super().__init__()
        self.config: ResNetConfig = model.config
        self.dtype = dtype
        self.stem = _FoldedConv(model.conv1, model.bn1, dtype)
        stages = (model.layer1, model.layer2, model.layer3, model.layer4)
        self.blocks = [_FoldedBlock(block, dtype) for stage in stages for block in stage]
        self.fc = nn.Linear(*reversed(model.fc.weight.shape))
        self.fc.weight, self.fc.bias = model.fc.weight.astype(dtype), model.fc.bias.astype(dtype)
        self.eval()
        mx.eval(self.parameters())

    @classmethod
    def of(cls, model: ResNet18, dtype: mx.Dtype = mx.float32) -> FoldedResNet18:
        """Fold `model`, whatever mode it is in, and leave it as it is; `dtype` is that of weights and activations."""
        return cls(model, dtype)

    def features(self, x: mx.array) -> mx.array:
        """As `ResNet18.features`, of any floating type, in this network's."""
        if x.ndim != 4 or x.shape[-1] != self.config.in_channels:
            raise ValueError(f"input has shape {x.shape}, expected (N, H, W, {self.config.in_channels}), channels last")
        return streams.joined(streams.each(self._trunk, streams.split(x.astype(self.dtype))))

    def head(self, a: mx.array) -> mx.array:
        """As `ResNet18.head`."""
        return self.fc(mx.mean(a, axis=(1, 2)))

    def __call__(self, x: mx.array) -> mx.array:
        return self.head(self.features(x))

    def _trunk(self, x: mx.array) -> mx.array:
        x = nn.relu(conv.max_pool_3x3_s2(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return x


def evaluated(function: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """`function` in the form that runs fastest here; its results are evaluated.

    On the CPU backend a batch is computed in parts, uncompiled: fused operations with a value per channel run there
    element by element, and made the forward pass 1.5 times as long. Large batches go through 16 images at a time, of
    which more fits the cache. Elsewhere one graph is compiled per shape.

    `function` is of a batch (N, …) to a row per image, such as a network in evaluation mode with constant weights.
    """
    if not _computes_on_cpu():
        compiled = mx.compile(function)

        def run(x: mx.array) -> mx.array:
            y = compiled(x)
            mx.eval(y)
            return y

        return run

    def run_in_parts(x: mx.array) -> mx.array:
        with streams.batch_parallel() if len(x) >= streams.available() else nullcontext():
            made = []
            for some in mx.split(x, range(_TOGETHER, len(x), _TOGETHER)):
                made.append(function(some))
                mx.eval(made[-1])
            return streams.joined(made)

    return run_in_parts


def inference_network(model: ResNet18, trial: mx.array | None = None) -> FoldedResNet18:
    """Fold `model` for this device: in float16 where that is faster and gives the same logits, else in float32.

    They are compared on `trial`, preprocessed images (N, H, W, channels); None takes float32. So does the CPU backend,
    without a trial: its matrix products are fast in float32 alone.
    """
    full = FoldedResNet18.of(model)
    if trial is None or _computes_on_cpu():
        return full
    half = FoldedResNet18.of(model, mx.float16)
    logits = [net.head(evaluated(net.features)(trial).astype(mx.float32)) for net in (full, half)]
    difference = mx.max(mx.abs(logits[0] - logits[1])).item()
    if not difference <= HALF_PRECISION_TOLERANCE:
        return full
    return half if _seconds(half, trial) < _WORTH_IT * _seconds(full, trial) else full


def _computes_on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu


def _seconds(network: FoldedResNet18, x: mx.array, rounds: int = 5) -> float:
    run, times = evaluated(network.features), []
    run(x)
    for _ in range(rounds):
        begun = time.perf_counter()
        run(x)
        times.append(time.perf_counter() - begun)
    return sorted(times)[rounds // 2]
