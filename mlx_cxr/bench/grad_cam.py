"""Grad-CAM of all 14 findings at once, against one backward pass of the network for each, and against no maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import mlx.core as mx
import numpy as np

from mlx_cxr.bench.contenders import Contender, Row, compare, largest_difference, stock_operations
from mlx_cxr.core import device
from mlx_cxr.core.labels import LABELS
from mlx_cxr.explain.grad_cam import Maps, class_activation_maps
from mlx_cxr.models.resnet import ResNet18
from mlx_cxr.ops.streams import batch_parallel

SECTION = "grad_cam"
FORWARD, AT_ONCE, ONE_BY_ONE = "plain forward, no maps", "14 maps, one pass", "14 maps, a backward pass each"
TOLERANCE = 1e-3
"""Largest difference of maps, as a share of the highest value."""


def measure(model: ResNet18, size: int, batch_sizes: tuple[int, ...], budget: float, seed: int = 0) -> list[Row]:
    """Compare the maps and time them, in float32.

    Args:
        model: in evaluation mode.
        size: side of the images in pixels.
        budget: seconds for all of it.
    """
    rows, known = [], {}
    for images in sorted(batch_sizes):
        host = np.random.default_rng([seed, images]).normal(size=(images, size, size, model.config.in_channels))
        x = mx.array(host.astype(np.float32))
        one_by_one = partial(maps_one_by_one, model, x)
        # Maps of absent findings are empty, and would agree with anything.
        likely = np.argsort(np.array(model(x)).sum(axis=0))[-2:]
        with stock_operations():
            reference = one_by_one(labels=likely)
        at_once = partial(class_activation_maps, model, x, LABELS)

        def difference(
            at_once: Callable[[], Maps] = at_once, wanted: np.ndarray = reference, likely: np.ndarray = likely
        ) -> float:
            highest = max(float(wanted.max()), 1e-12)
            return largest_difference(at_once().raw[likely] / highest, wanted / highest)

        contenders = [
            _contender(FORWARD, lambda x=x: mx.eval(model(x)), None, images),
            _contender(AT_ONCE, at_once, difference, images),
            _contender(ONE_BY_ONE, one_by_one, None, images),
        ]
        # As `batch_parallel` leaves BLAS one thread, a single image is better off without.
        with batch_parallel() if images > 1 else nullcontext():
            rows += compare(SECTION, contenders, budget / len(batch_sizes), None, known, seed)
    return rows


def maps_one_by_one(model: ResNet18, x: mx.array, labels: Sequence[int] = range(len(LABELS))) -> np.ndarray:
    """Grad-CAM as it is done with hooks: for each finding forward, and backward through the whole network.

    Args:
        x: (N, H, W, channels).
        labels: places of K findings.

    Returns:
        float32 (K, N, h, w), not scaled.
    """
    maps = []
    for label in labels:
        a = model.features(x)

        def score(image: mx.array, shift: mx.array, label: int = int(label)) -> mx.array:
            return model.head(model.features(image) + shift)[:, label]

        _, (dx, gradient) = mx.vjp(score, [x, mx.zeros(a.shape)], [mx.ones(x.shape[0])])
        raised = mx.maximum(mx.sum(mx.mean(gradient, axis=(1, 2), keepdims=True) * a, axis=-1), 0)
        mx.eval(raised, dx)
        maps.append(np.array(raised))
    return np.stack(maps)


def _contender(name: str, call: Callable[[], object], difference: Callable[[], float] | None, images: int) -> Contender:
    return Contender(name, "mlx", device.device_kind(), "float32", call, difference, TOLERANCE, images)
