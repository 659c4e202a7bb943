"""PyTorch, for comparison only: its best device, a clock that waits for it, and the same ResNet-18 with our weights."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_cxr.core.errors import UserError
from mlx_cxr.models.resnet import ResNet18, ResNetConfig


class TorchMissingError(UserError, ImportError):
    """PyTorch is asked for and not installed."""


def import_torch() -> ModuleType:
    """The `torch` module.

    Raises:
        TorchMissingError: not installed; names the extra.
    """
    if importlib.util.find_spec("torch") is None:
        raise TorchMissingError('--against torch needs PyTorch, which is an extra: pip install -e ".[bench]"')
    import torch

    return torch


def best_device() -> str:
    """`cuda`, `mps` or `cpu`: the fastest that this PyTorch has here."""
    torch = import_torch()
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    torch = import_torch()
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def describe_torch(device: str) -> dict[str, Any]:
    """Version, device, its name, threads, and whether float32 is rounded to TF32, as MLX does on CUDA by default."""
    torch = import_torch()
    if device == "cuda":
        # MLX's CUDA backend rounds float32 operands to TF32 by default; like is compared with like.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return {
        "version": torch.__version__,
        "device": device,
        "name": torch.cuda.get_device_name() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "tf32": device == "cuda",
    }


def torch_dtype(precision: str) -> Any:
    """`torch.float32`, `torch.float16` or `torch.bfloat16` by name."""
    return getattr(import_torch(), precision)


def torch_resnet18(model: ResNet18) -> Any:
    """torchvision's `resnet18` as a `torch.nn.Module` (NCHW) with an MLX model's weights, on the CPU, evaluating.

    Written out here so that torchvision need not be installed. With `output_stride=16` the last stage is dilated, as
    timm's.
    """
    torch = import_torch()
    network = _new_network(model.config)
    state = {}
    for name, value in tree_flatten(model.parameters()):
        array = np.array(value.astype(mx.float32))
        state[name] = torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2) if array.ndim == 4 else array))
        if name.endswith("running_var"):
            state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
    network.load_state_dict(state, strict=True)
    return network.eval()


def _new_network(config: ResNetConfig) -> Any:
    torch = import_torch()
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, inputs: int, channels: int, stride: int, dilation: tuple[int, int]) -> None:
            super().__init__()
            first, second = dilation
            self.conv1 = nn.Conv2d(inputs, channels, 3, stride, first, first, bias=False)
            self.bn1 = nn.BatchNorm2d(channels)
            self.conv2 = nn.Conv2d(channels, channels, 3, 1, second, second, bias=False)
            self.bn2 = nn.BatchNorm2d(channels)
            self.relu = nn.ReLU(inplace=True)
            self.downsample = None
            if stride != 1 or inputs != channels:
                projection = nn.Conv2d(inputs, channels, 1, stride, bias=False)
                self.downsample = nn.Sequential(projection, nn.BatchNorm2d(channels))

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            return self.relu(y + (x if self.downsample is None else self.downsample(x)))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(config.in_channels, 64, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(64)
            self.relu = nn.ReLU(inplace=True)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
            dilated = config.output_stride == 16
            self.layer1 = nn.Sequential(Block(64, 64, 1, (1, 1)), Block(64, 64, 1, (1, 1)))
            self.layer2 = nn.Sequential(Block(64, 128, 2, (1, 1)), Block(128, 128, 1, (1, 1)))
            self.layer3 = nn.Sequential(Block(128, 256, 2, (1, 1)), Block(256, 256, 1, (1, 1)))
            first, second = ((1, 2), (2, 2)) if dilated else ((1, 1), (1, 1))
            self.layer4 = nn.Sequential(Block(256, 512, 1 if dilated else 2, first), Block(512, 512, 1, second))
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(512, config.num_classes)

        def forward(self, x: Any) -> Any:
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            return self.fc(torch.flatten(self.avgpool(x), 1))

    return Network()
