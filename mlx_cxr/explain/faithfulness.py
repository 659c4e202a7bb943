"""Parameter randomization: a map that explains learned weights must change when these are shuffled.

Adebayo et al., arXiv:1810.03292. That it does change does not say that it is right.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from scipy.stats import rankdata

from mlx_cxr.explain.grad_cam import Method, class_activation_maps
from mlx_cxr.explain.targets import Target, as_targets


def randomize_parameters(model: nn.Module, parts: Sequence[str], seed: int) -> nn.Module:
    """A copy of the model with the entries of some parameters shuffled; the model itself is left alone.

    Shuffling within each tensor keeps its scale and signs, and variances positive, so that only what was
    learned is lost; Adebayo et al. draw from the initializer instead.

    Args:
        parts: names or prefixes, such as `fc` or `layer4`; with their BatchNorm.

    Raises:
        KeyError: a part names no parameter of the model.
    """
    rng = np.random.default_rng(seed)
    shuffled = copy.deepcopy(model)
    parameters = dict(tree_flatten(shuffled.parameters()))
    for part in parts:
        names = [name for name in parameters if name == part or name.startswith(f"{part}.")]
        if not names:
            roots = ", ".join(dict.fromkeys(name.split(".")[0] for name in parameters))
            raise KeyError(f"the model has no parameter under {part!r}; it has: {roots}")
        weights = [(name, np.array(parameters[name].astype(mx.float32))) for name in names]
        changed = [(name, rng.permutation(w.ravel()).reshape(w.shape)) for name, w in weights]
        shuffled.load_weights([(name, mx.array(w).astype(parameters[name].dtype)) for name, w in changed], strict=False)
    return shuffled


def randomization_check(
    model: nn.Module,
    x: mx.array,
    targets: Iterable[Target | str],
    cascade: Sequence[str] = ("fc", "layer4"),
    method: Method = "grad_cam",
    draws: int = 5,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Rank correlation of each map with that of a network whose last layers were randomized.

    The maps are compared before their ReLU: a network with random weights seldom speaks for a rare finding
    anywhere, and a map of zeros correlates with nothing. They are taken as the target's map less the map of minus
    the target, which for Grad-CAM and HiResCAM is the map before its ReLU exactly.

    Args:
        model: in evaluation mode; left alone.
        x: float (N, H, W, channels), as `models.resnet.preprocess` makes it.
        targets: as for `class_activation_maps`.
        cascade: parameter prefixes, from the output down; each step randomizes one more. The defaults are
            ResNet-18's.
        method: which maps.
        draws: independent shuffles. One shuffle gives all images of a target the same random weights, and so
            correlations that share a sign: only their mean over draws says something.
        seed: of the shuffles.

    Returns:
        For `fc`, `fc+layer4`, …: float64 (draws, K, N), Spearman's correlation over the cells of the map,
        ties averaged; NaN where one of the two maps is constant.

    Raises:
        RuntimeError: the model is in training mode.
        KeyError: a part, finding or method that is not there.
    """
    targets = as_targets(targets)
    before = _signed_maps(model, x, targets, method)
    result = {}
    for depth in range(1, len(cascade) + 1):
        shuffled = (randomize_parameters(model, cascade[:depth], seed + draw) for draw in range(draws))
        after = [_signed_maps(other, x, targets, method) for other in shuffled]
        result["+".join(cascade[:depth])] = np.stack([_spearman(before, maps) for maps in after])
    return result


def _signed_maps(model: nn.Module, x: mx.array, targets: Sequence[Target], method: Method) -> np.ndarray:
    """(K, N, h, w): the map of each target less that of minus the target."""

    def against(target: Target) -> Target:
        return lambda logits: -target(logits)

    both = class_activation_maps(model, x, [*targets, *map(against, targets)], method).raw
    return both[: len(targets)] - both[len(targets) :]


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation over the last two axes, in float64; NaN where either is constant."""
    ranks = [rankdata(x.reshape(*x.shape[:-2], -1), axis=-1) for x in (a, b)]
    a, b = (r - r.mean(axis=-1, keepdims=True) for r in ranks)
    spread = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    return np.divide((a * b).sum(axis=-1), spread, out=np.full(spread.shape, np.nan), where=spread > 0)
