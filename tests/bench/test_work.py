"""Operations counted from the architecture, against PyTorch's own counter and published figures."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_cxr.bench.run_all import random_network
from mlx_cxr.bench.torch_side import torch_resnet18
from mlx_cxr.bench.work import ForwardWork, forward_work
from mlx_cxr.models.resnet import ResNetConfig


def test_torchvisions_resnet18_has_1_814_gmac():
    """The figure that torchvision's own table of weights gives (`_ops`), at 224 px, three channels, 1000 classes."""
    work = forward_work(random_network(ResNetConfig(3, 1000), 0), 224)
    assert work.flops / 2e9 == pytest.approx(1.814, abs=5e-4)
    assert work.weights == 11_689_512 - 9_600 - 1_000, "all parameters but BatchNorm's and the head's bias"


@pytest.mark.parametrize(("size", "stride", "channels"), [(224, 32, 1), (75, 32, 3), (50, 16, 1)])
def test_operations_are_those_that_pytorch_counts(torch, size, stride, channels):
    from torch.utils.flop_counter import FlopCounterMode

    model = random_network(ResNetConfig(channels, 14, output_stride=stride), 0)
    moved, weights = 0, 0

    def hook(module: object, inputs: tuple, output: object) -> None:
        nonlocal moved, weights
        moved += inputs[0].numel() + output.numel()
        weights += module.weight.numel() if hasattr(module, "weight") else 0

    network = torch_resnet18(model)
    for module in network.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.MaxPool2d)):
            module.register_forward_hook(hook)
    shortcuts = 0
    for module in network.modules():
        if hasattr(module, "bn2"):
            module.register_forward_hook(lambda m, i, output: sizes.append(output.numel()))
    sizes: list[int] = []
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, channels, size, size))
    shortcuts = sum(sizes)
    work = forward_work(model, size)
    assert work.flops == counter.get_total_flops()
    assert work.activations == moved + shortcuts
    assert work.weights == weights + 512 * 14


def test_the_bound_is_the_longer_of_arithmetic_and_traffic():
    work = ForwardWork(flops=1_000_000_000, activations=1_000_000, weights=50_000_000)
    assert work.bound(8, "float32", peak_gflops=100.0, bandwidth_gbs=1000.0) == pytest.approx(0.08)
    assert work.bound(8, "float32", peak_gflops=1e6, bandwidth_gbs=10.0) == pytest.approx((8e6 + 50e6) * 4 / 10e9)
    assert work.bound(8, "float16", peak_gflops=1e6, bandwidth_gbs=10.0) == pytest.approx((8e6 + 50e6) * 2 / 10e9)


@pytest.mark.parametrize("stride", [32, 16])
def test_pytorch_gets_the_same_network(torch, stride):
    import mlx.core as mx

    model = random_network(ResNetConfig(3, 14, output_stride=stride), 3)
    x = np.random.default_rng(0).normal(size=(2, 70, 70, 3)).astype(np.float32)
    with torch.inference_mode():
        theirs = torch_resnet18(model)(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    ours = np.array(model(mx.array(x)))
    assert np.abs(ours).max() > 0.5, "the weights do something"
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
