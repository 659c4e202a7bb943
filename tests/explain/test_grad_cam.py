from dataclasses import FrozenInstanceError

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_cxr.core.labels import LABELS, label_index
from mlx_cxr.explain.grad_cam import class_activation_maps, finer_features, maps_of_features
from mlx_cxr.explain.localization import localize
from mlx_cxr.models.resnet import ResNet18, ResNetConfig, initialize

METHODS = ("grad_cam", "grad_cam_pp", "hires_cam")


class ConvHeadNet(nn.Module):
    """A head that is not average pool + linear: its gradient differs from cell to cell."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(7)
        self.stem = mx.array(rng.normal(size=(1, 6)).astype(np.float32))
        self.weight = mx.array(rng.normal(size=(8, 3, 3, 6)).astype(np.float32) * 0.3)
        self.fc = mx.array(rng.normal(size=(8, 14)).astype(np.float32))

    def features(self, x: mx.array) -> mx.array:
        return nn.relu(x @ self.stem)

    def head(self, a: mx.array) -> mx.array:
        return mx.mean(mx.tanh(mx.conv2d(a, self.weight, 1, 1)), axis=(1, 2)) @ self.fc

    def __call__(self, x: mx.array) -> mx.array:
        return self.head(self.features(x))


@pytest.fixture(scope="module")
def resnet() -> ResNet18:
    model = ResNet18(ResNetConfig())
    initialize(model, 3)
    model.eval()
    return model


@pytest.fixture(scope="module")
def conv_head() -> ConvHeadNet:
    model = ConvHeadNet()
    model.eval()
    return model


def images(n: int, size: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, size, size, 1)).astype(np.float32)


def relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(value - reference).max() / np.abs(reference).max())


def torch_maps(torch, a, head, columns):
    """Grad-CAM, Grad-CAM++ and HiResCAM of a torch feature map (N, C, h, w), one backward pass per target.

    Grad-CAM++ here is the paper's own quotient, with g^2 and g^3, in float64.
    """
    found = {method: [] for method in METHODS}
    for column in columns:
        leaf = a.detach().clone().requires_grad_(True)
        (g,) = torch.autograd.grad(head(leaf)[:, column].sum(), leaf)
        found["grad_cam"].append((g.mean((2, 3), keepdim=True) * leaf).sum(1).relu())
        found["hires_cam"].append((g * leaf).sum(1).relu())
        g, wide = g.double(), leaf.double()
        alpha = g**2 / (2 * g**2 + wide.sum((2, 3), keepdim=True) * g**3)
        weights = (torch.nan_to_num(alpha) * g.relu()).sum((2, 3), keepdim=True)
        found["grad_cam_pp"].append((weights * wide).sum(1).relu())
    return {method: torch.stack(maps).detach().numpy() for method, maps in found.items()}


@pytest.mark.parametrize(("in_channels", "output_stride"), [(1, 32), (3, 16)])
def test_resnet_maps_equal_torch_autograd(torch, in_channels, output_stride):
    from torch_reference import TorchResNet18, randomize_batchnorm, to_torch_state

    model = ResNet18(ResNetConfig(in_channels=in_channels, output_stride=output_stride))
    initialize(model, 1)
    randomize_batchnorm(model, 2)
    model.eval()
    reference = TorchResNet18(in_channels, 14, output_stride)
    reference.load_state_dict(to_torch_state(model), strict=True)
    reference.eval()
    x = np.random.default_rng(5).normal(size=(2, 96, 80, in_channels)).astype(np.float32)
    expected = torch_maps(
        torch, reference.features(torch.from_numpy(x.transpose(0, 3, 1, 2))), reference.head, range(14)
    )
    for method in METHODS:
        maps = class_activation_maps(model, mx.array(x), LABELS, method)
        assert maps.raw.shape == expected[method].shape
        assert relative_error(maps.raw, expected[method]) < 1e-4, method
    assert expected["grad_cam"].max() > 0


def test_other_heads_equal_torch_autograd(torch, conv_head):
    weight = torch.from_numpy(np.array(conv_head.weight).transpose(0, 3, 1, 2).copy())
    fc = torch.from_numpy(np.array(conv_head.fc))

    def head(a):
        return torch.tanh(torch.nn.functional.conv2d(a, weight, padding=1)).mean((2, 3)) @ fc

    x = images(2, 9)
    a = torch.from_numpy(np.array(conv_head.features(mx.array(x))).transpose(0, 3, 1, 2).copy())
    expected = torch_maps(torch, a, head, range(14))
    raw = {method: class_activation_maps(conv_head, mx.array(x), LABELS, method).raw for method in METHODS}
    for method in METHODS:
        assert relative_error(raw[method], expected[method]) < 1e-4, method
    assert relative_error(raw["hires_cam"], raw["grad_cam"]) > 0.1


def test_average_pool_and_linear_has_the_closed_form(resnet):
    x = mx.array(images(3))
    a = np.array(resnet.features(x)).astype(np.float64)
    weight, bias = np.array(resnet.fc.weight).astype(np.float64), np.array(resnet.fc.bias)
    signed = np.einsum("kc,nhwc->knhw", weight, a) / (a.shape[1] * a.shape[2])
    for method in ("grad_cam", "hires_cam"):
        maps = class_activation_maps(resnet, x, LABELS, method)
        assert relative_error(maps.raw, np.maximum(signed, 0)) < 1e-6
    np.testing.assert_allclose(signed.sum(axis=(2, 3)).T + bias, maps.logits, atol=1e-5)
    np.testing.assert_array_equal(maps.scores, maps.logits.T)


def test_contrast_is_the_attribution_of_the_logit_above_the_baselines(resnet):
    """Integrated gradients of a linear head along a straight path: they sum to the difference of the logits."""
    rng = np.random.default_rng(5)
    a, baseline = (np.abs(rng.normal(size=(*shape, 512))).astype(np.float32) for shape in ((3, 4, 4), (4, 4)))
    weights = np.array(resnet.fc.weight)[label_index("Edema")]
    both = [
        maps_of_features(resnet, mx.array(a), [target], "contrast_cam", mx.array(baseline)).raw[0]
        for target in (lambda logits: logits[:, label_index("Edema")], lambda logits: -logits[:, label_index("Edema")])
    ]
    signed = both[0] - both[1]
    np.testing.assert_allclose(signed, ((a - baseline) @ weights) / 16, rtol=1e-4, atol=1e-5)
    logits = [np.array(resnet.head(mx.array(x)))[:, label_index("Edema")] for x in (a, baseline[None])]
    np.testing.assert_allclose(signed.sum(axis=(1, 2)), logits[0] - logits[1], rtol=1e-3, atol=1e-4)
    same = maps_of_features(resnet, mx.array(baseline)[None], LABELS[1:], "contrast_cam", mx.array(baseline))
    assert not same.raw.any(), "the mean image has no evidence"
    for unfit in (None, mx.array(baseline[:2])):
        with pytest.raises(ValueError, match=r"contrast_cam needs a baseline \(4, 4, 512\)"):
            maps_of_features(resnet, mx.array(a), ["Edema"], "contrast_cam", unfit)


def test_finer_features_put_every_cell_at_its_pixel():
    """A trunk that takes one pixel in four, and so one in two in the end; the last shift sees the repeated border."""
    pixels = np.arange(2 * 8 * 12).reshape(2, 8, 12)
    fine = np.array(finer_features(lambda x: x[:, 3::4, 3::4, None], mx.array(pixels), 4))[..., 0]
    rows, columns = np.minimum(np.arange(4) * 2 + 3, 7), np.minimum(np.arange(6) * 2 + 3, 11)
    np.testing.assert_array_equal(fine, pixels[:, rows][:, :, columns])


def test_grad_cam_pp_has_the_closed_form_of_a_linear_head(resnet):
    x = mx.array(images(2))
    a = np.array(resnet.features(x)).astype(np.float64)
    g = np.maximum(np.array(resnet.fc.weight).astype(np.float64) / (a.shape[1] * a.shape[2]), 0)
    total = a.sum(axis=(1, 2))
    weights = a.shape[1] * a.shape[2] * g[:, None] / (2 + g[:, None] * total[None])
    expected = np.einsum("knc,nhwc->knhw", weights, a)
    assert relative_error(class_activation_maps(resnet, x, LABELS, "grad_cam_pp").raw, expected) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_one_pass_equals_single_labels_and_single_images(conv_head, method):
    x = images(3, 8)
    together = class_activation_maps(conv_head, mx.array(x), LABELS, method).raw
    for k, label in enumerate(LABELS):
        alone = class_activation_maps(conv_head, mx.array(x), [label], method).raw
        np.testing.assert_allclose(together[k : k + 1], alone, atol=1e-6)
    for n in range(3):
        alone = class_activation_maps(conv_head, mx.array(x[n : n + 1]), LABELS, method).raw
        np.testing.assert_allclose(together[:, n : n + 1], alone, atol=1e-6)


def test_targets_are_any_callable(resnet):
    x = mx.array(images(2))
    edema, pneumonia = label_index("Edema"), label_index("Pneumonia")

    def doubled(logits: mx.array) -> mx.array:
        return 2 * logits[:, edema]

    def probability(logits: mx.array) -> mx.array:
        return mx.sigmoid(logits[:, edema] / 2)

    def difference(logits: mx.array) -> mx.array:
        return logits[:, pneumonia] - logits[:, edema]

    maps = class_activation_maps(resnet, x, ["Edema", doubled, probability, difference])
    assert maps.targets == ("Edema", "doubled", "probability", "difference")
    assert maps.raw.max(axis=(1, 2, 3)).min() > 0
    np.testing.assert_allclose(maps.raw[1], 2 * maps.raw[0], rtol=1e-5)
    p = 1 / (1 + np.exp(-maps.logits[:, edema] / 2))
    np.testing.assert_allclose(maps.scores[2], p, rtol=1e-5)
    np.testing.assert_allclose(maps.raw[2], maps.raw[0] * (p * (1 - p) / 2)[:, None, None], rtol=1e-4)
    a = np.array(resnet.features(x))
    weight = np.array(resnet.fc.weight[pneumonia] - resnet.fc.weight[edema])
    expected = np.maximum(a @ weight, 0) / (a.shape[1] * a.shape[2])
    assert relative_error(maps.raw[3], expected) < 1e-5


def test_a_network_that_looks_at_one_corner_is_seen_to():
    class CornerNet(nn.Module):
        """Mean of the image's brightness within its upper right quarter is the logit of Edema."""

        def features(self, x: mx.array) -> mx.array:
            return nn.relu(x)

        def head(self, a: mx.array) -> mx.array:
            h, w = a.shape[1] // 2, a.shape[2] // 2
            edema = mx.mean(a[:, :h, w:], axis=(1, 2))
            return mx.concatenate([mx.zeros((a.shape[0], 3)), edema, mx.zeros((a.shape[0], 10))], axis=1)

    model = CornerNet()
    model.eval()
    x = mx.ones((1, 8, 8, 1))
    maps = class_activation_maps(model, x, ["Edema", "Pneumonia"], "hires_cam")
    expected = np.zeros((8, 8))
    expected[:4, 4:] = 1 / 16
    np.testing.assert_allclose(maps.raw[0, 0], expected, atol=1e-7)
    assert not maps.raw[1].any()
    scores = localize(maps.raw[0], expected[None] > 0, ["p"]).maps
    assert (scores.hit.item(), scores.iou_area.item(), scores.mass.item()) == (1.0, 1.0, 1.0)


def test_half_precision_weights_give_float32_maps(resnet):
    model = ResNet18(ResNetConfig())
    model.load_weights(list(tree_flatten(resnet.parameters())))
    model.set_dtype(mx.float16)
    model.eval()
    x = mx.array(images(2))
    full = class_activation_maps(resnet, x, LABELS).raw
    half = class_activation_maps(model, x.astype(mx.float16), LABELS)
    assert half.raw.dtype == half.logits.dtype == np.float32
    assert relative_error(half.raw, full) < 0.02


def test_the_model_is_left_as_it_was(resnet):
    before = {name: np.array(value) for name, value in tree_flatten(resnet.parameters())}
    maps = class_activation_maps(resnet, mx.array(images(2)), LABELS)
    for name, value in tree_flatten(resnet.parameters()):
        np.testing.assert_array_equal(before[name], np.array(value), err_msg=name)
    assert not resnet.training
    with pytest.raises(FrozenInstanceError):
        maps.method = "other"


def test_training_mode_is_refused_in_the_whole_and_in_a_part():
    model = ResNet18(ResNetConfig())
    x = mx.array(images(1))
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        class_activation_maps(model, x, ["Edema"])
    model.eval()
    model.layer4[1].bn2.train()
    with pytest.raises(RuntimeError, match="a part of it"):
        class_activation_maps(model, x, ["Edema"])
    assert model.layer4[1].bn2.training


def test_bad_input_is_named(resnet, conv_head):
    x = images(2)
    with pytest.raises(KeyError, match="score_cam"):
        class_activation_maps(resnet, mx.array(x), ["Edema"], "score_cam")
    with pytest.raises(ValueError, match="preprocess"):
        class_activation_maps(resnet, mx.zeros((1, 64, 64, 1), dtype=mx.uint8), ["Edema"])
    with pytest.raises(ValueError, match="shape"):
        class_activation_maps(resnet, mx.array(x), [lambda logits: logits[0]])
    x[1, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="film 1 of the batch"):
        class_activation_maps(resnet, mx.array(x), ["Edema"])

    class OneNan(ConvHeadNet):
        def head(self, a: mx.array) -> mx.array:
            spoilt = np.zeros((3, 14), np.float32)
            spoilt[2, 5] = np.nan
            return super().head(a) + mx.array(spoilt)

    one = OneNan()
    one.eval()
    with pytest.raises(ValueError, match="film 2 of the batch"):
        class_activation_maps(one, mx.array(images(3, 8)), ["Edema"])

    class Signed(ConvHeadNet):
        def features(self, x: mx.array) -> mx.array:
            return x @ self.stem

    signed = Signed()
    signed.eval()
    with pytest.raises(ValueError, match="nowhere negative"):
        class_activation_maps(signed, mx.array(images(1, 8)), ["Edema"], "grad_cam_pp")
