"""A frozen run on a cohort that it never saw: its figures there beside its own, and how the cohorts differ.

Nothing is fitted on the other cohort: temperatures, thresholds and bands are those of the run's own validation split.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mlx_cxr.core.files import RecordError, read_record, sha256_file
from mlx_cxr.core.labels import LABELS
from mlx_cxr.core.runs import RunRecord
from mlx_cxr.data.tables import DataError
from mlx_cxr.evaluation import operating_points
from mlx_cxr.evaluation.bootstrap import IntervalEntry, macro_interval, patient_resamples, percentile_interval
from mlx_cxr.evaluation.feature_distance import FeatureDistance, feature_distance
from mlx_cxr.evaluation.metrics import METRICS
from mlx_cxr.evaluation.operating_points import OperatingPoints
from mlx_cxr.evaluation.predictions import Predictions
from mlx_cxr.evaluation.results import ProtocolScores, score_protocol

SCHEMA = 2
FOLDER, FILE = "external", "external_results.json"
"""In a run's folder, with a folder for each cohort in between."""
FOLDS = 5
_AUC = METRICS.index("roc_auc")

ExternalVerdict = Literal["below", "above", "not told apart", "no interval"]


class FindingEntry(TypedDict):
    """ROC-AUC of a finding on the run's own test split and on the other cohort."""

    own: IntervalEntry
    external: IntervalEntry
    verdict: ExternalVerdict
    """The figure on the other cohort against that on the own one: its interval excludes it, or does not."""


class CountedEntry(FindingEntry):
    """The same, with how many there are."""

    positives: int
    negatives: int
    own_prevalence: float
    external_prevalence: float
    """Share of present among present and absent, on the test split and on the other cohort."""


class AgainstOwn(TypedDict):
    """Both cohorts side by side, over the findings that have both classes in each."""

    protocol: str
    findings: list[str]
    per_label: dict[str, CountedEntry]
    macro: FindingEntry


class ExternalCounts(TypedDict):
    """Studies scored on another cohort."""

    studies: int
    patients: int
    shared_patients: int | None
    """Patients left out, as the run's own cohort has their ids too; null where that could not be checked."""


class ExternalEntry(TypedDict):
    """A model on another cohort, from the `external_results.json` of its run."""

    manifest: str
    split: str
    counts: ExternalCounts
    against_own: AgainstOwn
    """SHA-256 of that cohort's manifest, the splits of it that were scored, how many studies, and the figures."""


class StatisticShift(TypedDict):
    """Mean of an image statistic on both cohorts; the difference in standard deviations of the own one."""

    own: float
    external: float
    difference: float


class FeatureShift(TypedDict):
    """Distances in the features of the run's network."""

    external: FeatureDistance
    own: FeatureDistance
    """Of the other cohort, and of the run's own validation split, from its own test split."""


class Shift(TypedDict):
    """Differences between the images of two cohorts in what shows no finding."""

    per_statistic: dict[str, StatisticShift]
    told_apart: float
    """ROC-AUC, cross-validated by patient, of a regression that tells the cohorts apart by `image_statistics`."""
    features: FeatureShift


def cohorts_of(folder: str | Path) -> list[str]:
    """Names of the other cohorts that a run's folder has results on, in whatever state the run was then."""
    return [path.parent.name for path in sorted(Path(folder).glob(f"{FOLDER}/*/{FILE}"))]


def results_path(folder: str | Path, cohort: str) -> Path:
    """The results of a run's folder on another cohort, which need not be there."""
    return Path(folder) / FOLDER / cohort / FILE


def evaluate_command(run: str, cohort: str) -> str:
    """The command that scores a run on another cohort, in Markdown, and its configuration."""
    return f"`python -m mlx_cxr.evaluate_external --run {run} --config …` with the configuration named `{cohort}`"


def read_external(run: RunRecord, cohort: str) -> dict[str, Any]:
    """`external_results.json` of a run on another cohort.

    Raises:
        RecordError: there is none, it cannot be used, or weights or operating points of the run are no longer those
            that it is of; names the command that makes it.
    """
    path = results_path(run.folder, cohort)
    again = f"run {evaluate_command(run.folder.name, cohort)}"
    if not path.exists():
        raise RecordError(f"{path} is missing; {again}")
    results = read_record(path)
    if results.get("schema") != SCHEMA:
        raise RecordError(f"{path} is not of schema {SCHEMA}; {again}")
    for role, file in {"weights": run.weights, "operating_points": run.folder / operating_points.FILE}.items():
        try:
            then = results["provenance"]["inputs"][role]["sha256"]
        except (KeyError, TypeError):
            raise RecordError(f"{path} lacks 'provenance.inputs.{role}.sha256'; {again}") from None
        now = sha256_file(file) if file.exists() else "missing"
        if now != then:
            raise RecordError(f"{path} is of another state of the run: {file} was {then[:12]}, is {now[:12]}; {again}")
    return results


def external_of(run: RunRecord) -> dict[str, dict[str, Any]]:
    """Results of a run's present state on other cohorts, by cohort; those that cannot be used are passed over."""
    found = {}
    for cohort in cohorts_of(run.folder):
        with suppress(RecordError):
            found[cohort] = read_external(run, cohort)
    return found


def external_entry(results: Mapping[str, Any]) -> ExternalEntry:
    """The part of `external_results.json` that a comparison shows."""
    return {
        "manifest": results["provenance"]["inputs"]["manifest"]["sha256"],
        **{key: results[key] for key in ("split", "counts", "against_own")},
    }


def against_own(
    own: Predictions, external: Predictions, points: OperatingPoints, samples: int, seed: int
) -> AgainstOwn:
    """A run's ROC-AUC on its own test split and on another cohort.

    Args:
        own: of the test split.
        external: of the other cohort.
        points: as fitted on the run's validation split.
        samples, seed: of the bootstrap by patient, of each cohort by itself.

    Raises:
        DataError: no finding has both classes in both.
    """
    protocol = points.protocol
    both = [
        score_protocol(part, protocol, points, patient_resamples(part.patient_ids, samples, seed))
        for part in (own, external)
    ]
    shared = both[0].scored & both[1].scored
    if not shared.any():
        raise DataError(
            "no finding is both present and absent in both cohorts: the run's own test split has "
            f"{_names(both[0].scored)}, the other cohort {_names(both[1].scored)}; are its labels mapped?"
        )

    def entry(*intervals: IntervalEntry) -> FindingEntry:
        return {"own": intervals[0], "external": intervals[1], "verdict": verdict(*intervals)}

    per_label = {}
    for k, label in enumerate(LABELS):
        if shared[k]:
            ours, theirs = (
                percentile_interval(float(one.values[k, _AUC]), one.replicates[:, k, _AUC]).plain() for one in both
            )
            counts = [_counts(one.targets[:, k]) for one in both]
            per_label[label] = entry(ours, theirs) | {
                "positives": counts[1][0],
                "negatives": counts[1][1],
                "own_prevalence": counts[0][0] / sum(counts[0]),
                "external_prevalence": counts[1][0] / sum(counts[1]),
            }
    return {
        "protocol": protocol,
        "findings": [label for label, there in zip(LABELS, shared, strict=True) if there],
        "per_label": per_label,
        "macro": entry(*(_macro(one, shared) for one in both)),
    }


def verdict(own: Mapping[str, Any], external: Mapping[str, Any]) -> ExternalVerdict:
    """The verdict on the figure of the own cohort: below, above or in the interval on the other one."""
    if external["low"] is None or not np.isfinite(external["low"]):
        return "no interval"
    if external["high"] < own["value"]:
        return "below"
    return "above" if external["low"] > own["value"] else "not told apart"


def cohort_shift(
    own: pd.DataFrame, external: pd.DataFrame, patients: np.ndarray, features: Mapping[str, np.ndarray], seed: int
) -> Shift:
    """Differences between two cohorts in their image statistics, and in a network's features.

    Args:
        own, external: `image_statistics.study_statistics` of studies of each.
        patients: (N own + N external,) str, the patient of each row, in that order.
        features: `test` and `validate`, of the own splits, and `external`: float (P, D), of one image of each patient.
        seed: of the folds and permutations.
    """
    spread = own.std(ddof=0).replace(0, np.nan)
    difference = ((external.mean() - own.mean()) / spread).fillna(0)
    names = [*own.columns]
    values, cohort = pd.concat([own, external]).to_numpy(), np.repeat([0, 1], [len(own), len(external)])
    groups = np.char.add(np.where(cohort == 1, "external ", "own "), patients.astype(str))
    folds = min(FOLDS, *(len(set(groups[cohort == side].tolist())) for side in (0, 1)))
    told_apart = float("nan")
    if folds > 1:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        split = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        scores = cross_val_predict(model, values, cohort, groups=groups, cv=split, method="decision_function")
        told_apart = float(roc_auc_score(cohort, scores))
    return {
        "per_statistic": {
            name: {
                "own": float(own[name].mean()),
                "external": float(external[name].mean()),
                "difference": float(difference[name]),
            }
            for name in names
        },
        "told_apart": told_apart,
        "features": {
            "external": feature_distance(features["external"], features["test"], seed),
            "own": feature_distance(features["validate"], features["test"], seed),
        },
    }


def _macro(scores: ProtocolScores, shared: np.ndarray) -> IntervalEntry:
    return macro_interval(np.where(shared, scores.values[:, _AUC], np.nan), scores.replicates[:, :, _AUC]).plain()


def _counts(targets: np.ndarray) -> tuple[int, int]:
    return int((targets == 1).sum()), int((targets == 0).sum())


def _names(there: np.ndarray) -> str:
    return ", ".join(label for label, one in zip(LABELS, there, strict=True) if one) or "none"
