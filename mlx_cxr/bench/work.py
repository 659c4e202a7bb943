"""Operations and memory traffic of a ResNet-18's forward pass, counted from its weights, and the bound they set.

The bound is the roofline's (Williams et al., Communications of the ACM 52(4), 2009): no device does the work in less
than the operations take at its peak, or the traffic at its bandwidth, whichever is longer. Both are measured, so it is
as good as they are; a convolution by another algorithm (Winograd) does fewer operations than are counted here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from mlx_cxr.models.resnet import BasicBlock, ResNet18


@dataclass(frozen=True)
class ForwardWork:
    """Of one pass.

    Attributes:
        flops: a multiplication and an addition per weight and output position, per image; convolutions and the head.
        activations: elements that the layers read and write, per image: each convolution its input and output, each
            block its shortcut, the pool its input and output. BatchNorm, ReLU and addition ride along.
        weights: elements, read once per pass whatever the batch.
    """

    flops: int
    activations: int
    weights: int

    def bound(self, images: int, precision: str, peak_gflops: float, bandwidth_gbs: float) -> float:
        """Least seconds of a pass over `images`.

        Args:
            precision: of weights and activations.
            peak_gflops: GFLOP/s of a matrix product in that precision.
            bandwidth_gbs: GB/s (1e9) of the memory.
        """
        moved = (images * self.activations + self.weights) * getattr(mx, precision).size
        return max(images * self.flops / (peak_gflops * 1e9), moved / (bandwidth_gbs * 1e9))


def forward_work(model: ResNet18, size: int) -> ForwardWork:
    """The work of a model on images of `size` pixels a side."""
    flops = activations = weights = 0
    for weight, inputs, outputs in _convolutions(model, size):
        out_channels, _, _, in_channels = weight.shape
        flops += 2 * weight.size * outputs**2
        activations += in_channels * inputs**2 + out_channels * outputs**2
        weights += weight.size
    stem = _half(size)
    activations += 64 * (stem**2 + _half(stem) ** 2)
    for block, _, outputs in _blocks(model, size):
        activations += block.conv2.weight.shape[0] * outputs**2
    head = model.fc.weight
    return ForwardWork(flops + 2 * head.size, activations, weights + head.size)


def _half(side: int) -> int:
    return (side + 1) // 2


def _blocks(model: ResNet18, size: int) -> Iterator[tuple[BasicBlock, int, int]]:
    side = _half(_half(size))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            outputs = _half(side) if block.conv1.stride == 2 else side
            yield block, side, outputs
            side = outputs


def _convolutions(model: ResNet18, size: int) -> Iterator[tuple[mx.array, int, int]]:
    """Each convolution's weight, and the sides of its input and output."""
    yield model.conv1.weight, size, _half(size)
    for block, inputs, outputs in _blocks(model, size):
        yield block.conv1.weight, inputs, outputs
        yield block.conv2.weight, outputs, outputs
        if "downsample" in block:
            yield block.downsample[0].weight, inputs, outputs
