"""Synthetic images, which look like chests, for tests that need to pass the chest film gate."""

from __future__ import annotations

import functools

import numpy as np

from mlx_cxr.synthetic.anatomy import sample_patient
from mlx_cxr.synthetic.image import render_image


@functools.cache
def chest_image(seed: int = 0, size: int = 128, kind: str = "PA") -> np.ndarray:
    """uint8 (H, W): an image of nobody, without findings."""
    patient = sample_patient(10_000_000 + seed, np.random.default_rng(seed), seed)
    return render_image(patient, {}, kind, size, seed).pixels
