"""The whole room on a network that was trained: discs on noise (synthetic), and where they were drawn."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_cxr.core.labels import label_index
from mlx_cxr.explain.faithfulness import randomization_check
from mlx_cxr.explain.grad_cam import class_activation_maps
from mlx_cxr.explain.localization import localize
from mlx_cxr.models.resnet import ResNet18, ResNetConfig, initialize

SIZE = 64
FINDINGS = (("Edema", 1.5), ("Pneumonia", -1.5))
"""A bright disc and a dark one."""


def draw(n: int, rng: np.random.Generator) -> tuple[mx.array, np.ndarray, np.ndarray]:
    """Images (n, 64, 64, 1), labels (n, 2), masks (n, 2, 64, 64); each disc is there on half of the images."""
    y, x = np.mgrid[:SIZE, :SIZE]
    images = rng.normal(0, 0.4, (n, SIZE, SIZE))
    centres = rng.uniform(10, SIZE - 10, (n, 2, 2, 1, 1))
    labels = rng.random((n, 2)) < 0.5
    masks = (np.hypot(y - centres[:, :, 0], x - centres[:, :, 1]) < 8) & labels[..., None, None]
    for k, (_, brightness) in enumerate(FINDINGS):
        images += brightness * masks[:, k]
    return mx.array(images[..., None].astype(np.float32)), labels, masks


@pytest.fixture(scope="module")
def trained() -> ResNet18:
    rng = np.random.default_rng(0)
    model = ResNet18(ResNetConfig(output_stride=16))
    initialize(model, 0)
    columns = mx.array([label_index(name) for name, _ in FINDINGS])

    def loss(x: mx.array, y: mx.array) -> mx.array:
        return nn.losses.binary_cross_entropy(model(x)[:, columns], y, with_logits=True)

    step, optimizer = nn.value_and_grad(model, loss), optim.AdamW(5e-4)
    for _ in range(60):
        x, labels, _ = draw(12, rng)
        _, gradients = step(x, mx.array(labels.astype(np.float32)))
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state)
    model.eval()
    return model


@pytest.mark.slow
def test_maps_of_a_trained_network_find_what_was_drawn(trained):
    """Within half a cell, which is as exactly as a map of 4 x 4 cells can say it."""
    x, labels, masks = draw(160, np.random.default_rng(1))
    maps = class_activation_maps(trained, x, [name for name, _ in FINDINGS])
    half_a_cell = SIZE / maps.raw.shape[-1] / 2
    for k in range(2):
        assert ((maps.scores[k] > 0) == labels[:, k]).mean() > 0.9
        called = labels[:, k] & (maps.scores[k] > 0)
        patients = np.arange(called.sum())
        found = localize(maps.raw[k, called], masks[called, k], patients, fraction=0.05, tolerance=half_a_cell)
        hit, iou = found.maps.hit.mean(), found.maps.iou.mean()
        for control in (found.random, found.swapped, found.chance):
            assert hit > 2.5 * control.hit.mean()
            assert iou > 2.5 * control.iou.mean()
        assert hit > 1.25 * found.centre.hit.mean()
        assert iou > 1.5 * found.centre.iou.mean()
        strength = maps.raw[k].max(axis=(1, 2))
        assert strength[called].mean() > 2 * strength[~labels[:, k]].mean()


@pytest.mark.slow
def test_maps_of_a_trained_network_depend_on_its_weights(trained):
    x, labels, _ = draw(32, np.random.default_rng(2))
    x = x[mx.array(np.flatnonzero(labels[:, 0])[:10])]
    for name, correlation in randomization_check(trained, x, ["Edema"]).items():
        assert abs(np.nanmean(correlation)) < 0.5, name
