"""Size and scale of maps once they are made, and the random control beside them. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

REFERENCE_QUANTILE = 0.99
"""Of a map's maximum over the validation images: what counts as full strength."""


@dataclass(frozen=True)
class ScaledMaps:
    """Maps of K findings on N images, with the scale that they are shown on.

    Attributes:
        labels: K findings.
        raw: float32 (K, N, h, w), as `Maps.raw`.
        logits: float32 (N, 14), per image.
        reference: float32 (K,) of `fit_reference`; NaN where the maps are zero on all of validation.
        method: name of the map method.
    """

    labels: tuple[str, ...]
    raw: np.ndarray
    logits: np.ndarray
    reference: np.ndarray
    method: str

    def heat(self, label: str, image: int) -> np.ndarray:
        """float32 (h, w): one map as shares of its reference, as `scale_maps`."""
        k = self.labels.index(label)
        return scale_maps(self.raw[k : k + 1, image], self.reference[k : k + 1])[0]


def random_maps(shape: Sequence[int], seed: int) -> np.ndarray:
    """The control: maps of the same resolution that know nothing of the image, uniform in [0, 1) cell by cell.

    Upsampled like a real map they are as smooth as one, so a difference in score is not one of smoothness.

    `shape` is (..., h, w), usually a real map's `raw.shape`; the result is float32.
    """
    return np.random.default_rng(seed).random(tuple(shape), dtype=np.float32)


def upsample(maps: np.ndarray, size: int | tuple[int, int], image: int | tuple[int, int] | None = None) -> np.ndarray:
    """Bilinear resize that puts every cell where the network looked: cell i at image pixel `stride * i`.

    In a ResNet each layer with stride pads as much before as after an odd kernel, so the receptive field of cell i of
    the last map is centred on pixel `stride * i` (Araujo et al., Distill 2019, on receptive field arithmetic; a test
    follows the gradient). The usual resize takes cells for tiles and centres cell i on `stride * i + (stride - 1) / 2`:
    half a cell too far to the right and down, 7.5 pixels at stride 16. What lies beyond the last cell's centre takes
    that cell's value.

    Args:
        maps: float (..., h, w).
        size: (height, width) of the result, or one number for a square.
        image: (height, width) of the images that the maps were made of, or one number; None means `size`. The stride is
            taken as image over map, which is exact where the image's side is a multiple of it.

    Returns:
        float32 (..., height, width). It does not average when shrinking.

    Raises:
        ValueError: fewer than two axes, an empty map, or a size below 1.
    """
    height, width = (size, size) if isinstance(size, int) else size
    image_height, image_width = (
        (height, width) if image is None else (image, image) if isinstance(image, int) else image
    )
    if len(maps.shape) < 2 or 0 in maps.shape[-2:] or min(height, width, image_height, image_width) < 1:
        raise ValueError(f"cannot resize maps of shape {tuple(maps.shape)} to {height} x {width} pixels")
    rows = _bilinear_matrix(maps.shape[-2], height, image_height)
    columns = _bilinear_matrix(maps.shape[-1], width, image_width)
    return rows @ np.asarray(maps, dtype=np.float32) @ columns.T


def _bilinear_matrix(old: int, new: int, image: int) -> np.ndarray:
    """(new, old) weights: output pixel i is image pixel (i + 1/2) image / new - 1/2, image / old pixels to a cell."""
    at_image = (np.arange(new) + 0.5) * (image / new) - 0.5
    at = np.clip(at_image * (old / image), 0.0, old - 1)
    low = np.floor(at).astype(int)
    share = at - low
    weights = np.zeros((new, old))
    weights[np.arange(new), low] += 1.0 - share
    weights[np.arange(new), np.minimum(low + 1, old - 1)] += share
    return weights.astype(np.float32)


def fit_reference(raw: np.ndarray, quantile: float = REFERENCE_QUANTILE) -> np.ndarray:
    """Each target's reference activation: a high quantile, over validation images, of the map's maximum.

    Pass all validation images, not only the confident ones: then 1.0 on the scale means "as strong as this
    finding gets", and an image without the finding stays dark. The stage records it beside the thresholds.

    Args:
        raw: float (K, N, h, w) of `Maps.raw`, or the maxima (K, N) alone, on the validation split.
        quantile: in (0, 1]; 0.99 lets one odd image in a hundred go over the top of the scale.

    Returns:
        float32 (K,); NaN for a target whose maps are zero on all images, which has no scale.

    Raises:
        ValueError: other axes, no images, a negative or non-finite map, or a quantile out of range.
    """
    raw = np.asarray(raw)
    if raw.ndim not in (2, 4) or 0 in raw.shape:
        raise ValueError(f"maps have shape {raw.shape}; expected (K, N, h, w), or maxima (K, N), with N >= 1")
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile is {quantile}; it lies in (0, 1]")
    if not np.isfinite(raw).all() or raw.min() < 0:
        raise ValueError("maps hold negative or non-finite values; pass them as class_activation_maps made them")
    maxima = raw if raw.ndim == 2 else raw.max(axis=(2, 3))
    reference = np.quantile(maxima, quantile, axis=1).astype(np.float32)
    return np.where(reference > 0, reference, np.float32(np.nan))


def scale_maps(raw: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Maps as shares of their target's reference activation; never stretched image by image.

    Args:
        raw: float (K, ..., h, w).
        reference: float (K,) of `fit_reference`.

    Returns:
        float32, same shape: 0 none, 1 the reference, above 1 stronger than it; NaN where the reference is
        NaN.

    Raises:
        ValueError: another number of references than maps, or one that is not positive.
    """
    raw, reference = np.asarray(raw, dtype=np.float32), np.asarray(reference, dtype=np.float32)
    if reference.shape != raw.shape[:1]:
        raise ValueError(f"{reference.shape} references for maps of shape {raw.shape}; one per target is needed")
    if (reference <= 0).any():
        raise ValueError(f"reference {int(np.argmax(reference <= 0))} is not positive; fit it with fit_reference")
    return raw / reference.reshape(-1, *[1] * (raw.ndim - 1))
