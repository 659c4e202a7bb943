"""ResNet-18 for chest images, split where explanation needs it: `features` up to the last map, `head` from there.

He et al., Deep Residual Learning, arXiv:1512.03385; parameter names and block layout are those of torchvision's
`resnet18`, so `convert` only has to change the weights' axes. Everything is NHWC.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_cxr.ops import conv, streams
from mlx_cxr.ops.batch_norm import BatchNorm

STAGE_WIDTHS = (64, 128, 256, 512)


@dataclass(frozen=True)
class ResNetConfig:
    """Configuration of the network's shape.

    Attributes:
        in_channels: 1 for gray images, 3 for weights that keep ImageNet's stem.
        num_classes: logits; 14 findings.
        dropout: probability of dropping a pooled feature while training, in [0, 1).
        output_stride: pixels per cell of the last feature map. 32 is the published network; 16 keeps the last
            stage's stride at 1 and dilates its convolutions by 2 instead (as timm's `output_stride=16`), which
            leaves loaded weights meaningful and makes maps of small images twice as fine.
    """

    in_channels: int = 1
    num_classes: int = 14
    dropout: float = 0.0
    output_stride: int = 32

    def __post_init__(self) -> None:
        if self.in_channels not in (1, 3):
            raise ValueError(f"in_channels is {self.in_channels}; 1 or 3")
        if self.output_stride not in (16, 32):
            raise ValueError(f"output_stride is {self.output_stride}; 16 or 32")

    def plain(self) -> dict[str, int | float]:
        """The configuration as JSON-ready data."""
        return asdict(self)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the identity, or a 1x1 projection of it where shape changes; on the parts of a batch."""

    def __init__(self, in_channels: int, channels: int, stride: int, dilation: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = conv.Conv3x3(in_channels, channels, stride, dilation[0])
        self.bn1 = BatchNorm(channels)
        self.conv2 = conv.Conv3x3(channels, channels, 1, dilation[1])
        self.bn2 = BatchNorm(channels)
        if stride != 1 or in_channels != channels:
            self.downsample = [conv.Conv1x1(in_channels, channels, stride), BatchNorm(channels)]

    def __call__(self, parts: list[mx.array]) -> list[mx.array]:
        y = streams.each(nn.relu, self.bn1.over(streams.each(self.conv1, parts)))
        y = self.bn2.over(streams.each(self.conv2, y))
        if "downsample" in self:
            projection, norm = self.downsample
            parts = norm.over(streams.each(projection, parts))
        return streams.each(lambda x, y: nn.relu(x + y), parts, y)


class ResNet18(nn.Module):
    """The network; `model(x)` is `head(features(x))`.

    A new model is in training mode, as all MLX modules are; call `eval()` before scoring.
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = conv.StemConv(config.in_channels, 64)
        self.bn1 = BatchNorm(64)
        dilated = config.output_stride == 16
        self.layer1 = [BasicBlock(64, 64, 1, (1, 1)), BasicBlock(64, 64, 1, (1, 1))]
        self.layer2 = [BasicBlock(64, 128, 2, (1, 1)), BasicBlock(128, 128, 1, (1, 1))]
        self.layer3 = [BasicBlock(128, 256, 2, (1, 1)), BasicBlock(256, 256, 1, (1, 1))]
        first, second = ((1, 2), (2, 2)) if dilated else ((1, 1), (1, 1))
        self.layer4 = [BasicBlock(256, 512, 1 if dilated else 2, first), BasicBlock(512, 512, 1, second)]
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(512, config.num_classes)

    def features(self, x: mx.array) -> mx.array:
        """Last feature map.

        Args:
            x: float (N, H, W, in_channels), normalized as `preprocess` does.

        Returns:
            (N, ceil(H / output_stride), ceil(W / output_stride), 512), non-negative.

        Raises:
            ValueError: `x` is not NHWC with this model's channels.
        """
        if x.ndim != 4 or x.shape[-1] != self.config.in_channels:
            raise ValueError(f"input has shape {x.shape}, expected (N, H, W, {self.config.in_channels}), channels last")
        parts = self.bn1.over(streams.each(self.conv1, streams.split(x)))
        # The published order is ReLU, then pool; a maximum is the same either way, and here ReLU sees a quarter of it.
        parts = streams.each(lambda part: nn.relu(conv.max_pool_3x3_s2(part)), parts)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                parts = block(parts)
        return streams.joined(parts)

    def head(self, a: mx.array) -> mx.array:
        """Logits (N, 14) of a feature map (N, h, w, 512): average pool, dropout while training, linear."""
        return self.fc(self.dropout(mx.mean(a, axis=(1, 2))))

    def __call__(self, x: mx.array) -> mx.array:
        return self.head(self.features(x))


GRAY_MEAN, GRAY_STD = 0.449, 0.226
"""ImageNet's channel means and deviations averaged over the channels, for images in [0, 1]."""
RGB_MEAN, RGB_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's own (torchvision), for the three-channel stem."""


def preprocess(pixels: mx.array, in_channels: int) -> mx.array:
    """Normalize images for the network; the only normalization in the package.

    Args:
        pixels: (N, H, W), uint8 in [0, 255] or float in [0, 1].
        in_channels: 1 or 3 (the gray image repeated).

    Returns:
        float32 (N, H, W, in_channels), standardized with ImageNet's statistics.
    """
    x = pixels.astype(mx.float32) / 255.0 if pixels.dtype == mx.uint8 else pixels.astype(mx.float32)
    x = x[..., None]
    if in_channels == 1:
        return (x - GRAY_MEAN) / GRAY_STD
    return (x - mx.array(RGB_MEAN)) / mx.array(RGB_STD)


def initialize(model: ResNet18, seed: int, zero_init_residual: bool = False) -> None:
    """Set weights for training from scratch: He normal (fan out) convolutions, unit BatchNorm, as torchvision does.

    The head is uniform within 1/sqrt(512). `zero_init_residual` starts the second BatchNorm's scale of each block at 0
    instead of 1, so that a block starts as its shortcut (Goyal et al., arXiv:1706.02677, section 5.1; torchvision's
    option of that name). The receptive field of a cell of the last map then widens only as far as training asks for,
    and maps localize better.
    """
    rng = np.random.default_rng(seed)
    weights = []
    for name, value in tree_flatten(model.parameters()):
        if value.ndim == 4:
            out_channels, height, width, _ = value.shape
            std = np.sqrt(2.0 / (out_channels * height * width))
            weights.append((name, rng.normal(0.0, std, value.shape)))
        elif name.startswith("fc."):
            weights.append((name, rng.uniform(-1, 1, value.shape) / np.sqrt(512)))
        elif zero_init_residual and name.endswith("bn2.weight"):
            weights.append((name, np.zeros(value.shape)))
    model.load_weights([(name, mx.array(value.astype(np.float32))) for name, value in weights], strict=False)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """`total` and `trainable` parameters; BatchNorm's running statistics count as neither."""
    total = sum(v.size for name, v in tree_flatten(model.parameters()) if "running_" not in name)
    trainable = sum(v.size for _, v in tree_flatten(model.trainable_parameters()))
    return {"total": total, "trainable": trainable}
