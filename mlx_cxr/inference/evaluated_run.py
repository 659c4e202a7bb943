"""A trained and evaluated run with all its records, checked to be of one evaluation of one checkpoint.

Records in other folders (the manifest's summary, a comparison, the teacher) are taken only where their hashes are those
of the run; else they count as not recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_cxr.core.config import Config, config_from_plain
from mlx_cxr.core.files import RecordError, read_record, sha256_file
from mlx_cxr.core.runs import RunRecord, open_run
from mlx_cxr.evaluation import comparison, external, operating_points, results
from mlx_cxr.evaluation.operating_points import OperatingPoints, read_operating_points
from mlx_cxr.inference import predictor
from mlx_cxr.inference.trained_run import STAGES
from mlx_cxr.training.preprocessing import check_preprocessing

_CREDENTIALED = ("mimic-cxr-jpg",)
"""Sources of `data.source` whose images are under a data use agreement."""


@dataclass(frozen=True)
class EvaluatedRun:
    """The records of a CNN's or a student's run.

    Attributes:
        folder: the run's folder.
        record: `config.json`.
        config: the configuration in `config.json`.
        checkpoint: the weights file.
        checkpoint_sha256: hash of the weights file, the same as at its evaluation.
        training: `training.json`.
        results: `test_results.json`.
        points: `operating_points.json`.
        inference: `inference.json`.
        cost: `cost.json`; None where there is none.
        localization: `localization.json`; None without masks, or where the evaluation made no maps.
        failures: `failure_analysis/failures.json` of these predictions; None where there is none.
        comparison: the latest `final_comparison.json` that read these results; None where none did.
        external: `external_results.json` of each other cohort that its present state was scored on, by its name.
        manifest_summary: `manifest_summary.json` of the manifest that the run was trained on; None where it is gone.
        teacher: of a student that learned from soft labels, `run`, `soft_labels_sha256` and `record` (`teacher.json`,
            null where the teacher's run is gone or holds other soft labels now); else None.
    """

    folder: Path
    record: Mapping[str, Any]
    config: Config
    checkpoint: Path
    checkpoint_sha256: str
    training: Mapping[str, Any]
    results: Mapping[str, Any]
    points: OperatingPoints
    inference: Mapping[str, Any]
    cost: Mapping[str, Any] | None
    localization: Mapping[str, Any] | None
    failures: Mapping[str, Any] | None
    comparison: Mapping[str, Any] | None
    external: Mapping[str, Mapping[str, Any]]
    manifest_summary: Mapping[str, Any] | None
    teacher: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def synthetic(self) -> bool:
        """True if its images were drawn by a program."""
        return self.config.data.synthetic

    @property
    def credentialed(self) -> bool:
        """True if its weights derive from data that may not be passed on."""
        return not self.synthetic and self.config.data.source in _CREDENTIALED

    @classmethod
    def open(cls, folder: str | Path) -> EvaluatedRun:
        """Read and check a run's records.

        Raises:
            RecordError: there is no such run, it is a teacher's, its training has not ended, it is not evaluated, or
                its weights or its preprocessing are others than were evaluated; says what to run.
            ConfigError: its configuration does not fit this version.
        """
        run = open_run(Path(folder).resolve(), *STAGES, finished=True)
        folder = run.folder
        scores, prepared, points, sha256 = _evaluation(folder, run.weights)
        config = config_from_plain(run.config, run.path)
        check_preprocessing(prepared["preprocessing"], config, folder / predictor.FILE)
        summary = _optional(config.manifest_path.with_name("manifest_summary.json")) or {}
        ours = summary.get("manifest_sha256") == run.inputs["manifest"]["sha256"]
        return cls(
            folder=folder,
            record=run.whole,
            config=config,
            checkpoint=run.weights,
            checkpoint_sha256=sha256,
            training=read_record(folder / "training.json"),
            results=scores,
            points=points,
            inference=prepared,
            cost=_optional(folder / "cost.json"),
            # An evaluation without maps leaves an earlier one's table where it was.
            localization=_optional(folder / "localization.json") if prepared["map_references"]["methods"] else None,
            failures=_failures(folder),
            comparison=_comparison(folder),
            external=external.external_of(run),
            manifest_summary=summary if ours else None,
            teacher=_teacher(run),
        )


def _evaluation(folder: Path, checkpoint: Path) -> tuple[Mapping[str, Any], Mapping[str, Any], OperatingPoints, str]:
    """Results, inference record, operating points, and the hash of the checkpoint that all three are of."""
    again = f"run python -m mlx_cxr.evaluate_cnn --run_name {folder.name} --config …"
    records = {}
    for name, schema in (("test_results.json", results.SCHEMA), (predictor.FILE, predictor.SCHEMA)):
        if not (folder / name).exists():
            raise RecordError(f"{folder / name} is missing, so the run is not evaluated by this version; {again}")
        records[name] = read_record(folder / name)
        if not isinstance(records[name], dict) or records[name].get("schema") != schema:
            raise RecordError(f"{folder / name} is not of schema {schema}; {again}")
    points, made = read_operating_points(folder / operating_points.FILE)
    scores, prepared = records.values()
    try:
        evaluated = {
            "test_results.json": scores["provenance"]["inputs"]["checkpoint"]["sha256"],
            operating_points.FILE: made["made_from"]["checkpoint"],
            predictor.FILE: prepared["checkpoint"]["sha256"],
        }
    except (KeyError, TypeError) as error:
        raise RecordError(f"{folder}: a record of the evaluation lacks {error}; {again}") from None
    sha256 = sha256_file(checkpoint)
    if changed := [name for name, then in evaluated.items() if then != sha256]:
        raise RecordError(
            f"{checkpoint} is {sha256[:12]} now, but {', '.join(changed)} is of {evaluated[changed[0]][:12]}: the "
            f"weights changed since they were evaluated; {again}"
        )
    return scores, prepared, points, sha256


def _optional(path: Path) -> Mapping[str, Any] | None:
    return read_record(path) if path.exists() else None


def _failures(folder: Path) -> Mapping[str, Any] | None:
    """The failure analysis, if it was made of the present predictions."""
    failures = _optional(folder / "failure_analysis" / "failures.json")
    then = _input_sha256(failures, f"{folder.name}/predictions.csv")
    return failures if then is not None and then == sha256_file(folder / "predictions.csv") else None


def _comparison(folder: Path) -> Mapping[str, Any] | None:
    """The latest comparison beside the run that read its present results."""
    now = sha256_file(folder / "test_results.json")
    found = []
    for path in sorted(folder.parent.glob("comparison_*/final_comparison.json")):
        with suppress(RecordError):  # a damaged one is no fault of this run's
            found.append(read_record(path))
    # One of another version is passed over, as it has other keys.
    found = [one for one in found if one.get("schema") == comparison.SCHEMA]
    ours = [one for one in found if _input_sha256(one, f"{folder.name}/test_results.json") == now]
    return max(ours, key=lambda one: one["provenance"]["started"], default=None)


def _input_sha256(record: Any, role: str) -> str | None:
    try:
        return record["provenance"]["inputs"][role]["sha256"]
    except (KeyError, TypeError):
        return None


def _teacher(run: RunRecord) -> Mapping[str, Any] | None:
    soft = run.inputs.get("soft_labels")
    if soft is None:
        return None
    recorded = Path(soft["path"])
    teacher = run.folder.parent / recorded.parent.name
    labels = teacher / recorded.name
    same = labels.exists() and sha256_file(labels) == soft["sha256"]
    return {
        "run": teacher.name,
        "soft_labels_sha256": soft["sha256"],
        "record": _optional(teacher / "teacher.json") if same else None,
    }
