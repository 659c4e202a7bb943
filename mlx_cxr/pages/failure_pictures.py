"""Errors as pictures: the image beside the student's map of the finding that it got wrong."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from mlx_cxr.core.config import Config
from mlx_cxr.core.labels import label_index
from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.places import Places
from mlx_cxr.explain.maps import ScaledMaps
from mlx_cxr.pages.overlay import draw_overlay, save_picture
from mlx_cxr.pages.withheld_maps import Reading

IMAGES = "images"
SIDE = 320


def draw_failures(
    folder: Path,
    failures: pd.DataFrame,
    frame: pd.DataFrame,
    pixels: np.ndarray,
    maps: ScaledMaps,
    places: Places | None,
    config: Config,
) -> list[str]:
    """Draw each of some errors, one atomic write per picture.

    Of a study's images the one with the highest score of the finding is shown. The map of a call below the threshold is
    shown too, and says so.

    Args:
        folder: of the analysis; the pictures go into its folder `IMAGES`.
        failures: rows of `failures.csv`.
        frame: manifest rows of all N images of their studies.
        pixels: uint8 (N, S, S).
        maps: of those images, with every label of `failures`.
        places: of the cohort's findings, where there are any.

    Returns:
        The pictures' paths relative to `folder`, one for each row, in their order.
    """
    transform = Transform.of(config)
    studies, names = frame["study_id"].to_numpy(dtype=str), []
    for place, row in enumerate(failures.to_dict("records"), start=1):
        label = row["label"]
        images = np.flatnonzero(studies == row["study_id"])
        image = images[np.argmax(maps.logits[images, label_index(label)])]
        reading = Reading(
            label,
            row["probability"],
            row["threshold"],
            float(row["raw_label"]),
            str(frame["image_id"].iloc[image]),
            maps.method,
            config.data.synthetic,
            row["abstention"],
        )
        mask = places.masks(frame["path"].iloc[image], transform, [label]).get(label) if places else None
        words = f"{place:02} {label} {row['error']} {row['study_id']}"
        names.append(f"{IMAGES}/{re.sub(r'[^A-Za-z0-9.-]+', '_', words)[:120]}.png")
        heat = maps.heat(label, image)
        save_picture(folder / names[-1], draw_overlay(pixels[image], heat, reading, mask, SIDE, show_withheld=True))
    return names


def remove_stale(folder: Path, names: list[str]) -> None:
    """Remove pictures of an earlier analysis from `IMAGES`."""
    for path in (folder / IMAGES).glob("*.png"):
        if f"{IMAGES}/{path.name}" not in names:
            path.unlink()
