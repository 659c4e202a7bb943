"""The folded network against the one it was made of, and against PyTorch's own folding."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_cxr.core.labels import LABELS
from mlx_cxr.explain.grad_cam import class_activation_maps
from mlx_cxr.models import folded
from mlx_cxr.models.folded import FoldedResNet18, evaluated, inference_network
from mlx_cxr.models.resnet import ResNet18, ResNetConfig, initialize
from mlx_cxr.ops.switch import fast_ops


def network(channels: int = 1, stride: int = 32, seed: int = 3) -> ResNet18:
    """A network whose BatchNorms all do something: factors of both signs, means and variances of their own."""
    model = ResNet18(ResNetConfig(in_channels=channels, output_stride=stride))
    initialize(model, seed)
    rng = np.random.default_rng(seed)
    for name, module in model.named_modules():
        if hasattr(module, "running_var"):
            size = module.running_mean.shape
            module.weight = mx.array(rng.uniform(0.5, 1.5, size) * rng.choice([-1, 1, 1, 1], size)).astype(mx.float32)
            for what in ("bias", "running_mean"):
                setattr(module, what, mx.array(rng.normal(0, 0.3, size).astype(np.float32)))
            module.running_var = mx.array(rng.uniform(0.5, 2.0, size).astype(np.float32))
            assert name
    return model.eval()


def images(count: int, size: int, channels: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(0).normal(size=(count, size, size - 7, channels)).astype(np.float32))


def relative_error(got: mx.array, wanted: mx.array) -> float:
    return (mx.max(mx.abs(got.astype(mx.float32) - wanted)) / mx.max(mx.abs(wanted))).item()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("channels", "stride"), [(1, 32), (3, 16)])
def test_logits_and_maps_are_those_of_the_network(channels, stride, fast):
    model, x = network(channels, stride), images(3, 71, channels)
    with fast_ops(fast):
        net = FoldedResNet18.of(model)
        assert relative_error(net.features(x), model.features(x)) < 1e-5
        assert relative_error(net(x), model(x)) < 1e-5
        assert relative_error(evaluated(net)(x), model(x)) < 1e-5
        assert relative_error(mx.compile(net)(x), model(x)) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float16, 5e-3), (mx.bfloat16, 5e-2)])
def test_half_precision_is_that_precise(dtype, tolerance):
    model, x = network(), images(2, 64)
    net = FoldedResNet18.of(model, dtype)
    assert net(x).dtype == dtype
    assert 0 < relative_error(net(x), model(x)) < tolerance


@pytest.mark.parametrize("count", [1, 2, 16, 17, 35])
def test_large_batches_come_back_whole_and_in_order(count):
    net, x = FoldedResNet18.of(network()), images(count, 39)
    wanted = mx.concatenate([net(x[i : i + 1]) for i in range(count)])
    assert relative_error(evaluated(net)(x), wanted) < 1e-4


def test_maps_of_findings_are_those_of_the_network():
    model, x = network(), images(2, 96)
    ours, wanted = (class_activation_maps(net, x, LABELS) for net in (FoldedResNet18.of(model), model))
    np.testing.assert_allclose(ours.raw, wanted.raw, atol=1e-5 * wanted.raw.max())


def test_it_is_a_copy_and_the_mode_of_the_network_does_not_matter():
    model, x = network(), images(2, 64)
    before = model(x)
    net = FoldedResNet18.of(model.train())
    assert relative_error(net(x), before) < 1e-5
    model.fc.bias = model.fc.bias + 5
    model.layer1[0].conv1.weight = model.layer1[0].conv1.weight * 2
    assert relative_error(net(x), before) < 1e-5


def test_input_of_another_layout_is_refused():
    with pytest.raises(ValueError, match="channels last"):
        FoldedResNet18.of(network())(mx.zeros((1, 1, 64, 64)))


def test_float16_is_not_tried_where_it_cannot_be_faster():
    if mx.default_device().type != mx.DeviceType.cpu:
        pytest.skip("float16 may well be faster here")
    assert inference_network(network(), images(2, 64)).dtype == mx.float32


@pytest.mark.parametrize(
    ("seconds_of_half", "shift", "taken"), [(0.5, 0.0, "float16"), (0.95, 0.0, "float32"), (0.5, 0.1, "float32")]
)
def test_float16_is_taken_where_it_is_faster_and_says_the_same(monkeypatch, seconds_of_half, shift, taken):
    """The choice itself, with the device and the clock given; the outputs are computed."""
    model, x = network(), images(2, 64)
    half = {mx.float16: seconds_of_half, mx.float32: 1.0}
    monkeypatch.setattr(folded, "_computes_on_cpu", lambda: False)
    monkeypatch.setattr(folded, "_seconds", lambda net, _: half[net.dtype])
    if shift:
        whole = FoldedResNet18.head
        monkeypatch.setattr(
            FoldedResNet18, "head", lambda self, a: whole(self, a) + (shift if self.dtype == mx.float16 else 0)
        )
    assert str(inference_network(model, x).dtype).endswith(taken)


def test_a_folded_convolution_is_pytorchs():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity with it is not checked here")
    from torch.nn.utils.fusion import fuse_conv_bn_eval
    from torch_reference import TorchResNet18, to_torch_state

    model = network()
    reference = TorchResNet18(1, 14, 32)
    reference.load_state_dict(to_torch_state(model), strict=True)
    reference.eval()
    net = FoldedResNet18.of(model)
    block, torch_block = net.blocks[2], reference.layer2[0]
    for ours, (conv, norm) in (
        (block.first, (torch_block.conv1, torch_block.bn1)),
        (block.projection, tuple(torch_block.downsample)),
    ):
        fused = fuse_conv_bn_eval(conv, norm)
        np.testing.assert_allclose(
            np.array(ours.weight).transpose(0, 3, 1, 2), fused.weight.detach().numpy(), rtol=1e-5, atol=1e-7
        )
        np.testing.assert_allclose(np.array(ours.bias), fused.bias.detach().numpy(), rtol=1e-4, atol=1e-6)
    x = images(2, 64)
    with torch.no_grad():
        wanted = reference(torch.from_numpy(np.array(x).transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(np.array(net(x)), wanted.numpy(), atol=1e-4 * np.abs(wanted.numpy()).max())
