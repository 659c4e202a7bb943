"""The images that `mlx_cxr.data.quality` was fitted and is measured on, and the fit itself.

`python tests/chest_views.py` prints the tables as they stand in the module.
"""

from __future__ import annotations

import csv
import functools
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mlx_cxr.data.chest_film_gate import SIDE, pattern
from mlx_cxr.synthetic.cohort import plan_cohort
from mlx_cxr.synthetic.image import render_image

REAL = Path(os.environ.get("MLX_CXR_REALCXR", Path(__file__).resolve().parents[2] / "shared" / "realcxr"))
COMPONENTS = 5
FIT_SEED, TEST_SEED = 1, 2


class RealImage(NamedTuple):
    """A real frontal image; `fitted` for the half of the patients that the tables come from."""

    source: str
    name: str
    image: Image.Image
    fitted: bool


@functools.cache
def real_images() -> tuple[RealImage, ...]:
    """All of them, empty where they are not on this machine."""
    if not REAL.is_dir():
        return ()
    with (REAL / "metadata.csv").open(encoding="utf-8") as file:
        return tuple(
            RealImage(
                row["patient_id"].split("-")[0],
                Path(row["image_file"]).name,
                Image.open(REAL / row["image_file"]).convert("L"),
                zlib.crc32(row["patient_id"].encode()) % 2 == 0,
            )
            for row in csv.DictReader(file)
        )


@functools.cache
def drawn_images(seed: int, patients: int = 90, size: int = 96) -> dict[str, list[Image.Image]]:
    """Images of the phantom with all its findings and devices: PA, AP and LATERAL."""
    images = {"PA": [], "AP": [], "LATERAL": []}
    for study in plan_cohort(patients, seed).studies:
        for plan in study.images:
            image = render_image(study.patient, study.findings, plan.kind, size, plan.seed, plan.supine)
            images[plan.kind].append(Image.fromarray(image.pixels))
    return images


def patterns(images) -> np.ndarray:
    """float64 (N, 64)."""
    return np.stack([pattern(image) for image in images])


def mirrored(images: np.ndarray) -> np.ndarray:
    """Patterns and their mirror images, so that what is fitted to them has no side."""
    return np.concatenate([images, images.reshape(-1, SIDE, SIDE)[:, :, ::-1].reshape(len(images), -1)])


def fit_frontal(images: np.ndarray, sources) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Mean, components, their variances, and the residual variance, of sources that weigh alike."""
    sources = np.asarray(sources)
    weights = np.array([1 / (sources == source).sum() for source in sources])
    weights = np.tile(weights, 2) / (2 * weights.sum())
    both = mirrored(images)
    mean = weights @ both
    _, spread, axes = np.linalg.svd((both - mean) * np.sqrt(weights)[:, None], full_matrices=False)
    axes = axes[:COMPONENTS]
    axes *= np.sign(axes[np.arange(COMPONENTS), np.abs(axes).argmax(axis=1)])[:, None]
    variances = spread**2
    # Ranks are centred, which leaves 63 directions.
    return mean, axes, variances[:COMPONENTS], variances[COMPONENTS:].sum() / (SIDE * SIDE - 1 - COMPONENTS)


def fit_lateral(lateral: np.ndarray, frontal: list[np.ndarray]) -> np.ndarray:
    """Linear discriminant of lateral images against groups of frontal ones that weigh alike; a unit vector.

    The covariance is shrunk to half a multiple of the identity, which keeps the pattern smooth.
    """
    groups = [mirrored(images) for images in frontal]
    lateral = mirrored(lateral)
    within = np.cov(lateral.T) + np.mean([np.cov(images.T) for images in groups], axis=0)
    difference = lateral.mean(axis=0) - np.mean([images.mean(axis=0) for images in groups], axis=0)
    direction = np.linalg.solve(within + np.trace(within) / len(within) * np.eye(len(within)), difference)
    return direction / np.linalg.norm(direction)


def fitted_tables() -> dict[str, np.ndarray]:
    """The module's tables, from the images; the lateral pattern also from real frontal images."""
    fitted = [image for image in real_images() if image.fitted]
    real = patterns(image.image for image in fitted)
    drawn = {kind: patterns(images) for kind, images in drawn_images(FIT_SEED).items()}
    mean, axes, variances, residual = fit_frontal(real, [image.source for image in fitted])
    lateral = fit_lateral(drawn["LATERAL"], [real, drawn["PA"], drawn["AP"]])
    return {
        "MEAN": mean,
        "COMPONENTS": axes,
        "VARIANCES": variances,
        "RESIDUAL_VARIANCE": np.array(residual),
        "LATERAL_PATTERN": lateral,
    }


if __name__ == "__main__":
    for name, table in fitted_tables().items():
        scale = {"MEAN": 100, "COMPONENTS": 1000, "LATERAL_PATTERN": 1000}.get(name)
        if scale is None:
            print(name, table.round(3).tolist())
            continue
        for rows in np.atleast_2d(table).reshape(-1, SIDE, SIDE):
            print(name, "antisymmetrical" if (rows * rows[:, ::-1]).sum() < 0 else "")
            for row in np.rint(rows[:, : SIDE // 2] * scale).astype(int):
                print("   ", tuple(row.tolist()))
