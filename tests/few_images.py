"""A dozen small images of random content, and manifests of them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from PIL import Image

from mlx_cxr.core.labels import LABELS
from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.manifest import Manifest

TRANSFORM = Transform(32)


def image(number: int, height: int = 70, width: int = 50) -> Image.Image:
    """An image whose content is drawn from its number."""
    grain = np.random.default_rng(number).integers(0, 256, (height // 5, width // 5), dtype=np.uint8)
    return Image.fromarray(grain).resize((width, height), Image.Resampling.BICUBIC)


def manifest_of(paths: Iterable[str], sha256: str = "a" * 64) -> Manifest:
    """A manifest with only what a pixel store reads of it."""
    paths = list(paths)
    frame = pd.DataFrame({"image_id": [f"id{row:04d}" for row in range(len(paths))], "path": paths})
    return Manifest(frame, np.full((len(paths), len(LABELS)), np.nan, np.float32), sha256)
