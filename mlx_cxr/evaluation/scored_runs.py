"""Run folders as a comparison reads them, and the studies of a split that several of them share.

Read are `config.json`, `predictions.csv` and `test_results.json` of each run, `teacher.json` of a teacher, and
`cost.json` where there is one. Nothing is fitted here: temperatures and thresholds are those of each run's own
validation split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import RecordError, read_record, sha256_file
from mlx_cxr.core.labels import LABELS, label_word
from mlx_cxr.core.runs import bag_of_words_name, open_run
from mlx_cxr.evaluation.external import (
    cohorts_of,
    evaluate_command,
    external_entry,
    external_of,
    read_external,
    results_path,
)
from mlx_cxr.evaluation.operating_points import OperatingPoints, points_of_entries
from mlx_cxr.evaluation.predictions import Predictions, read_predictions
from mlx_cxr.evaluation.results import SCHEMA

Role = Literal["cnn", "teacher", "student", "control", "graded teacher", "bag of words"]
Split = Literal["validate", "test"]
BESIDE: tuple[Role, ...] = ("graded teacher", "bag of words")
"""Roles of runs that are compared with the teacher alone."""

LABEL_SOURCES = frozenset(("impression", "last_paragraph", "whole"))
"""Sections of a report that hold, or may be, what MIMIC-CXR's labels were taken from: first of all the impression."""

SOFT_LABELS = "teacher_soft_labels.npy"
"""Among the inputs of a run that a teacher taught, in the teacher's folder."""

_STAGES: Mapping[Role, tuple[str, str]] = {
    "cnn": ("train_cnn --run_name", "evaluate_cnn --run_name"),
    "teacher": ("lfm_finetune --run_name", "cache_teacher_outputs --teacher_run"),
    "student": ("distillation --run_name", "evaluate_cnn --run_name"),
    "control": ("distillation --targets … --run_name", "evaluate_cnn --run_name"),
    "graded teacher": ("lfm_finetune --run_name", "cache_teacher_outputs --teacher_run"),
    "bag of words": ("bag_of_words", "bag_of_words"),
}
"""Stages that train and score a run of each role."""


class ComparisonError(UserError, ValueError):
    """Runs that cannot be set side by side; names the files and what each of them says."""


@dataclass(frozen=True)
class ScoredRun:
    """A run with its predictions, and what was fitted on its validation split.

    Attributes:
        folder: the run's.
        role: its role in the comparison.
        validation: its predictions on the validation split.
        test: those on the test split.
        points: temperatures and thresholds, and the protocol they were fitted under.
        settings: must be the same in all runs: `manifest` (SHA-256), `synthetic`, `fitted_under`, `threshold_rule`.
        config: the configuration that it was trained with, as plain data.
        soft_labels: `path` and `sha256` of the soft labels that it learned from; None for a run that read none.
        teacher: `teacher.json`; None for a run that is no teacher.
        cost: `cost.json`; None where there is none.
        external: `external_results.json` of each other cohort that its present state was scored on, by cohort.
    """

    folder: Path
    role: Role
    validation: Predictions
    test: Predictions
    points: OperatingPoints
    settings: Mapping[str, Any]
    config: Mapping[str, Any]
    soft_labels: Mapping[str, str] | None
    teacher: Mapping[str, Any] | None
    cost: Mapping[str, Any] | None
    external: Mapping[str, Mapping[str, Any]]

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def title(self) -> str:
        """Head of its column or row; a teacher's says what it may read, a control's what it learned from."""
        if self.teacher is not None:
            source = " (the labels' source)" if self.reads_label_source else ""
            who = "bag of words" if self.role == "bag of words" else "teacher"
            return f"{who}, reads: {self.teacher['reads']}{source}"
        if self.role == "control":
            return f"control: {self.config['distillation']['targets']}"
        return {"cnn": "CNN"}.get(self.role, self.role)

    @property
    def reads_label_source(self) -> bool:
        """True for a teacher that may read where the labels were taken from."""
        return bool(LABEL_SOURCES & self._sections)

    @property
    def reads_findings(self) -> bool:
        """True for a teacher that may read the report's findings, and no `LABEL_SOURCES`."""
        return "findings" in self._sections and not self.reads_label_source

    @property
    def _sections(self) -> frozenset[str]:
        """Of the report, that a teacher may read."""
        if self.teacher is None or "text" not in self.teacher["modality"]:
            return frozenset()
        return frozenset(self.config["teacher"]["sections"])

    def command(self, file: str) -> str:
        """The command that makes one of the run's files."""
        return _command(self.role, self.name, file)

    def of(self, split: Split) -> Predictions:
        """Its predictions on a split."""
        return self.validation if split == "validate" else self.test

    def on(self, study_ids: np.ndarray, split: Split = "test") -> Predictions:
        """Its predictions of these studies of a split, in this order.

        Raises:
            KeyError: it has none of one of them.
        """
        part = self.of(split)
        row_of = {study: row for row, study in enumerate(part.study_ids.tolist())}
        return part.select(np.array([row_of[study] for study in study_ids.tolist()], dtype=np.intp))


def open_scored_run(folder: str | Path, role: Role, cohorts: Sequence[str] = ()) -> ScoredRun:
    """Read and check a run for its role in the comparison.

    Args:
        folder: the run's.
        role: its role.
        cohorts: other cohorts whose results are refused, not passed over, where they cannot be used.

    Raises:
        ComparisonError: a file is missing (names the command that makes it) or lacks a key, predictions and results
            are of different evaluations, or a student's training does not fit its role.
        RecordError: a file is not JSON, or results on one of `cohorts` are of another state of the run.
        PredictionsError: `predictions.csv` is not usable, or lacks validation or test studies.
    """
    folder = Path(folder)
    needed = ["config.json", "predictions.csv", "test_results.json"]
    needed += ["teacher.json"] if role in ("teacher", *BESIDE) else []
    for file in needed:
        if not (folder / file).exists():
            raise ComparisonError(
                f"{folder / file} is missing, so run {folder.name!r} cannot be compared; make it with "
                f"{_command(role, folder.name, file)}"
            )
    path = folder / "test_results.json"
    results = read_record(path)
    if results.get("schema") != SCHEMA:
        raise ComparisonError(f"{path} has schema {results.get('schema')}, not {SCHEMA}; {_again(role, folder)}")
    points = _read(
        path,
        lambda: points_of_entries(
            *(results[key] for key in ("operating_points", "fitted_under", "threshold_rule")),
            results["abstention"]["alpha"],
        ),
    )
    settings = _read(
        path,
        lambda: {
            "manifest": results["provenance"]["inputs"]["manifest"]["sha256"],
            **{key: results[key] for key in ("synthetic", "fitted_under", "threshold_rule")},
        },
    )
    predictions = folder / "predictions.csv"
    if _read(path, lambda: results["files"][predictions.name]) != sha256_file(predictions):
        raise ComparisonError(
            f"{predictions} is not what {path} was computed from: it is damaged, was changed, or is of another "
            f"evaluation; {_again(role, folder)}"
        )
    scored = read_predictions(predictions)
    run = open_run(folder, _STAGES[role][0].split()[0])
    soft_labels = next((entry for entry in run.inputs.values() if Path(entry["path"]).name == SOFT_LABELS), None)
    teacher = None
    if run.kind in ("teacher", "bag of words"):
        teacher = read_record(folder / "teacher.json")
        _read(folder / "teacher.json", lambda: (teacher["reads"], teacher["modality"]))
        _read(run.path, lambda: run.config["teacher"]["sections"])
    elif role == "student" and run.kind == "control":
        raise ComparisonError(
            f"{run.path}: the run learned from {run.config['distillation']['targets']!r} targets, so it is a control; "
            "name it with --control_run, and a run with distillation.targets 'teacher' with --student_run"
        )
    cost = None
    if (folder / "cost.json").exists():
        cost = read_record(folder / "cost.json")
        _read(folder / "cost.json", lambda: (cost["parameters"]["total"], cost["parameters"]["trainable"]))
        _read(folder / "cost.json", lambda: (cost["ms_per_sample"], cost["what"], cost["device"]["kind"]))
    parts = (scored.predictions.of_split(split) for split in ("validate", "test"))
    external = external_of(run) | {name: read_external(run, name) for name in cohorts if name in cohorts_of(folder)}
    return ScoredRun(folder, role, *parts, points, settings, run.config, soft_labels, teacher, cost, external)


def shared_studies(runs: Sequence[ScoredRun], split: Split = "test") -> np.ndarray:
    """The studies of a split that every one of at least one run scored: (N,) str, sorted; N > 0.

    Raises:
        ComparisonError: a run is named twice, two of them come from different data or were fitted differently, give a
            study different labels or patients, or they share no study; names both files and both values.
    """
    first = runs[0]
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ComparisonError(f"run {name!r} is named {names.count(name)} times; compare each run once")
    for run in runs[1:]:
        for key, value in first.settings.items():
            if run.settings[key] != value:
                raise ComparisonError(
                    f"{key}: {first.folder / 'test_results.json'} has {value}, {run.folder / 'test_results.json'} has "
                    f"{run.settings[key]}; only runs of one manifest and one way of fitting can be compared"
                )
    shared = set.intersection(*(set(run.of(split).study_ids.tolist()) for run in runs))
    if not shared:
        counts = ", ".join(f"{run.name} {len(run.of(split))}" for run in runs)
        raise ComparisonError(f"no {split} study was scored by all of the runs ({counts} studies)")
    study_ids = np.array(sorted(shared), dtype=str)
    ours = first.on(study_ids, split)
    for run in runs[1:]:
        _refuse_disagreement(first, ours, run, run.on(study_ids, split))
    return study_ids


def check_teacher(runs: Sequence[ScoredRun]) -> None:
    """Refuse a student or control that another teacher taught than the one it is compared with.

    Raises:
        ComparisonError: its soft labels are another run's, or not those that the teacher's run holds now.
    """
    teacher = next(run for run in runs if run.role == "teacher")
    for run in runs:
        if run.soft_labels is None or run.role not in ("student", "control"):
            continue
        record, name = run.folder / "config.json", Path(run.soft_labels["path"]).parent.name
        path = teacher.folder / SOFT_LABELS
        if run.config["distillation"]["targets"] == "words" and name == bag_of_words_name(teacher.name):
            path = teacher.folder.with_name(name) / SOFT_LABELS
        elif name != teacher.name:
            raise ComparisonError(
                f"{record}: {run.name!r} learned from the soft labels of {name!r}, not of {teacher.name!r}; give "
                f"--teacher_run {name}"
            )
        now = sha256_file(path) if path.exists() else None
        if now not in (None, run.soft_labels["sha256"]):
            raise ComparisonError(
                f"{record}: {run.name!r} learned from soft labels {run.soft_labels['sha256']}, {path} is {now} now; "
                f"train it again: {run.command('config.json')} --overwrite"
            )


def check_cohorts(runs: Sequence[ScoredRun], cohorts: Sequence[str]) -> None:
    """Refuse another cohort that no run was scored on, or runs on different manifests or splits of it.

    Raises:
        ComparisonError: it is so; names the runs and the command, or both files and both values.
    """
    for cohort in cohorts:
        there = [run for run in runs if cohort in run.external]
        if not there:
            known = sorted({name for run in runs for name in run.external})
            raise ComparisonError(
                f"--cohort {cohort}: none of {', '.join(run.name for run in runs)} was scored on it, only on "
                f"{', '.join(known) or 'no other cohort'}; {evaluate_command(runs[0].name, cohort)} does it"
            )
        entries = [external_entry(run.external[cohort]) for run in there]
        for run, entry in zip(there[1:], entries[1:], strict=True):
            for key in ("manifest", "split"):
                if entry[key] != entries[0][key]:
                    files = (results_path(one.folder, cohort) for one in (there[0], run))
                    values = (one[key] for one in (entries[0], entry))
                    said = ", ".join(f"{file} has {value}" for file, value in zip(files, values, strict=True))
                    raise ComparisonError(
                        f"{key} of {cohort}: {said}; score both on the same: {evaluate_command(run.name, cohort)}"
                    )


def _refuse_disagreement(first: ScoredRun, ours: Predictions, run: ScoredRun, theirs: Predictions) -> None:
    files = [other.folder / "predictions.csv" for other in (first, run)]
    rows = np.flatnonzero(ours.patient_ids != theirs.patient_ids)
    if len(rows):
        row = rows[0]
        raise ComparisonError(
            f"study {ours.study_ids[row]}: patient {ours.patient_ids[row]} in {files[0]}, "
            f"{theirs.patient_ids[row]} in {files[1]}; score both on the same manifest"
        )
    a, b = ours.raw_labels, theirs.raw_labels
    cells = np.argwhere(~((a == b) | (np.isnan(a) & np.isnan(b))))
    if len(cells):
        row, column = cells[0]
        values = [label_word(float(x[row, column])) for x in (a, b)]
        raise ComparisonError(
            f"study {ours.study_ids[row]}, {LABELS[column]}: label {values[0]} in {files[0]}, {values[1]} in "
            f"{files[1]}; score both on the same manifest"
        )


def _command(role: Role, name: str, file: str) -> str:
    train, score = _STAGES[role]
    if role == "bag of words":
        return f"python -m mlx_cxr.{score} --overwrite --config …"
    return f"python -m mlx_cxr.{train if file in ('config.json', 'teacher.json') else score} {name} --config …"


def _again(role: Role, folder: Path) -> str:
    return f"run {_command(role, folder.name, 'predictions.csv')} again"


def _read(path: Path, get: Any) -> Any:
    """The value that `get` takes from a parsed file; a missing key is an error that names the file."""
    try:
        return get()
    except (KeyError, TypeError) as error:
        raise RecordError(f"{path} lacks {error}; was it written by another version?") from None
