"""Scoring of a run, a teacher's like a CNN's: fitted on validation, measured on test, written into its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mlx_cxr.core.config import Config
from mlx_cxr.core.labels import SCORING_PROTOCOLS
from mlx_cxr.core.runs import write_json
from mlx_cxr.data.manifest import Manifest
from mlx_cxr.evaluation.calibration import fit_temperatures
from mlx_cxr.evaluation.conformal import fit_bands
from mlx_cxr.evaluation.metrics import choose_thresholds
from mlx_cxr.evaluation.operating_points import FILE, OperatingPoints, write_operating_points
from mlx_cxr.evaluation.predictions import Predictions, write_predictions
from mlx_cxr.evaluation.results import MEAN_OF_IMAGES, evaluate
from mlx_cxr.evaluation.shortcuts import study_metadata


def fit_operating_points(
    validation: Predictions, protocol: str, rule: Literal["youden", "f1"], alpha: float
) -> OperatingPoints:
    """Temperatures, thresholds and conformal bands from the validation split alone.

    The bands are fitted to the same studies as the rest. Temperatures keep the order of the probabilities, and the sets
    do not look at the thresholds, so neither can take coverage away; what can is the choice of the weights, which the
    same split made. Coverage on test, which `test_results.json` has, tells how much it took.

    Args:
        protocol: a key of `labels.SCORING_PROTOCOLS`.
        rule: as `metrics.choose_thresholds`.
        alpha: in (0, 1), as `conformal.fit_bands`.

    Raises:
        ValueError: the predictions hold test studies, or an unknown rule or alpha.
    """
    if "test" in validation.split:
        raise ValueError("thresholds and temperatures are fitted on validation; these predictions hold test studies")
    targets = SCORING_PROTOCOLS[protocol].apply(validation.raw_labels)
    calibration = fit_temperatures(validation.logits, targets)
    probabilities = calibration.probabilities(validation.logits)
    thresholds = choose_thresholds(targets, probabilities, rule)
    return OperatingPoints(calibration, thresholds, protocol, fit_bands(probabilities, targets, alpha))


def write_scores(
    folder: Path,
    predictions: Predictions,
    protocol: str,
    manifest: Manifest,
    config: Config,
    record: Mapping[str, Any],
    score: str = MEAN_OF_IMAGES,
) -> tuple[OperatingPoints, dict[str, Any]]:
    """Fit on validation, score test, and write `predictions.csv`, `operating_points.json` and `test_results.json`.

    Args:
        folder: the run's.
        predictions: of studies of the manifest, with the splits `validate` and `test`; those that could not be scored
            are left out.
        protocol: of the validation targets that temperatures and thresholds are fitted to, a key of
            `labels.SCORING_PROTOCOLS`.
        record: `runs.provenance`, kept in the results.
        score: the score of a study, in words.

    Returns:
        The operating points fitted on validation, and the content of `test_results.json`.

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

    # Metadata of the training studies, and of the test studies in the order of their predictions.
    frame = manifest.frame
    in_training = (frame["split"] == "train").to_numpy()
    first = ~frame["study_id"].duplicated().to_numpy() & in_training
    place = {study: i for i, study in enumerate(test.study_ids.tolist())}
    scored = frame["study_id"].map(place).dropna().sort_values(kind="stable").index
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
        test_metadata=study_metadata(frame.loc[scored]),
        score=score,
    )
    write_json(folder / "test_results.json", results)
    return points, results
