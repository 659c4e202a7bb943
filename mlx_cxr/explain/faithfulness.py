"""Whether a map shows what the network used: deletion and insertion curves, and parameter randomization.

Deletion blanks pixels from the map's strongest down and insertion brings them back into a blurred image; a
faithful map makes the score fall early and rise early (Petsiuk et al., RISE, arXiv:1806.07421). Both are read
beside random maps on the same images: the absolute area depends on the finding. Randomizing learned weights
must change a map that explains them (Adebayo et al., arXiv:1810.03292). Neither says that it is right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from scipy.integrate import trapezoid
from scipy.stats import rankdata

from mlx_cxr.explain.grad_cam import Method, SplitNetwork, class_activation_maps
from mlx_cxr.explain.maps import random_maps, upsample
from mlx_cxr.explain.targets import Target, as_targets


@dataclass(frozen=True)
class Curves:
    """Scores of N images while pixels are taken away and brought in, for the map and for random maps.

    Attributes:
        fractions: float64 (T,), share of pixels changed, from 0 to 1.
        deletion: float32 (T, N); lower is better for the map.
        insertion: float32 (T, N); higher is better for the map.
        random_deletion: float32 (T, N), averaged over the draws.
        random_insertion: float32 (T, N), averaged over the draws.
    """

    fractions: np.ndarray
    deletion: np.ndarray
    insertion: np.ndarray
    random_deletion: np.ndarray
    random_insertion: np.ndarray

    def areas(self) -> dict[str, np.ndarray]:
        """Area under each curve (trapezoid), float64 (N,), in units of the target."""
        names = ("deletion", "insertion", "random_deletion", "random_insertion")
        return {name: trapezoid(getattr(self, name), self.fractions, axis=0) for name in names}

    def summary(self) -> dict[str, float | int]:
        """JSON-ready: mean areas, and the share of images on which the map beats the random maps."""
        areas = self.areas()
        return {
            "n": self.deletion.shape[1],
            **{name: float(area.mean()) for name, area in areas.items()},
            "deletion_better": float((areas["deletion"] < areas["random_deletion"]).mean()),
            "insertion_better": float((areas["insertion"] > areas["random_insertion"]).mean()),
        }


def faithfulness_curves(
    model: SplitNetwork,
    x: mx.array,
    raw: np.ndarray,
    target: Target,
    steps: int = 20,
    random_draws: int = 2,
    blur: float = 5 / 224,
    seed: int = 0,
) -> Curves:
    """Deletion and insertion of one target, for its maps and for random maps of the same resolution.

    A deleted pixel becomes 0, which after `preprocess` is ImageNet's mean gray; insertion starts from the
    image under a Gaussian blur. It costs 2 (steps + 1) (1 + random_draws) forward passes of the batch.

    Args:
        model: in evaluation mode.
        x: float (N, H, W, channels), as `models.resnet.preprocess` makes it.
        raw: float (N, h, w), that target's part of `Maps.raw`.
        target: usually `LabelProbability`; logits have no bounds, so their areas compare less well.
        steps: changes of equal size from none to all pixels.
        random_draws: random maps per image.
        blur: standard deviation as a share of the image's height; RISE's 5 px at 224.
        seed: of the random maps and of the order among equal pixels.

    Returns:
        The curves.

    Raises:
        RuntimeError: the model is in training mode.
        ValueError: shapes do not fit, fewer than one step or draw, or a blur that is not positive.
    """
    if any(module.training for module in model.modules()):
        raise RuntimeError("the model, or a part of it, is in training mode: call model.eval() first")
    if raw.ndim != 3 or x.ndim != 4 or len(raw) != x.shape[0]:
        raise ValueError(f"maps {raw.shape} and films {x.shape}; expected (N, h, w) and (N, H, W, channels)")
    if steps < 1 or random_draws < 1 or blur <= 0:
        raise ValueError(f"steps {steps}, random_draws {random_draws} or blur {blur} is out of range")
    size = x.shape[1], x.shape[2]
    blank, blurred = mx.zeros_like(x), gaussian_blur(x, blur * size[0])
    fractions = np.linspace(0.0, 1.0, steps + 1)

    def score(images: mx.array) -> mx.array:
        return target(model.head(model.features(images)))

    def both(maps: np.ndarray, tie_seed: int) -> tuple[np.ndarray, np.ndarray]:
        ranks = mx.array(_ranks(upsample(maps, size), tie_seed))
        return _curve(score, x, blank, ranks, fractions), _curve(score, blurred, x, ranks, fractions)

    deletion, insertion = both(raw, seed)
    draws = [both(random_maps(raw.shape, seed + 1 + k), seed + 1 + k) for k in range(random_draws)]
    return Curves(
        fractions=fractions,
        deletion=deletion,
        insertion=insertion,
        random_deletion=np.mean([draw[0] for draw in draws], axis=0),
        random_insertion=np.mean([draw[1] for draw in draws], axis=0),
    )


def _ranks(heats: np.ndarray, seed: int) -> np.ndarray:
    """Each pixel's place in its image, strongest first, as a share in [0, 1): float32 (N, H, W).

    Equal pixels, such as the many zeros behind a ReLU, come in random order: in reading order they would
    favour one corner of the image.
    """
    n, pixels = len(heats), heats[0].size
    ties = np.random.default_rng(seed).random((n, pixels))
    order = np.lexsort((ties, -heats.reshape(n, pixels)), axis=-1)
    ranks = np.empty((n, pixels), dtype=np.float32)
    np.put_along_axis(ranks, order, np.arange(pixels, dtype=np.float32)[None] / pixels, axis=1)
    return ranks.reshape(heats.shape)


def _curve(
    score: Callable[[mx.array], mx.array],
    start: mx.array,
    end: mx.array,
    ranks: mx.array,
    fractions: np.ndarray,
) -> np.ndarray:
    rows = []
    for fraction in fractions:
        changed = (ranks < float(fraction))[..., None]
        rows.append(np.array(score(mx.where(changed, end, start)).astype(mx.float32)))
    return np.stack(rows)


def gaussian_blur(x: mx.array, sigma: float) -> mx.array:
    """Gaussian blur of images (N, H, W, channels), `sigma` in pixels, renormalized at the edges."""

    def kernel(side: int) -> mx.array:
        at = np.arange(side)
        weights = np.exp(-0.5 * ((at[:, None] - at[None]) / sigma) ** 2)
        return mx.array((weights / weights.sum(axis=1, keepdims=True)).astype(np.float32))

    planes = x.transpose(0, 3, 1, 2).astype(mx.float32)
    return (kernel(x.shape[1]) @ planes @ kernel(x.shape[2]).T).transpose(0, 2, 3, 1).astype(x.dtype)


def randomize_parameters(model: nn.Module, parts: Sequence[str], seed: int) -> nn.Module:
    """A copy of the model with the entries of some parameters shuffled; the model itself is left alone.

    Shuffling within each tensor keeps its scale and signs, and variances positive, so that only what was
    learned is lost; Adebayo et al. draw from the initializer instead.

    Args:
        model: any MLX module.
        parts: names or prefixes, such as `fc` or `layer4`; with their BatchNorm.
        seed: of the shuffle.

    Raises:
        KeyError: a part names no parameter of the model.
    """
    rng = np.random.default_rng(seed)
    shuffled = copy.deepcopy(model)
    parameters = dict(tree_flatten(shuffled.parameters()))
    for part in parts:
        names = [name for name in parameters if name == part or name.startswith(f"{part}.")]
        if not names:
            raise KeyError(f"the model has no parameter under {part!r}; it has: {_roots(parameters)}")
        weights = [(name, np.array(parameters[name].astype(mx.float32))) for name in names]
        changed = [(name, rng.permutation(w.ravel()).reshape(w.shape)) for name, w in weights]
        shuffled.load_weights([(name, mx.array(w).astype(parameters[name].dtype)) for name, w in changed], strict=False)
    return shuffled


def _roots(parameters: dict[str, mx.array]) -> str:
    return ", ".join(dict.fromkeys(name.split(".")[0] for name in parameters))


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
    anywhere, and a map of zeros correlates with nothing. For Grad-CAM and HiResCAM that is the target's map less
    the map of minus the target, exactly; for Grad-CAM++ it is that difference.

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
    """(K, N, h, w): what speaks for each target, less what speaks against it."""

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
