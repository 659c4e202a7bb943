"""`final_comparison.json`: CNN, teacher, student and controls on the same test studies, from their predictions.

All models share the resamples of patients, and a difference is taken replicate by replicate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np

from mlx_cxr.core.formatting import footer
from mlx_cxr.core.labels import LABELS, SCORING_PROTOCOLS
from mlx_cxr.evaluation.bootstrap import (
    LEVEL,
    MIN_REPLICATES,
    IntervalEntry,
    PatientResamples,
    auc_intervals,
    macro_interval,
    patient_resamples,
    percentile_interval,
)
from mlx_cxr.evaluation.delong import holm, paired_delong
from mlx_cxr.evaluation.external import ExternalEntry, external_entry
from mlx_cxr.evaluation.metrics import METRICS
from mlx_cxr.evaluation.predictions import Predictions
from mlx_cxr.evaluation.results import (
    BinsEntry,
    BootstrapEntry,
    ComparedMetrics,
    Counts,
    Metrics,
    ModelMetrics,
    ProtocolScores,
    protocol_section,
    score_protocol,
)
from mlx_cxr.evaluation.scored_runs import BESIDE, ScoredRun, check_cohorts, check_teacher, shared_studies

SCHEMA = 3
COMPARED: tuple[str, ...] = tuple(metric for metric in METRICS if metric != "precision")
"""Metrics whose differences are given: precision is undefined where a model calls nothing, so that the means of two
models would be over different labels."""
PAIRS: tuple[tuple[str, str], ...] = (("student", "cnn"), ("student", "teacher"), ("teacher", "cnn"))
LEAST_PATIENTS = 5
"""Patients with a finding, and without it, that test needs for the finding to count in a verdict."""
CHANCE = 0.5
"""ROC-AUC of a model that knows nothing."""

_COLUMN = {metric: METRICS.index(metric) for metric in COMPARED}

Verdict = Literal["better", "worse", "within noise", "no interval"]


class ModelEntry(TypedDict):
    """A model that was compared."""

    run: str
    role: str
    title: str
    parameters: int | None
    trainable: int | None
    ms_per_sample: float | None
    """Numbers of parameters, and time of a prediction."""
    cost: dict[str, Any] | None
    """Content of `cost.json`."""
    make_cost: str | None
    """Command that makes a `cost.json` that lacks."""
    external: dict[str, ExternalEntry]
    """By each other cohort that its present state was scored on."""


class TeacherEntry(ModelEntry):
    """A teacher."""

    reads: str
    modality: str
    """As `teacher.json` has them."""
    zero_shot_auc: float | None
    tuned_auc: float | None
    """Macro ROC-AUC on validation."""
    reads_label_source: bool
    reads_findings: bool
    """It may read the source of the labels, or the findings and not that source."""


class StudentEntry(ModelEntry):
    """A student or a control, with its settings of `config.distillation`."""

    targets: str
    alpha: float
    temperature: float
    init: str


class CompareCounts(Counts):
    """Studies that all of the models scored."""

    runs: dict[str, RunCounts]


class RunCounts(TypedDict):
    """Test studies of a run, and those left out as another run has no score for them."""

    test_studies: int
    left_out: int


class LabelDifferences(ComparedMetrics):
    """Differences on a finding."""

    p_value: float | None
    p_holm: float | None
    """DeLong's test by patient, and with Holm's correction over the findings of this pair."""


class ControlEntry(TypedDict):
    """The student minus a control."""

    macro: ComparedMetrics
    """Of the means."""
    verdict: Verdict
    """Of `judged`: the interval lies above 0, below 0, or reaches it."""
    judged: IntervalEntry
    """Macro ROC-AUC over `judged_labels`: the findings that enough patients have, and enough have not."""
    judged_labels: list[str]
    without_each: dict[str, IntervalEntry]
    """The same without one of them."""
    rests_on: list[str]
    """Those without any one of which a better or worse model would not be told from the other."""


class DifferenceEntry(ControlEntry):
    """The first model minus the second."""

    per_label: dict[str, LabelDifferences]


class RetentionEntry(TypedDict):
    """Part of the teacher that the student keeps, by macro ROC-AUC."""

    share: IntervalEntry
    """Student / teacher."""
    chance_share: float | None
    """Share that a model that knows nothing would keep, 0.5 / teacher."""
    gap: IntervalEntry
    gain: IntervalEntry
    """Teacher - CNN, and student - CNN."""
    gap_closed: IntervalEntry | None
    """Gain / gap; null where the gap is not clearly positive."""
    gap_closed_undefined: str | None
    """Reason for that null, in words."""


class ComparedProtocol(TypedDict):
    """Models and differences under a protocol of `labels.SCORING_PROTOCOLS`."""

    meaning: str
    macro_labels: list[str]
    single_class: list[str]
    """As in `test_results.json`."""
    models: dict[str, ModelMetrics]
    """By run."""
    differences: dict[str, DifferenceEntry]
    """`student_minus_cnn`, `student_minus_teacher`, `teacher_minus_cnn`."""
    controls: dict[str, ControlEntry]
    """By run."""
    retention: RetentionEntry


class VerdictInterval(IntervalEntry):
    """A difference with its verdict."""

    verdict: Verdict


class GradedTeacher(TeacherEntry):
    """A teacher among others that may read something else."""

    macro: Metrics
    """Of its means."""
    minus_teacher: VerdictInterval | None
    """Macro ROC-AUC minus that of the teacher; null for this one itself."""


class GradedEntry(TypedDict):
    """Teachers on the studies that all of them scored."""

    counts: CompareCounts
    protocol: str
    models: list[GradedTeacher]
    """Studies, protocol of the targets, and the teachers, first the one compared."""


class TeacherGate(TypedDict):
    """The teacher beats the CNN on macro ROC-AUC."""

    protocol: str
    difference: IntervalEntry
    interval_above_0: bool
    met: bool
    """Teacher minus CNN on validation; the gate is met by the value, not by the interval."""
    test: IntervalEntry
    """The same on test, which decides nothing."""


class RetentionGate(TypedDict):
    """The student keeps enough of the teacher's macro ROC-AUC."""

    protocol: str
    share: IntervalEntry
    minimum: float
    interval_above_minimum: bool
    met: bool
    """Student / teacher on validation; the gate is met by the value, not by the interval."""
    test: IntervalEntry
    """The same on test, which decides nothing."""


class Gates(TypedDict):
    """Conditions that the experiment sets itself, decided on the validation studies that CNN, teacher and student
    share, which each of them was selected on, too."""

    teacher_beats_cnn: TeacherGate
    retention: RetentionGate


class Comparison(TypedDict):
    """CNN, teacher, student and controls on the same test studies."""

    schema: int
    experiment: str
    synthetic: bool
    notice: str
    unit: Literal["study"]
    """Format, name of the configuration, cohort, the warning of every page, and the unit that is scored."""
    manifest: str
    """SHA-256."""
    counts: CompareCounts
    """Of `models`."""
    fitted_under: str
    threshold_rule: str
    """The same for all runs."""
    bootstrap: BootstrapEntry
    calibration_bins: BinsEntry
    """As in `test_results.json`."""
    models: list[ModelEntry | TeacherEntry | StudentEntry]
    """In the order of display."""
    cohorts: list[str]
    """Other cohorts that the tables show."""
    protocols: dict[str, ComparedProtocol]
    """By protocol of the test targets."""
    graded_teachers: GradedEntry | None
    """Null without any."""
    gates: Gates
    """Under `fitted_under`."""
    provenance: dict[str, Any]
    """As `runs.provenance`."""


def compare(
    runs: Sequence[ScoredRun],
    *,
    experiment: str,
    min_retention: float,
    samples: int,
    seed: int,
    bins: int,
    provenance: Mapping[str, Any],
    cohorts: Sequence[str] = (),
) -> Comparison:
    """The content of `final_comparison.json`.

    Args:
        runs: one `cnn`, one `teacher`, one `student`, and any `control`, `graded teacher` and `bag of words`.
        min_retention: least share of the teacher's macro ROC-AUC that the student should keep.
        samples: bootstrap resamples; 0 gives no intervals.
        bins: of the calibration error.
        cohorts: names of other cohorts to show.

    Raises:
        ComparisonError: the runs cannot be compared; see `scored_runs.check_teacher`, `shared_studies` and
            `check_cohorts`.
    """
    main = [run for run in runs if run.role not in BESIDE]
    check_teacher(main)
    arms = {run.role: run for run in main if run.role != "control"}
    study_ids = shared_studies(main)
    check_cohorts(runs, cohorts)
    settings = arms["cnn"].settings
    fitted_under = settings["fitted_under"]
    graded = graded_teachers(runs, arms["teacher"], fitted_under, samples, seed, bins)
    resamples = patient_resamples(arms["cnn"].on(study_ids).patient_ids, samples, seed)
    protocols = {name: _protocol(main, arms, study_ids, name, resamples, bins) for name in SCORING_PROTOCOLS}
    return {
        "schema": SCHEMA,
        "experiment": experiment,
        "synthetic": settings["synthetic"],
        "notice": footer(settings["synthetic"]),
        "unit": "study",
        "manifest": settings["manifest"],
        "counts": _counts(main, study_ids),
        "fitted_under": fitted_under,
        "threshold_rule": settings["threshold_rule"],
        "bootstrap": {"unit": "patient", "samples": samples, "seed": seed, "level": LEVEL},
        "calibration_bins": {"count": bins, "kind": "equal_width"},
        "models": [_about(run) for run in main],
        "cohorts": list(dict.fromkeys(cohorts)),
        "protocols": protocols,
        "graded_teachers": graded,
        "gates": _gates(arms, protocols[fitted_under], fitted_under, min_retention, samples, seed),
        "provenance": provenance,
    }


def verdict(difference: Mapping[str, Any]) -> Verdict:
    """Verdict of the interval of a difference where more is better: above 0, below 0, or reaching it."""
    low, high = difference["low"], difference["high"]
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return "no interval"
    if low > 0:
        return "better"
    return "worse" if high < 0 else "within noise"


def retention(student: np.ndarray, teacher: np.ndarray, cnn: np.ndarray) -> RetentionEntry:
    """Part of the teacher that the student keeps, by macro ROC-AUC.

    Args:
        student, teacher, cnn: (1 + B,) macro ROC-AUC, first on the data, then on each resample of patients.
    """
    gap, gain = teacher - cnn, student - cnn
    share = np.divide(student, teacher, out=np.full(len(student), np.nan), where=teacher > 0)
    gap_interval = percentile_interval(float(gap[0]), gap[1:])
    closed, why = None, None
    if math.isnan(gap[0]) or gap[0] <= 0:
        why = "the teacher is not above the CNN"
    elif math.isnan(gap_interval.low):
        why = "there is no interval of the gap"
    elif gap_interval.low <= 0:
        why = "the interval of the gap reaches 0, so the quotient has no bounds"
    else:
        closed = ratio_interval(gain, gap)
    return {
        "share": percentile_interval(float(share[0]), share[1:]).plain(),
        "chance_share": float(CHANCE / teacher[0]) if teacher[0] > 0 else math.nan,
        "gap": gap_interval.plain(),
        "gain": percentile_interval(float(gain[0]), gain[1:]).plain(),
        "gap_closed": closed,
        "gap_closed_undefined": why,
    }


def ratio_interval(over: np.ndarray, under: np.ndarray) -> IntervalEntry:
    """A quotient and its 95 % interval, where the denominator's own interval lies above 0.

    The interval holds each r for which the percentile interval of over - r * under reaches 0: Fieller's set, with the
    bootstrap in the place of the normal distribution. So a replicate whose denominator is not positive counts as
    beyond the end that its numerator points to.

    Args:
        over: (1 + B,) numerators, first on the data, then on each resample.
        under: (1 + B,) denominators.

    Returns:
        As `bootstrap.Interval.plain`; no bounds with fewer than `MIN_REPLICATES` replicates.
    """
    value, over, under, drawn = over[0] / under[0], over[1:], under[1:], len(over) - 1
    valid = ~np.isnan(over) & ~np.isnan(under)
    over, under = over[valid], under[valid]
    low = high = math.nan
    if len(over) >= MIN_REPLICATES:
        ratios = np.divide(over, under, out=np.copysign(np.inf, over), where=under > 0)
        tail = (1 - LEVEL) / 2
        low = np.quantile(ratios, tail, method="lower")
        high = np.quantile(ratios, 1 - tail, method="higher")
    bounded = np.isfinite(low) and np.isfinite(high)
    ends = (float(low), float(high)) if bounded else (math.nan, math.nan)
    return {"value": float(value), "low": ends[0], "high": ends[1], "replicates": len(over), "drawn": drawn}


def _protocol(
    main: Sequence[ScoredRun],
    arms: Mapping[str, ScoredRun],
    study_ids: np.ndarray,
    name: str,
    resamples: PatientResamples,
    bins: int,
) -> ComparedProtocol:
    scores = {run.name: score_protocol(run.on(study_ids), name, run.points, resamples) for run in main}
    sections = {run: protocol_section(one, bins) for run, one in scores.items()}
    patients = arms["cnn"].on(study_ids).patient_ids
    of = {role: scores[run.name] for role, run in arms.items()}
    controls = {}
    for run in main:
        if run.role == "control":
            controls[run.name] = _judged(of["student"], scores[run.name], patients)
    first = sections[arms["cnn"].name]
    return {
        **{key: first[key] for key in ("meaning", "macro_labels", "single_class")},
        "models": {run: {key: section[key] for key in ("macro", "per_label")} for run, section in sections.items()},
        "differences": {f"{a}_minus_{b}": _difference(of[a], of[b], patients) for a, b in PAIRS},
        "controls": controls,
        "retention": retention(*(_macro_auc(of[role]) for role in ("student", "teacher", "cnn"))),
    }


def _difference(first: ProtocolScores, second: ProtocolScores, patient_ids: np.ndarray) -> DifferenceEntry:
    columns = zip(first.targets.T, first.logits.T, second.logits.T, strict=True)
    p_values = np.array([paired_delong(*column, patient_ids).p_value for column in columns])
    values, replicates = first.values - second.values, first.replicates - second.replicates
    per_label = {}
    for k, (label, p, adjusted) in enumerate(zip(LABELS, p_values, holm(p_values), strict=True)):
        per_label[label] = {
            **{m: percentile_interval(float(values[k, i]), replicates[:, k, i]).plain() for m, i in _COLUMN.items()},
            **{"p_value": float(p), "p_holm": float(adjusted)},
        }
    return {**_judged(first, second, patient_ids), "per_label": per_label}


def _judged(first: ProtocolScores, second: ProtocolScores, patient_ids: np.ndarray) -> ControlEntry:
    """A macro difference with its verdict, and the findings that it rests on."""
    enough = enough_patients(first.targets, patient_ids)
    column = _COLUMN["roc_auc"]
    values, replicates = (a[..., column] for a in (first.values - second.values, first.replicates - second.replicates))

    def over(labels: np.ndarray) -> IntervalEntry:
        return macro_interval(np.where(labels, values, np.nan), replicates).plain()

    judged = over(enough)
    found = verdict(judged)
    clear = found in ("better", "worse")
    without = {LABELS[k]: over(enough & (np.arange(len(LABELS)) != k)) for k in np.flatnonzero(enough)}
    return {
        "macro": _macro_difference(first, second),
        "verdict": found,
        "judged": judged,
        "judged_labels": list(without),
        "without_each": without,
        "rests_on": [label for label, entry in without.items() if clear and verdict(entry) != found],
    }


def enough_patients(targets: np.ndarray, patient_ids: np.ndarray) -> np.ndarray:
    """bool (14,): the findings that at least `LEAST_PATIENTS` patients have, and as many have a study without.

    Args:
        targets: (N, 14), each 1, 0 or NaN.
        patient_ids: (N,) of the studies.
    """
    counts = [[len(set(patient_ids[column == value].tolist())) for value in (0, 1)] for column in targets.T]
    return (np.array(counts) >= LEAST_PATIENTS).all(axis=1)


def _macro_difference(first: ProtocolScores, second: ProtocolScores) -> ComparedMetrics:
    values = np.where(first.scored[:, None], first.values - second.values, np.nan)
    replicates = first.replicates - second.replicates
    return {metric: macro_interval(values[:, i], replicates[:, :, i]).plain() for metric, i in _COLUMN.items()}


def _macro_auc(scores: ProtocolScores) -> np.ndarray:
    column = _COLUMN["roc_auc"]
    return _macro(scores.values[:, column], scores.replicates[:, :, column])


def _macro(values: np.ndarray, replicates: np.ndarray) -> np.ndarray:
    """(1 + B,): means over the labels of (L,) and (B, L) ROC-AUC, on the data, then on each resample; NaN without a
    label that has both classes."""
    scored = ~np.isnan(values)
    if not scored.any():
        return np.full(1 + len(replicates), np.nan)
    return np.concatenate([values[None], replicates])[:, scored].mean(axis=1)


def graded_teachers(
    runs: Sequence[ScoredRun], teacher: ScoredRun, protocol: str, samples: int, seed: int, bins: int
) -> GradedEntry | None:
    """Teachers by what they may read, on the studies that all of them scored; None if there is one only.

    Args:
        runs: any; those of a further teacher and of a bag of words are taken.
        teacher: the one that the others are held against; among `runs` or not.
        protocol, samples, seed, bins: as `compare`.
    """
    teachers = [teacher, *(run for run in runs if run.role in BESIDE)]
    if len(teachers) == 1:
        return None
    study_ids = shared_studies(teachers)
    tests: list[Predictions] = [run.on(study_ids) for run in teachers]
    resamples = patient_resamples(tests[0].patient_ids, samples, seed)
    scores = [score_protocol(test, protocol, run.points, resamples) for run, test in zip(teachers, tests, strict=True)]
    models = []
    for run, one in zip(teachers, scores, strict=True):
        difference = _macro_difference(one, scores[0])["roc_auc"]
        entry = _about(run) | {"macro": protocol_section(one, bins)["macro"], "minus_teacher": None}
        if run is not teacher:
            entry["minus_teacher"] = difference | {"verdict": verdict(difference)}
        models.append(entry)
    return {"counts": _counts(teachers, study_ids), "protocol": protocol, "models": models}


def _gates(
    arms: Mapping[str, ScoredRun],
    section: Mapping[str, Any],
    protocol: str,
    min_retention: float,
    samples: int,
    seed: int,
) -> Gates:
    study_ids = shared_studies(list(arms.values()), "validate")
    parts = {role: run.on(study_ids, "validate") for role, run in arms.items()}
    resamples = patient_resamples(parts["cnn"].patient_ids, samples, seed)
    targets = SCORING_PROTOCOLS[protocol].apply(parts["cnn"].raw_labels)
    macro = {role: _macro(*auc_intervals(targets, part.logits, resamples)) for role, part in parts.items()}
    kept = retention(*(macro[role] for role in ("student", "teacher", "cnn")))
    difference, share = kept["gap"], kept["share"]
    return {
        "teacher_beats_cnn": {
            "protocol": protocol,
            "difference": difference,
            "interval_above_0": verdict(difference) == "better",
            "met": bool(difference["value"] > 0),
            "test": section["differences"]["teacher_minus_cnn"]["macro"]["roc_auc"],
        },
        "retention": {
            "protocol": protocol,
            "share": share,
            "minimum": min_retention,
            "interval_above_minimum": bool(share["low"] >= min_retention),
            "met": bool(share["value"] >= min_retention),
            "test": section["retention"]["share"],
        },
    }


def _about(run: ScoredRun) -> ModelEntry:
    cost = run.cost or {"parameters": {"total": None, "trainable": None}, "ms_per_sample": None}
    about = {
        "run": run.name,
        "role": run.role,
        "title": run.title,
        "parameters": cost["parameters"]["total"],
        "trainable": cost["parameters"]["trainable"],
        "ms_per_sample": cost["ms_per_sample"],
        "cost": run.cost,
        "make_cost": None if run.cost else run.command("cost.json"),
        "external": {cohort: external_entry(results) for cohort, results in run.external.items()},
    }
    if run.teacher is not None:
        about |= {key: run.teacher.get(key) for key in ("reads", "modality", "zero_shot_auc", "tuned_auc")}
        about |= {"reads_label_source": run.reads_label_source, "reads_findings": run.reads_findings}
    elif run.role != "cnn":
        about |= {key: run.config["distillation"].get(key) for key in ("targets", "alpha", "temperature", "init")}
    return about


def _counts(runs: Sequence[ScoredRun], study_ids: np.ndarray) -> CompareCounts:
    there = {run.name: len(run.test) for run in runs}
    return {
        "studies": len(study_ids),
        "patients": len(set(runs[0].on(study_ids).patient_ids.tolist())),
        "runs": {run: {"test_studies": n, "left_out": n - len(study_ids)} for run, n in there.items()},
    }
