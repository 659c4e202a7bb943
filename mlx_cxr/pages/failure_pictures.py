"""Errors as pictures: the image beside the student's map of the finding that it got wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mlx_cxr.core.config import Config
from mlx_cxr.core.labels import label_index
from mlx_cxr.core.runs import RunFormatError
from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.masks import has_masks, load_masks
from mlx_cxr.explain.maps import fit_reference, scale_maps
from mlx_cxr.inference.trained_run import TrainedRun, image_maps
from mlx_cxr.pages.overlay import Reading, draw_overlay, save_picture
from mlx_cxr.training.batches import ImageSource
from mlx_cxr.training.cohort import Cohort

IMAGES = "images"
SIDE = 320


def draw_failures(
    folder: Path, failures: pd.DataFrame, trained: TrainedRun, cohort: Cohort, config: Config
) -> list[str]:
    """Draw each of some errors, one atomic write per picture, and remove pictures of an earlier analysis.

    Of a study's images the one with the highest score of the finding is shown. Maps are scaled by their reference
    activation on validation, as in `findings.md`; that of a call below the threshold is shown too, and says so.

    Args:
        folder: of the analysis; the pictures go into its folder `IMAGES`.
        failures: rows of `failures.csv`.
        trained: the run whose errors they are.
        cohort: with the splits `validate` and `test`.
        config: the experiment; `explain.method`, `evaluation.batch_size`, `data` and `pixels` are used.

    Returns:
        The pictures' paths relative to `folder`, one for each row, in their order.

    Raises:
        RunFormatError: a study has no image in the pixel store.
    """
    names = [_name(place, row) for place, row in enumerate(failures.to_dict("records"), start=1)]
    if len(failures):
        _draw(folder, failures, names, trained, cohort, config)
    for path in (folder / IMAGES).glob("*.png"):
        if f"{IMAGES}/{path.name}" not in names:
            path.unlink()
    return names


def _draw(
    folder: Path, failures: pd.DataFrame, names: list[str], trained: TrainedRun, cohort: Cohort, config: Config
) -> None:
    validation, test = cohort.split("validate"), cohort.split("test")
    labels = tuple(dict.fromkeys(failures["label"]))
    method, batch = config.explain.method, config.evaluation.batch_size
    reference = fit_reference(image_maps(trained.model, validation.images, labels, method, batch)[0])
    frame = test.frame[test.frame["study_id"].isin(failures["study_id"])]
    pixels = np.array(test.images.batch(frame.index.to_numpy()))
    images = ImageSource(pixels, np.arange(len(pixels)), config.training.pixel_budget_gb)
    raw, logits = image_maps(trained.model, images, labels, method, batch)
    transform = Transform(config.pixels.size, config.pixels.fit)
    masked = has_masks(config.data.root)
    studies = frame["study_id"].to_numpy(dtype=str)
    for name, row in zip(names, failures.to_dict("records"), strict=True):
        label = row["label"]
        rows = np.flatnonzero(studies == row["study_id"])
        if not len(rows):
            raise RunFormatError(
                f"{config.pixels_path} has no film of study {row['study_id']}, which {trained.folder} has scored; "
                f"run evaluate_cnn --run_name {trained.folder.name} again"
            )
        image, k = rows[np.argmax(logits[rows, label_index(label)])], labels.index(label)
        reading = Reading(
            label,
            row["probability"],
            row["threshold"],
            float(row["raw_label"]),
            str(frame["image_id"].iloc[image]),
            method,
            config.data.synthetic,
            row["abstention"],
        )
        mask = (
            load_masks(config.data.root, frame["path"].iloc[image], transform, [label]).get(label) if masked else None
        )
        heat = scale_maps(raw[k : k + 1, image], reference[k : k + 1])[0]
        save_picture(folder / name, draw_overlay(pixels[image], heat, reading, mask, SIDE, show_withheld=True))


def _name(place: int, row: Mapping[str, Any]) -> str:
    """A picture's path relative to the page."""
    words = f"{place:02} {row['label']} {row['error']} {row['study_id']}"
    return f"{IMAGES}/{re.sub(r'[^A-Za-z0-9.-]+', '_', words)[:120]}.png"
