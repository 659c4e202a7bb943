"""An image's pixels as every model gets them, for tests that say what a stage should have made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mlx_cxr.data.decoding import Transform, decode, squared


def read_image(path: str | Path, transform: Transform) -> np.ndarray:
    """uint8 (S, S) of a file."""
    return np.asarray(decode(path, transform, inspect=False).gray)


def apply(image: np.ndarray, transform: Transform) -> np.ndarray:
    """uint8 (H, W) -> uint8 (S, S)."""
    whole = Image.fromarray(image)
    return np.asarray(squared(whole, transform, whole.size, 1)[0])
