"""Maps of a split's images, and the checks of them: against masks, and against randomized weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import mlx.core as mx
import numpy as np
import pandas as pd

from mlx_cxr.core.config import Config
from mlx_cxr.core.files import RecordError
from mlx_cxr.core.labels import MAPPED, label_index
from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.places import Places, Truth
from mlx_cxr.evaluation.localization_table import ImageScores, localization_table
from mlx_cxr.evaluation.operating_points import OperatingPoints
from mlx_cxr.evaluation.predictions import Predictions
from mlx_cxr.explain.faithfulness import randomization_check
from mlx_cxr.explain.grad_cam import Method
from mlx_cxr.explain.localization import Localization, Scores, localize
from mlx_cxr.explain.maps import ScaledMaps
from mlx_cxr.inference.map_fit import MapFit
from mlx_cxr.inference.predictor import read_map_fit
from mlx_cxr.inference.trained_run import TrainedRun, image_maps
from mlx_cxr.models.resnet import ResNet18, preprocess
from mlx_cxr.training.batches import ImageSource
from mlx_cxr.training.cohort import SplitData

SELECTIONS: Mapping[Truth, str] = {
    "drawn": "films with a mask of the finding (it was drawn, within the frame) and the report label 1",
    "masks": "films with a reader's mask of the finding and the report label 1",
    "boxes": "films with a reader's box around the finding and the report label 1",
}
"""The images that are scored, in words, after the name of their split."""
ARMS = ("random", "swapped", "usual", "centre", "chance")
RANDOMIZATION_IMAGES, RANDOMIZATION_DRAWS = 8, 3


def scaled_maps(
    model: ResNet18,
    images: ImageSource,
    labels: Sequence[str],
    method: Method,
    fit: MapFit,
    batch_size: int,
) -> ScaledMaps:
    """Maps of every image of a source for some findings, on the scale of the fit."""
    raw, logits = image_maps(model, images, labels, [method], batch_size, fit.baseline)
    reference = np.array([fit.references[method][label] for label in labels], np.float32)
    return ScaledMaps(tuple(labels), raw[method], logits, reference, method)


def study_maps(
    trained: TrainedRun, data: SplitData, failures: pd.DataFrame, method: Method, batch_size: int
) -> tuple[pd.DataFrame, np.ndarray, ScaledMaps]:
    """Maps of all images of some studies, on the scale that the run's `inference.json` recorded.

    Args:
        trained: the run.
        data: the split that holds the studies.
        failures: `study_id` and `label`; every label is mapped on every image.
        method: of the maps.
        batch_size: images per pass.

    Returns:
        The images' manifest rows, their pixels uint8 (N, S, S), and their maps.

    Raises:
        RecordError: a study has no image in the split, or `inference.json` is not of this run's weights or has no
            reference for the method.
    """
    again = f"run evaluate_cnn --run_name {trained.folder.name} again"
    fit = read_map_fit(trained)
    if fit is None or method not in fit.references:
        raise RecordError(f"{trained.folder} was evaluated without {method} maps; {again}, with maps")
    frame = data.frame[data.frame["study_id"].isin(failures["study_id"])]
    missing = failures.loc[~failures["study_id"].isin(frame["study_id"]), "study_id"]
    if len(missing):
        raise RecordError(
            f"the pixel store has no film of study {missing.iloc[0]}, which {trained.folder} has scored; {again}"
        )
    pixels = np.array(data.images.batch(frame.index.to_numpy()))
    images = ImageSource(pixels, np.arange(len(pixels)), trained.config.training.pixel_budget_gb)
    labels = tuple(dict.fromkeys(failures["label"]))
    return frame, pixels, scaled_maps(trained.model, images, labels, method, fit, batch_size)


def localization(
    maps: ScaledMaps,
    fit: MapFit,
    data: SplitData,
    masks: Sequence[Mapping[str, np.ndarray]],
    test: Predictions,
    points: OperatingPoints,
    *,
    fraction: float,
    half_cell: float,
    samples: int,
    seed: int,
    synthetic: bool,
) -> dict[str, Any] | None:
    """The content of `localization.json`: `localization_table` of every finding that has images to score.

    Args:
        maps: of the images.
        fit: of the maps, with the findings' usual places.
        data: the images' split.
        masks: per image, finding to bool (S, S).
        test: predictions, a row per study; images of other studies are left out.
        points: fitted on validation.
        fraction: of a map's pixels that count as its extent.
        half_cell: pixels by which `hit_half_cell` may miss.
        samples: bootstrap resamples.
        seed: of controls and resamples.
        synthetic: of the cohort.

    Returns:
        The table, with `fraction`, `half_cell_px` and per finding `mask_area` (mean share
        of the image), `films_with_mask`, `empty_maps` (of the images scored; an empty map counts as a miss), `called`
        (of the images scored, those whose study was called positive) and `hit_when_called` (the pointing game on
        those, null without any). None when no finding has images.
    """
    patients, studies = (data.frame[name].to_numpy(dtype=str) for name in ("patient_id", "study_id"))
    called = points.calibration.probabilities(test.logits) >= points.thresholds.values
    row_of_study = {study: row for row, study in enumerate(test.study_ids.tolist())}
    study_rows = np.array([row_of_study.get(study, -1) for study in studies.tolist()])
    findings, extra = [], {}
    for k, label in enumerate(maps.labels):
        drawn = np.array([label in found and bool(found[label].any()) for found in masks])
        rows = np.flatnonzero(drawn & (study_rows >= 0) & (data.raw_labels[:, label_index(label)] == 1))
        if not len(rows):
            continue
        targets = np.stack([masks[row][label] for row in rows])
        usual = fit.usual[maps.method][MAPPED.index(label)]
        strict, near = (
            localize(maps.raw[k, rows], targets, patients[rows], usual, fraction, reach, seed=seed)
            for reach in (0.0, half_cell)
        )
        findings.append(_image_scores(label, patients[rows], strict, near))
        hits = strict.maps.hit[called[study_rows[rows], label_index(label)]]
        extra[label] = {
            "films_with_mask": int(drawn.sum()),
            "mask_area": float(strict.mask_area.mean()),
            "empty_maps": int((maps.raw[k, rows].max(axis=(1, 2)) == 0).sum()),
            "called": len(hits),
            "hit_when_called": float(hits.mean()) if len(hits) else None,
        }
    if not findings:
        return None
    table = localization_table(findings, samples, seed, synthetic, maps.method)
    for label, entry in extra.items():
        table["per_label"][label] |= entry
    return {**table, "fraction": fraction, "half_cell_px": half_cell}


def place_scores(
    trained: TrainedRun,
    maps: ScaledMaps,
    fit: MapFit,
    data: SplitData,
    places: Places,
    predictions: Predictions,
    points: OperatingPoints,
    config: Config,
) -> tuple[list[dict[str, np.ndarray]], dict[str, Any] | None]:
    """The images' masks, and the content of `localization.json`: that of `localization`, with what the truth is.

    Args:
        trained: the run.
        maps, fit, data, predictions, points: as for `localization`.
        places: of the images.
        config: the cohort's, with the run's `pixels`.
    """
    transform = Transform.of(config)
    masks = [places.masks(path, transform, maps.labels) for path in data.frame["path"]]
    table = localization(
        maps,
        fit,
        data,
        masks,
        predictions,
        points,
        fraction=config.explain.mask_fraction,
        half_cell=trained.model.config.output_stride / 2,
        samples=config.evaluation.bootstrap_samples,
        seed=config.seed,
        synthetic=config.data.synthetic,
    )
    selection = f"{data.name} {SELECTIONS[places.truth]}"
    return masks, None if table is None else {**table, "selection": selection, **places.plain()}


def randomization(model: ResNet18, maps: ScaledMaps, images: ImageSource, seed: int) -> dict[str, np.ndarray]:
    """`randomization_check` of the mapped findings on at most `RANDOMIZATION_IMAGES` images, evenly spaced.

    Of `contrast_cam` it checks Grad-CAM: the baseline is of the trained network, and says nothing of a randomized one.
    """
    items = np.unique(np.linspace(0, len(images) - 1, min(RANDOMIZATION_IMAGES, len(images))).astype(int))
    x = preprocess(images.batch(items), model.config.in_channels)
    mx.eval(x)
    method = "grad_cam" if maps.method == "contrast_cam" else maps.method
    return randomization_check(model, x, maps.labels, method=method, draws=RANDOMIZATION_DRAWS, seed=seed)


def _image_scores(label: str, patients: np.ndarray, strict: Localization, near: Localization) -> ImageScores:
    def scores(arm: str) -> dict[str, np.ndarray]:
        columns = {field.name: getattr(getattr(strict, arm), field.name) for field in fields(Scores)}
        return {**columns, "hit_half_cell": getattr(near, arm).hit}

    return ImageScores(label, patients, scores("maps"), {arm: scores(arm) for arm in ARMS})
