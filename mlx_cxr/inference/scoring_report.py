"""What the scoring of any run leaves in its folder: predictions, results, tables, plots, and what a prediction costs.

`evaluate_cnn` calls this for the CNN and for students, and the teacher's scoring for the teacher, so that all of them
are judged by the same code.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pandas as pd

from mlx_cxr.core.config import Config
from mlx_cxr.core.runs import write_json, write_text
from mlx_cxr.data.manifest import Manifest
from mlx_cxr.evaluation.operating_points import (
    FILE,
    OperatingPoints,
    fit_operating_points,
    write_operating_points,
)
from mlx_cxr.evaluation.predictions import Predictions, write_predictions
from mlx_cxr.evaluation.results import MEAN_OF_IMAGES, evaluate
from mlx_cxr.evaluation.shortcuts import study_metadata
from mlx_cxr.pages import plots
from mlx_cxr.pages.results_page import results_markdown

log = logging.getLogger("mlx_cxr")


def write_scores(
    folder: Path,
    predictions: Predictions,
    protocol: str,
    manifest: Manifest,
    config: Config,
    record: Mapping[str, Any],
    score: str = MEAN_OF_IMAGES,
) -> OperatingPoints:
    """Fit on validation, score test, and write what follows from it.

    Written are, in this order, `predictions.csv`, `operating_points.json`, `test_results.json`, `results.md`,
    `roc.png`, `precision_recall.png`, `reliability.png` and `risk_coverage.png`.

    Args:
        folder: the run's.
        predictions: of studies of the manifest, with the splits `validate` and `test`; those that could not be scored
            are left out.
        protocol: of the validation targets that temperatures and thresholds are fitted to, a key of
            `labels.SCORING_PROTOCOLS`.
        manifest: what the studies are from.
        config: the experiment.
        record: `runs.provenance`, kept in the results.
        score: what a study's score is, in words.

    Returns:
        What was fitted on validation.

    Raises:
        PredictionsError: a split is missing.
        OSError: a file cannot be written; what was there before is kept.
    """
    settings, synthetic = config.evaluation, config.data.synthetic
    validation, test = predictions.of_split("validate"), predictions.of_split("test")
    points = fit_operating_points(validation, protocol, settings.threshold_rule, settings.abstention_alpha)
    write_predictions(folder / "predictions.csv", predictions, points)
    made_from = {role: entry["sha256"] for role, entry in record["inputs"].items()}
    write_operating_points(folder / FILE, points, run=folder.name, synthetic=synthetic, made_from=made_from)

    frame = manifest.frame
    in_training = (frame["split"] == "train").to_numpy()
    first = ~frame["study_id"].duplicated().to_numpy() & in_training
    results = evaluate(
        predictions,
        points,
        run=folder.name,
        synthetic=synthetic,
        samples=settings.bootstrap_samples,
        seed=config.seed,
        bins=settings.calibration_bins,
        provenance=record,
        train=(study_metadata(frame[in_training]), manifest.raw_labels[first]),
        test_metadata=study_metadata(_rows_of_studies(frame, test.study_ids)),
        score=score,
    )
    write_json(folder / "test_results.json", results)
    write_text(folder / "results.md", results_markdown(results))
    plots.plot_roc(folder / "roc.png", test, points, synthetic)
    plots.plot_precision_recall(folder / "precision_recall.png", test, points, synthetic)
    plots.plot_reliability(folder / "reliability.png", test, points, synthetic, bins=settings.calibration_bins)
    plots.plot_risk_coverage(folder / "risk_coverage.png", validation, test, points, synthetic)
    macro = results["protocols"][protocol]["macro"]["roc_auc"]
    log.info(
        "test macro ROC-AUC %.3f [%.3f, %.3f] (%s, per study); tables in %s",
        *(macro[key] for key in ("value", "low", "high")),
        protocol,
        folder / "results.md",
    )
    return points


def _rows_of_studies(frame: pd.DataFrame, study_ids: np.ndarray) -> pd.DataFrame:
    """The rows of these studies, study by study in the order given."""
    place = {study: i for i, study in enumerate(study_ids.tolist())}
    places = frame["study_id"].map(place)
    return frame.loc[places.dropna().sort_values(kind="stable").index]


def milliseconds_per_sample(
    forward: Callable[[], mx.array], batch_size: int, seconds: float = 2.0, least_rounds: int = 3
) -> tuple[float, int]:
    """Time a forward pass over one batch that is in memory, as `write_cost` wants it.

    Args:
        forward: gives the batch's logits; evaluated inside the clock, after one round that is not counted.
        batch_size: samples in the batch.
        seconds: how long to go on.
        least_rounds: how often at least.

    Returns:
        The median over the rounds in ms per sample, and how many samples were timed.
    """
    mx.eval(forward())
    rounds, begun = [], time.perf_counter()
    while len(rounds) < least_rounds or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        mx.eval(forward())
        rounds.append(time.perf_counter() - start)
    return 1000 * float(np.median(rounds)) / batch_size, len(rounds) * batch_size


def write_cost(
    folder: Path,
    *,
    parameters: Mapping[str, int],
    ms_per_sample: float,
    samples: int,
    batch_size: int,
    what: str,
    device: Mapping[str, Any],
) -> Path:
    """Write `cost.json`: what a model's size is, and what a prediction takes on this machine.

    Args:
        folder: the run's.
        parameters: `total` and `trainable`, as `models.resnet.parameter_counts`.
        ms_per_sample: median over batches, each evaluated inside the clock, after a warm-up.
        samples: how many were timed.
        batch_size: samples per batch.
        what: what is timed, in a phrase that names sample, size and pass.
        device: `runtime.describe()`.

    Returns:
        The path.
    """
    return write_json(
        folder / "cost.json",
        {
            "schema": 1,
            "parameters": dict(parameters),
            "ms_per_sample": ms_per_sample,
            "samples": samples,
            "batch_size": batch_size,
            "what": what,
            "device": dict(device),
        },
    )
