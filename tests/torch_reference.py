"""An independent ResNet-18 in PyTorch, with torchvision's names and layout, to hold the MLX one against.

Import it after `pytest.importorskip("torch")`. It is written out here so that no torchvision is needed.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn
import numpy as np
import torch
from mlx.utils import tree_flatten
from torch import nn


def _conv3x3(in_channels: int, channels: int, stride: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride, padding=dilation, dilation=dilation, bias=False)


class TorchBasicBlock(nn.Module):
    """torchvision's `BasicBlock`, with a dilation for each convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int, dilation: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride, dilation[0])
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv2 = _conv3x3(channels, channels, 1, dilation[1])
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class TorchResNet18(nn.Module):
    """torchvision's `resnet18`, NCHW; with `output_stride=16` the last stage is dilated, not strided."""

    def __init__(self, in_channels: int = 3, num_classes: int = 1000, output_stride: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._stage(64, 64, 1)
        self.layer2 = self._stage(64, 128, 2)
        self.layer3 = self._stage(128, 256, 2)
        self.layer4 = self._stage(256, 512, 2)
        if output_stride == 16:
            self.layer4 = nn.Sequential(TorchBasicBlock(256, 512, 1, (1, 2)), TorchBasicBlock(512, 512, 1, (2, 2)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, num_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            TorchBasicBlock(in_channels, channels, stride, (1, 1)),
            TorchBasicBlock(channels, channels, 1, (1, 1)),
        )

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Last feature map, (N, 512, h, w)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def head(self, a: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes) of a feature map (N, 512, h, w)."""
        return self.fc(torch.flatten(self.avgpool(a), 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def to_torch_state(model: mlx.nn.Module) -> dict[str, torch.Tensor]:
    """State dict for `TorchResNet18` from an MLX model; convolutions become (O, I, kh, kw).

    `num_batches_tracked` has no counterpart in MLX and is set to 0.
    """
    state: dict[str, torch.Tensor] = {}
    for name, value in tree_flatten(model.parameters()):
        array = np.array(value)
        if array.ndim == 4:
            array = array.transpose(0, 3, 1, 2)
        state[name] = torch.from_numpy(np.ascontiguousarray(array))
        if name.endswith("running_var"):
            state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
    return state


def randomize_batchnorm(model: mlx.nn.Module, seed: int) -> None:
    """Give every BatchNorm of an MLX model scale, shift and running statistics that differ from 1 and 0."""
    rng = np.random.default_rng(seed)
    weights = []
    for name, value in tree_flatten(model.parameters()):
        if name.endswith("running_mean"):
            prefix = name.removesuffix("running_mean")
            draws = {
                "running_mean": rng.normal(0.0, 0.2, value.shape),
                "running_var": rng.uniform(0.5, 1.5, value.shape),
                "weight": rng.uniform(0.5, 1.2, value.shape),
                "bias": rng.normal(0.0, 0.2, value.shape),
            }
            weights += [(prefix + key, mx.array(draw.astype(np.float32))) for key, draw in draws.items()]
    model.load_weights(weights, strict=False)
