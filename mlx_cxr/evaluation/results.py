"""`test_results.json`: every figure of a model on test, a teacher's like a CNN's: fitted on validation, then measured.

Floats are null in the files where they are undefined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import pandas as pd
from scipy.special import expit

from mlx_cxr.core.config import Config
from mlx_cxr.core.files import sha256_file, write_record
from mlx_cxr.core.formatting import footer
from mlx_cxr.core.labels import LABELS, SCORING_PROTOCOLS
from mlx_cxr.data.manifest import Manifest
from mlx_cxr.data.pixel_store import PixelStore
from mlx_cxr.evaluation import shortcuts
from mlx_cxr.evaluation.abstention import AbstentionEntry, abstention_section
from mlx_cxr.evaluation.bootstrap import (
    LEVEL,
    IntervalEntry,
    PatientResamples,
    macro_interval,
    patient_bootstrap,
    patient_resamples,
    percentile_interval,
)
from mlx_cxr.evaluation.calibration import expected_calibration_error, fit_temperatures
from mlx_cxr.evaluation.conformal import fit_bands
from mlx_cxr.evaluation.image_statistics import study_statistics
from mlx_cxr.evaluation.metrics import (
    METRICS,
    both_classes,
    choose_thresholds,
    label_metrics,
    macro_auc,
    roc_auc_per_label,
    weighted_metrics,
)
from mlx_cxr.evaluation.operating_points import FILE, LabelPoint, OperatingPoints, label_entries, write_operating_points
from mlx_cxr.evaluation.predictions import VIEW_GROUPS, Predictions, write_predictions
from mlx_cxr.evaluation.shortcuts import METADATA, ControlEntry, DevicesEntry, ViewEntry, study_metadata

SCHEMA = 3
MEAN_OF_IMAGES = "the mean logit of its films"
MEANINGS = {
    "empty_negative": "uncertain (-1) and not mentioned (empty) count as absent",
    "empty_masked": "only explicit present and absent count; uncertain and not mentioned are left out",
}
"""`labels.SCORING_PROTOCOLS` in words."""


class Counts(TypedDict):
    """Size of a split."""

    studies: int
    patients: int


class ComparedMetrics(TypedDict):
    """Metrics of a finding, or their unweighted means; in a comparison, differences of two models."""

    roc_auc: IntervalEntry
    average_precision: IntervalEntry
    """Of the logits."""
    f1: IntervalEntry
    sensitivity: IntervalEntry
    specificity: IntervalEntry
    """Of the calibrated probability at the threshold."""
    brier: IntervalEntry
    """Of the calibrated probability; less is better."""


class Metrics(ComparedMetrics):
    """All metrics of a finding, or their unweighted means."""

    precision: IntervalEntry
    """At the threshold; null where nothing is above it, and its mean is over the other findings."""
    brier_uncalibrated: float | None
    ece_uncalibrated: float | None
    ece: float | None
    """Before temperature scaling, and calibration error after it. Without intervals, as the calibration error of a
    resample is biased upwards."""


class LabelMetrics(Metrics):
    """Metrics of a finding, with its number of studies."""

    positives: int
    negatives: int
    left_out: int
    """Studies with, without, and without a target under the protocol."""


class ModelMetrics(TypedDict):
    """Metrics of a model by finding, and their means."""

    per_label: dict[str, LabelMetrics]
    macro: Metrics


class ProtocolEntry(ModelMetrics):
    """Metrics under a protocol of `labels.SCORING_PROTOCOLS`."""

    meaning: str
    """Meaning of -1 and empty labels, in words."""
    macro_labels: list[str]
    """Findings of the means: those with both classes on test."""
    single_class: list[str]
    """Findings left out of every mean, as test has one class of them only."""


class BootstrapEntry(TypedDict):
    """Resampling that the intervals are from."""

    unit: Literal["patient"]
    samples: int
    seed: int
    level: float
    """Unit that is drawn, number of resamples, seed, and level of the intervals."""


class BinsEntry(TypedDict):
    """Bins of the calibration error."""

    count: int
    kind: Literal["equal_width"]


class ValidationEntry(TypedDict):
    """Figures on the split that chose weights, thresholds and temperatures: optimistic."""

    roc_auc: float | None
    """Mean over findings."""


class Results(TypedDict):
    """Every figure of a model on the test split, made from its predictions."""

    schema: int
    split: Literal["test"]
    run: str
    synthetic: bool
    notice: str
    """Format, split, name of the run, cohort, and the warning of every page."""
    unit: Literal["study"]
    """Of what is scored."""
    score: str
    """Score of a study, in words."""
    counts: dict[str, Counts]
    """Of `validate` and `test`."""
    fitted_under: str
    """Protocol under which thresholds and temperatures were fitted on validation."""
    threshold_rule: str
    """`youden` or `f1`."""
    operating_points: dict[str, LabelPoint]
    """As in `operating_points.json`."""
    bootstrap: BootstrapEntry
    calibration_bins: BinsEntry
    """Settings of the intervals, and of the calibration error."""
    protocols: dict[str, ProtocolEntry]
    """By protocol of the test targets."""
    abstention: AbstentionEntry
    """With the calls that are left."""
    validation: dict[str, ValidationEntry]
    """By protocol."""
    by_view: dict[str, ViewEntry]
    """View group (AP, PA, mixed, other; those that there are), under `fitted_under`."""
    pneumothorax_by_support_devices: DevicesEntry
    metadata_only: ControlEntry | None
    """Both under `fitted_under`; null without training metadata."""
    exposure_only: ControlEntry | None
    """What `image_statistics` and the metadata tell, under `fitted_under`; null where no images are scored."""
    provenance: dict[str, Any]
    """As `runs.provenance`."""
    files: dict[str, str]
    """SHA-256 of `predictions.csv` and `operating_points.json`, which were written with it."""


def evaluate(
    predictions: Predictions,
    points: OperatingPoints,
    *,
    run: str,
    synthetic: bool,
    samples: int,
    seed: int,
    bins: int,
    provenance: Mapping[str, Any],
    train: tuple[pd.DataFrame, np.ndarray] | None = None,
    test_metadata: pd.DataFrame | None = None,
    score: str = MEAN_OF_IMAGES,
) -> Results:
    """The content of `test_results.json`.

    Args:
        predictions: with the splits `validate`, which `points` were fitted on, and `test`.
        samples: bootstrap resamples; 0 gives no intervals.
        bins: of the calibration error.
        train: `shortcuts.study_metadata` of training, with `image_statistics.STATISTICS` or without, and its raw
            labels (N train, 14).
        test_metadata: the same of the test studies, in the order of the predictions.
        score: the score of a study, in words.

    Raises:
        PredictionsError: a split is missing.
    """
    validation, test = predictions.of_split("validate"), predictions.of_split("test")
    resamples = patient_resamples(test.patient_ids, samples, seed)
    policy = SCORING_PROTOCOLS[points.protocol]
    targets, logits = policy.apply(test.raw_labels), test.logits.astype(np.float64)
    metadata = exposure = None
    if train is not None and test_metadata is not None:
        known, train_targets = train[0][[*METADATA]], policy.apply(train[1])
        against = targets, logits, resamples
        metadata = shortcuts.against_control(known, train_targets, test_metadata[[*METADATA]], *against)
        if len(train[0].columns) > len(METADATA):
            exposure = shortcuts.against_control(train[0], train_targets, test_metadata, *against)
    return {
        "schema": SCHEMA,
        "split": "test",
        "run": run,
        "synthetic": synthetic,
        "notice": footer(synthetic),
        "unit": "study",
        "score": score,
        "counts": {
            part.split[0]: {"studies": len(part), "patients": len(set(part.patient_ids.tolist()))}
            for part in (validation, test)
        },
        "fitted_under": points.protocol,
        "threshold_rule": points.thresholds.rule,
        "operating_points": label_entries(points),
        "bootstrap": {"unit": "patient", "samples": samples, "seed": seed, "level": LEVEL},
        "calibration_bins": {"count": bins, "kind": "equal_width"},
        "protocols": {
            name: protocol_section(score_protocol(test, name, points, resamples), bins) for name in SCORING_PROTOCOLS
        },
        "abstention": abstention_section(validation, test, points, resamples),
        "validation": {
            name: {"roc_auc": macro_auc(roc_auc_per_label(policy.apply(validation.raw_labels), validation.logits))}
            for name, policy in SCORING_PROTOCOLS.items()
        },
        "by_view": shortcuts.auc_by_group(targets, logits, test.view_groups(), VIEW_GROUPS, resamples),
        "pneumothorax_by_support_devices": shortcuts.pneumothorax_by_devices(targets, logits, resamples),
        "metadata_only": metadata,
        "exposure_only": exposure,
        "provenance": dict(provenance),
    }


@dataclass(frozen=True)
class ProtocolScores:
    """A model under one protocol on one set of studies, with replicates that other models' can be subtracted from.

    Attributes:
        protocol: a key of `labels.SCORING_PROTOCOLS`.
        targets: float64 (N, 14), each 1, 0 or NaN (left out).
        logits: float64 (N, 14).
        probabilities: float64 (N, 14), calibrated.
        values: float64 (14, 7), the metrics in the order of `METRICS`, NaN where undefined.
        replicates: float64 (B, 14, 7), the same under each resample of patients.
    """

    protocol: str
    targets: np.ndarray
    logits: np.ndarray
    probabilities: np.ndarray
    values: np.ndarray
    replicates: np.ndarray

    @property
    def scored(self) -> np.ndarray:
        """bool (14,): the labels with both classes, which a mean over labels takes."""
        return both_classes(self.targets)


def score_protocol(
    test: Predictions, protocol: str, points: OperatingPoints, resamples: PatientResamples
) -> ProtocolScores:
    """Every metric of every label under a protocol of `labels.SCORING_PROTOCOLS`, and its replicates.

    Models that share the resamples of patients can be compared replicate by replicate.
    """
    targets = SCORING_PROTOCOLS[protocol].apply(test.raw_labels).astype(np.float64)
    logits = test.logits.astype(np.float64)
    probabilities = points.calibration.probabilities(logits)
    columns = [
        (targets[:, k], logits[:, k], probabilities[:, k], points.thresholds.values[k]) for k in range(len(LABELS))
    ]

    def statistic(weights: np.ndarray) -> np.ndarray:
        return np.stack([weighted_metrics(*column, weights) for column in columns], axis=1)

    values = np.array([list(label_metrics(*column).values()) for column in columns])
    return ProtocolScores(protocol, targets, logits, probabilities, values, patient_bootstrap(statistic, resamples))


def protocol_section(scores: ProtocolScores, bins: int) -> ProtocolEntry:
    """An entry of `protocols` in `test_results.json`."""
    values, replicates, scored = scores.values, scores.replicates, scores.scored
    triples = list(zip(scores.targets.T, expit(scores.logits).T, scores.probabilities.T, strict=True))
    numbers = {
        "brier_uncalibrated": [label_metrics(y, raw, raw, 0.5)["brier"] for y, raw, _ in triples],
        "ece_uncalibrated": [expected_calibration_error(raw, y, bins) for y, raw, _ in triples],
        "ece": [expected_calibration_error(p, y, bins) for y, _, p in triples],
    }
    per_label = {}
    for k, label in enumerate(LABELS):
        y = scores.targets[:, k]
        per_label[label] = {
            "positives": int((y == 1).sum()),
            "negatives": int((y == 0).sum()),
            "left_out": int(np.isnan(y).sum()),
            **{m: percentile_interval(float(values[k, i]), replicates[:, k, i]).plain() for i, m in enumerate(METRICS)},
            **{key: column[k] for key, column in numbers.items()},
        }
    masked = np.where(scored[:, None], values, np.nan)
    macro = {metric: macro_interval(masked[:, i], replicates[:, :, i]).plain() for i, metric in enumerate(METRICS)}
    macro |= {key: macro_auc(np.where(scored, column, np.nan)) for key, column in numbers.items()}
    return {
        "meaning": MEANINGS[scores.protocol],
        "per_label": per_label,
        "macro": macro,
        "macro_labels": [label for label, there in zip(LABELS, scored, strict=True) if there],
        "single_class": [label for label, there in zip(LABELS, scored, strict=True) if not there],
    }


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
    store: PixelStore | None = None,
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
        store: the images that were scored, for what their exposure alone would tell.

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

    # What is known of the training studies, and of the test studies in the order of their predictions.
    def known(rows: pd.DataFrame) -> pd.DataFrame:
        table = study_metadata(rows)
        if store is None:
            return table
        statistics = study_statistics(store, rows).reindex(rows["study_id"].drop_duplicates())
        return pd.concat([table, statistics.reset_index(drop=True)], axis=1)

    frame = manifest.frame
    in_training = (frame["split"] == "train").to_numpy() & manifest.labelled
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
        train=(known(frame[in_training]), manifest.raw_labels[first]),
        test_metadata=known(frame.loc[scored]),
        score=score,
    )
    results["files"] = {name: sha256_file(folder / name) for name in ("predictions.csv", FILE)}
    write_record(folder / "test_results.json", results)
    return points, results
