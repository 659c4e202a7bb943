"""Figures of an image as a whole, which tell exposure, machine and hospital apart and show no finding.

What a model of these alone ranks is a floor under the ROC-AUC of any model that sees the image; see `shortcuts`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from mlx_cxr.data.pixel_store import PixelStore

STATISTICS = (
    *("brightness", "contrast", "dark level", "middle level", "bright level", "black part", "white part"),
    *("border at the sides", "border at the ends", "sharpness"),
)
"""Gray levels from 0 to 1; parts of the area; sharpness as mean absolute Laplacian over the standard deviation."""
_BLACK, _WHITE = 4, 251
_FLAT = 2 / 255
"""Standard deviation below which a row or column is border."""
_AT_ONCE = 256


def image_statistics(images: np.ndarray) -> np.ndarray:
    """`STATISTICS` of each image: uint8 (N, S, S) to float64 (N, 10)."""
    return np.array([_statistics(image) for image in images]).reshape(len(images), len(STATISTICS))


def _statistics(image: np.ndarray) -> list[float]:
    shares = np.bincount(image.ravel(), minlength=256) / image.size
    levels, below = np.arange(256) / 255, np.cumsum(shares)
    mean = shares @ levels
    spread = np.sqrt(shares @ (levels - mean) ** 2)
    parts = [levels[np.searchsorted(below, part - 1e-9)] for part in (0.05, 0.5, 0.95)]
    pixels = image.astype(np.float32) / 255
    inner = pixels[1:-1, 1:-1]
    edges = 4 * inner - pixels[:-2, 1:-1] - pixels[2:, 1:-1] - pixels[1:-1, :-2] - pixels[1:-1, 2:]
    borders = [_ends(pixels.std(axis=axis) < _FLAT) / len(image) for axis in (0, 1)]
    sharpness = np.abs(edges).mean() / max(spread, 1 / 255)
    return [mean, spread, *parts, below[_BLACK], 1 - below[_WHITE - 1], *borders, sharpness]


def study_statistics(store: PixelStore, frame: pd.DataFrame) -> pd.DataFrame:
    """`STATISTICS` of each study, the mean over its images: a row per study, index `study_id`.

    Args:
        store: their pixels.
        frame: manifest rows, one per image; those without pixels are passed over, and so is a study of only such.
    """
    frame = frame[~frame["image_id"].isin(store.missing)]
    rows = store.rows(frame["image_id"])
    parts = [image_statistics(store.images[rows[i : i + _AT_ONCE]]) for i in range(0, len(rows), _AT_ONCE)]
    values = np.concatenate(parts) if parts else np.empty((0, len(STATISTICS)))
    table = pd.DataFrame(values, index=frame["study_id"].to_numpy(dtype=str), columns=list(STATISTICS))
    return table.groupby(level=0, sort=False).mean()


def _ends(border: np.ndarray) -> int:
    """Length of the True runs at both ends of a bool (S,); all of it where it is True throughout."""
    return len(border) if border.all() else int((~border).argmax() + (~border[::-1]).argmax())
