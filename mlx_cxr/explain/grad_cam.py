"""Class-activation maps: one pass of the trunk, then all targets of all images in one pass of the head.

With A the last feature map (h, w, C), S a target's score and g = dS/dA, all float32:

- `grad_cam`: ReLU(sum_c mean_hw(g_c) A_c). Selvaraju et al., arXiv:1610.02391.
- `hires_cam`: ReLU(sum_c g_c * A_c), cell by cell. Draelos and Carin, arXiv:2011.08891.
- `grad_cam_pp`: as Grad-CAM with weights sum_hw(alpha * ReLU(g)), alpha = 1 / (2 + g sum_hw(A)).
  Chattopadhyay et al., arXiv:1710.11063, equation 19 divided through by g^2; as there, the higher derivatives
  are those of exp(S) with S piecewise linear in A. The factor exp(S), common to a map, is left out, as it
  would make maps of different images incomparable. It needs A >= 0, which a ReLU before the head gives.

- `contrast_cam`: Grad-CAM of A less a baseline, the mean feature map of images like those at hand, cell by cell. With
  average pool + linear its cells sum, before the ReLU, to the logit less the baseline's: the attribution of DeepLIFT
  and of integrated gradients against that baseline (Shrikumar et al., arXiv:1704.02685; Sundararajan et al.,
  arXiv:1703.01365). What raises the score at the same place on every image is no evidence on this one, and is left out.

For average pool + linear, g_c is w_c / (h w) everywhere: Grad-CAM and HiResCAM then agree, and the map's sum
is the logit less its bias wherever the ReLU cuts nothing. Maps of such a network say which cells raise the
score, not that the finding is there: show them through `maps.scale_maps` and gated by the tuned threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import mlx.core as mx
import numpy as np

from mlx_cxr.explain.targets import Target, as_targets

Method = Literal["contrast_cam", "grad_cam", "grad_cam_pp", "hires_cam"]
SHIFTS = 2
"""Cells of a finer map to a cell of the feature map, on each axis."""


class SplitNetwork(Protocol):
    """A network cut at the feature map that is explained; `models.resnet.ResNet18` is one."""

    training: bool

    def features(self, x: mx.array) -> mx.array:
        """Input (N, H, W, channels) -> feature map (N, h, w, C)."""

    def head(self, a: mx.array) -> mx.array:
        """Feature map (N, h, w, C) -> logits (N, 14), each image's from its own map alone."""

    def modules(self) -> list:
        """All modules, as `mlx.nn.Module.modules`."""


@dataclass(frozen=True)
class Maps:
    """Class-activation maps at the resolution of the feature map.

    Attributes:
        raw: float32 (K, N, h, w), >= 0, in units of the target (logits, unless it is a probability) per cell;
            not scaled, so that images and batches can be compared.
        logits: float32 (N, 14) of the same forward pass.
        scores: float32 (K, N), the targets' values.
        targets: K names.
        method: the method's name.
    """

    raw: np.ndarray
    logits: np.ndarray
    scores: np.ndarray
    targets: tuple[str, ...]
    method: str


def class_activation_maps(
    model: SplitNetwork,
    x: mx.array,
    targets: Iterable[Target | str],
    method: Method = "grad_cam",
    baseline: mx.array | None = None,
) -> Maps:
    """Maps of K targets on N images.

    Args:
        model: in evaluation mode; neither it nor its mode is touched.
        x: float (N, H, W, channels), as `models.resnet.preprocess` makes it.
        targets: callables from logits (N, 14) to (N,), or names of findings (their logits).
        method: `grad_cam`, `grad_cam_pp`, `hires_cam` or `contrast_cam`.
        baseline: float (h, w, C), for `contrast_cam` alone.

    Returns:
        The maps, evaluated. Memory peaks near K * N * h * w * C * 4 bytes for each gradient held.

    Raises:
        RuntimeError: the model is in training mode, where dropout and batch statistics would blur the maps.
        KeyError: an unknown finding or method.
        ValueError: a target does not give (N,), `x` is integer, logits are not finite (names the image), Grad-CAM++
            meets a negative feature map, or `contrast_cam` has no baseline, or one of another shape.
    """
    _check_evaluation_mode(model)
    if not mx.issubdtype(x.dtype, mx.floating):
        raise ValueError(f"x is {x.dtype}; pass the films through models.resnet.preprocess first")
    return maps_of_features(model, model.features(x), targets, method, baseline)


def maps_of_features(
    model: SplitNetwork,
    a: mx.array,
    targets: Iterable[Target | str],
    method: Method = "grad_cam",
    baseline: mx.array | None = None,
) -> Maps:
    """As `class_activation_maps`, from what the trunk has made of the images already.

    `a` is float (N, h, w, C), as `model.features` makes it; the other arguments and the errors are the same.
    """
    _check_evaluation_mode(model)
    if method not in _METHODS:
        raise KeyError(f"unknown method {method!r}; there are: {', '.join(_METHODS)}")
    targets = as_targets(targets)
    a = a.astype(mx.float32)
    if method == "contrast_cam" and (baseline is None or baseline.shape != a.shape[1:]):
        raise ValueError(
            f"contrast_cam needs a baseline {a.shape[1:]}, not {None if baseline is None else baseline.shape}"
        )
    logits = model.head(a)
    cotangents, scores = _target_gradients(targets, logits)

    def pull_back(cotangent: mx.array) -> mx.array:
        return mx.vjp(model.head, [a], [cotangent])[1][0]

    # The gradient of a mean is a broadcast view, and reducing one takes nine times as long.
    gradients = mx.contiguous(mx.vmap(pull_back)(cotangents))
    evidence = a - baseline if method == "contrast_cam" else a
    raw = mx.maximum(_METHODS[method](evidence, gradients), 0.0)
    lowest = mx.min(a)
    mx.eval(raw, logits, scores, lowest)
    if method == "grad_cam_pp" and lowest.item() < 0:
        raise ValueError("Grad-CAM++ needs a feature map that is nowhere negative; use grad_cam or hires_cam here")
    result = Maps(
        raw=np.array(raw),
        logits=np.array(logits.astype(mx.float32)),
        scores=np.array(scores.astype(mx.float32)),
        targets=tuple(_name(target) for target in targets),
        method=method,
    )
    finite = np.isfinite(result.logits).all(axis=1)
    if not finite.all():
        raise ValueError(f"film {int(np.argmin(finite))} of the batch: logits are not finite; check weights and input")
    return result


def finer_features(trunk: Callable[[mx.array], mx.array], images: mx.array, stride: int) -> mx.array:
    """Feature maps of the images shifted by parts of a stride, interleaved: `SHIFTS` times the cells on each axis.

    Shift-and-stitch (Long et al., arXiv:1411.4038, section 3.2): without its borders, the map of the same network with
    less stride. Cell i looks at pixel `i * stride / SHIFTS`, and every `SHIFTS`-th cell is one of the plain map. An
    average over the cells is that over the shifts, so a linear head gives the shifts' mean logits.

    Args:
        trunk: images (N, H, W) to feature maps (N, h, w, C), evaluated.
        images: (N, H, W); what lies behind the last row and column is taken to be as they are.
        stride: pixels per cell of the trunk; a multiple of `SHIFTS`.

    Returns:
        (N, h * SHIFTS, w * SHIFTS, C).
    """
    step, (_, height, width) = stride // SHIFTS, images.shape
    reach = step * (SHIFTS - 1)
    wide = mx.pad(images, ((0, 0), (0, reach), (0, reach)), mode="edge")
    shifts = [step * k for k in range(SHIFTS)]
    rows = [mx.stack([trunk(wide[:, y : y + height, x : x + width]) for x in shifts], axis=3) for y in shifts]
    a = mx.stack(rows, axis=2)
    n, h, _, w, _, channels = a.shape
    return a.reshape(n, h * SHIFTS, w * SHIFTS, channels)


def _check_evaluation_mode(model: SplitNetwork) -> None:
    if any(module.training for module in model.modules()):
        raise RuntimeError("the model, or a part of it, is in training mode: call model.eval() before explaining it")


def _name(target: Target) -> str:
    return getattr(target, "__name__", None) or str(target)


def _target_gradients(targets: Sequence[Target], logits: mx.array) -> tuple[mx.array, mx.array]:
    """Gradient of every target with respect to the logits, (K, N, 14), and the targets' values, (K, N)."""

    def scored(rows: mx.array) -> tuple[mx.array, mx.array]:
        values = [target(rows[k]) for k, target in enumerate(targets)]
        for target, value in zip(targets, values, strict=True):
            if value.shape != (logits.shape[0],):
                raise ValueError(f"target {_name(target)} gave shape {value.shape}, expected ({logits.shape[0]},)")
        scores = mx.stack(values)
        return mx.sum(scores), scores

    rows = mx.broadcast_to(logits, (len(targets), *logits.shape))
    (_, scores), gradients = mx.value_and_grad(scored)(rows)
    return gradients, scores


def _channel_weighted(a: mx.array, weights: mx.array) -> mx.array:
    """(N, h, w, C) summed over channels with weights (K, N, C) -> (K, N, h, w), as one product per image."""
    n, h, w, c = a.shape
    maps = weights.transpose(1, 0, 2) @ a.reshape(n, h * w, c).swapaxes(1, 2)
    return maps.reshape(n, -1, h, w).swapaxes(0, 1)


def _grad_cam(a: mx.array, gradients: mx.array) -> mx.array:
    return _channel_weighted(a, mx.mean(gradients, axis=(2, 3)))


def _grad_cam_pp(a: mx.array, gradients: mx.array) -> mx.array:
    positive = mx.maximum(gradients, 0.0)
    alpha = 1.0 / (2.0 + positive * mx.sum(a, axis=(1, 2), keepdims=True))
    return _channel_weighted(a, mx.sum(alpha * positive, axis=(2, 3)))


def _hires_cam(a: mx.array, gradients: mx.array) -> mx.array:
    return mx.sum(gradients * a, axis=-1)


_METHODS: dict[str, Callable[[mx.array, mx.array], mx.array]] = {
    "contrast_cam": _grad_cam,
    "grad_cam": _grad_cam,
    "grad_cam_pp": _grad_cam_pp,
    "hires_cam": _hires_cam,
}
