"""A film or a mask as the square array that models and scores work on.

The same code serves the pixel store, inference and masks. How a file is decoded is in `decoding`, which this builds on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mlx_cxr.data.decoding import FilmError, Transform, decode, squared

__all__ = ["FilmError", "Transform", "apply", "apply_mask", "read_film"]


def read_film(path: str | Path, transform: Transform) -> np.ndarray:
    """A film's pixels as every model gets them.

    Returns:
        uint8 (S, S).

    Raises:
        FilmError: the film cannot be used; names the file and the reason.
    """
    try:
        return np.asarray(decode(path, transform, inspect=False).image)
    except FilmError as error:
        raise FilmError(f"{path}: {error}") from None


def apply(film: np.ndarray, transform: Transform) -> np.ndarray:
    """The same for a film that is an array already: uint8 (H, W) -> uint8 (S, S)."""
    image = Image.fromarray(_checked(film, np.uint8))
    return np.asarray(squared(image, transform, image.size, 1)[0])


def apply_mask(mask: np.ndarray, transform: Transform) -> np.ndarray:
    """The same geometry for a mask, made so that thin findings stay.

    A pixel belongs to the result where at least half as much of it is covered as of the most covered pixel among it and
    its eight neighbours. Along the edge of anything thicker than two pixels that is the plain rule of half the area; a
    line thinner than a pixel, which that rule would break up or lose, stays whole.

    Args:
        mask: (H, W), non-zero on the finding; H, W are the film's.
        transform: what the film was prepared with.

    Returns:
        bool (S, S); all False where the mask is empty or lies outside a centre crop.
    """
    mask = _checked(np.asarray(mask) != 0, np.bool_)
    height, width = mask.shape
    left, top, across, down = transform.placed(width, height)
    x0, y0, x1, y1 = transform.shown(width, height)
    covered = _means(_means(mask, y0, y1, down).T, x0, x1, across).T
    near = np.lib.stride_tricks.sliding_window_view(np.pad(covered, 1), (3, 3)).max(axis=(2, 3))
    out = np.zeros((transform.size, transform.size), dtype=bool)
    # Differences of sums leave dust of about 1e-12 where nothing is covered.
    out[top : top + down, left : left + across] = (covered > 1e-6) & (covered >= near / 2)
    return out


def _means(values: np.ndarray, start: float, stop: float, count: int) -> np.ndarray:
    """(H, W) -> float64 (count, W): means over `count` equal stretches of rows, which may begin within a row.

    Pillow's BOX filter takes whole rows only, and so can miss one between two stretches.
    """
    sums = np.cumsum(values, axis=0, dtype=np.float64)
    edges = np.linspace(start, stop, count + 1)
    row = np.minimum(edges.astype(int), len(values) - 1)
    # The sum of all rows before an edge: those up to its own row, less what of that row lies behind the edge.
    before = sums[row] - (row + 1 - edges)[:, None] * values[row]
    return np.diff(before, axis=0) * (count / (stop - start))


def _checked(array: np.ndarray, dtype: type) -> np.ndarray:
    array = np.asarray(array)
    if array.ndim != 2 or array.dtype != dtype or not array.size:
        raise ValueError(f"expected {np.dtype(dtype)} (H, W), got {array.dtype} {array.shape}")
    return array
