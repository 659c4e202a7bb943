"""Run folders of models that see the same synthetic truth through more or less noise."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from simulated_predictions import simulated

from mlx_cxr.core.files import sha256_file, write_record
from mlx_cxr.core.runs import open_run
from mlx_cxr.evaluation import external
from mlx_cxr.evaluation.abstention import abstention_section
from mlx_cxr.evaluation.bootstrap import patient_resamples
from mlx_cxr.evaluation.operating_points import OperatingPoints, read_operating_points, write_operating_points
from mlx_cxr.evaluation.predictions import Predictions, join, read_predictions, write_predictions
from mlx_cxr.evaluation.results import evaluate, fit_operating_points

DEVICE = {"kind": "cpu", "name": "simulated", "cores": 2, "memory_bytes": 8_000_000_000, "blas": "OpenBLAS"}
SOFT = b"logits"
"""Stands for a teacher's soft labels, of which a comparison reads the hash alone."""
NOISE = {"cnn": 5.0, "teacher": 0.5, "student": 3.0, "shuffled": 6.0, "hard": 3.2, "graded": 2.0}
"""Standard deviation of what is added to the logits; theirs is about 3."""

_EVALUATED: dict[tuple, tuple[OperatingPoints, dict[str, Any]]] = {}


def model(noise: float, seed: int, patients: int = 50) -> Predictions:
    """Validation and test predictions of a model; the cohort is the same whatever the noise and its seed."""
    rng = np.random.default_rng(seed)
    parts = (simulated(patients, "validate", 0), simulated(patients, "test", 1))
    return join(
        *(
            replace(part, logits=(part.logits + noise * rng.normal(size=part.logits.shape)).astype(np.float32))
            for part in parts
        )
    )


def evaluated(predictions: Predictions, protocol: str) -> tuple[OperatingPoints, dict[str, Any]]:
    """What `evaluate` makes of predictions, kept for the next test that asks for the same."""
    arrays = (predictions.study_ids, predictions.patient_ids, predictions.raw_labels, predictions.logits)
    known = protocol, *(array.tobytes() for array in arrays)
    if known not in _EVALUATED:
        points = fit_operating_points(predictions.of_split("validate"), protocol, "f1", 0.1)
        settings = {"run": "", "synthetic": True, "samples": 0, "seed": 0, "bins": 15, "provenance": {}}
        _EVALUATED[known] = points, evaluate(predictions, points, **settings)
    return _EVALUATED[known]


def write_run(
    outputs: Path,
    name: str,
    predictions: Predictions,
    *,
    protocol: str = "empty_negative",
    manifest: str = "a" * 64,
    synthetic: bool = True,
    sections: tuple[str, ...] = ("findings",),
    targets: str = "teacher",
    taught_by: str | None = None,
    reads: str | None = None,
    cost: dict[str, Any] | None = None,
) -> Path:
    """A run folder as the stages leave it; `reads` makes it a teacher's, a name with `cnn` a CNN's.

    Args:
        outputs: folder of all runs.
        name: the run's.
        predictions: with both splits.
        protocol: that thresholds and temperatures are fitted under.
        manifest: the SHA-256 that the results record.
        synthetic: whether the cohort is.
        sections: of `config.teacher`.
        targets: of `config.distillation`.
        taught_by: the teacher run whose soft labels are among the inputs.
        reads: of `teacher.json`; None writes none.
        cost: changes to `cost.json`.
    """
    folder = outputs / name
    points, results = evaluated(predictions, protocol)
    provenance = {"inputs": {"manifest": {"path": "manifest.csv", "sha256": manifest}}}
    config = {
        "teacher": {"sections": list(sections)},
        "distillation": {"targets": targets, "alpha": 0.3, "temperature": 2.0, "init": "model"},
    }
    soft = {"path": f"outputs/{taught_by}/teacher_soft_labels.npy", "sha256": hashlib.sha256(SOFT).hexdigest()}
    reader = "bag_of_words" if name.endswith("_bag_of_words") else "lfm_finetune"
    stage = reader if reads is not None else "train_cnn" if "cnn" in name else "distillation"
    inputs = provenance["inputs"] | ({"soft_labels": soft} if taught_by else {})
    write_record(folder / "config.json", {"stage": stage, "config": config, "inputs": inputs})
    write_predictions(folder / "predictions.csv", predictions, points)
    made_from = {"manifest": manifest}
    write_operating_points(folder / "operating_points.json", points, run=name, synthetic=synthetic, made_from=made_from)
    files = {file: sha256_file(folder / file) for file in ("predictions.csv", "operating_points.json")}
    results = {**results, "run": name, "synthetic": synthetic, "provenance": provenance, "files": files}
    write_record(folder / "test_results.json", results)
    about = {
        "schema": 1,
        "parameters": {"total": 11_175_374, "trainable": 11_175_374},
        "ms_per_sample": 4.25,
        "samples": 256,
        "batch_size": 64,
        "what": "one film, 96 px",
        "device": DEVICE,
    }
    write_record(folder / "cost.json", about | (cost or {}))
    if reads is not None:
        teacher = {"schema": 1, "modality": "text", "reads": reads, "base": "tiny"}
        (folder / "teacher_soft_labels.npy").write_bytes(SOFT)
        write_record(folder / "teacher.json", teacher | {"zero_shot_auc": 0.52, "tuned_auc": 0.91})
    return folder


def write_three(outputs: Path, patients: int = 50) -> None:
    """The runs `cnn`, `teacher` and `student`, of different quality in this order: least, most, between."""
    write_run(outputs, "cnn", model(NOISE["cnn"], 10, patients))
    cost = {"parameters": {"total": 1_600_000_000, "trainable": 6_000_000}, "ms_per_sample": 812.0}
    cost["what"] = "one report, up to 768 tokens"
    write_run(outputs, "teacher", model(NOISE["teacher"], 11, patients), reads="findings", cost=cost)
    write_run(outputs, "student", model(NOISE["student"], 12, patients), taught_by="teacher")


def write_external(folder: Path, cohort: str, noise: float, manifest: str = "e" * 64, split: str = "all") -> Path:
    """Results of a run on another cohort, the same whatever the noise of the answers, as `evaluate_external` has them.

    Weights are written where the run has none.
    """
    run, points = open_run(folder), read_operating_points(folder / "operating_points.json")[0]
    if not run.weights.exists():
        run.weights.parent.mkdir(exist_ok=True)
        run.weights.write_bytes(folder.name.encode())
    own, there = read_predictions(folder / "predictions.csv").predictions, simulated(60, "external", 2)
    drawn = noise * np.random.default_rng(3).normal(size=there.logits.shape)
    there = replace(there, logits=(there.logits + drawn).astype(np.float32))
    inputs = {"weights": run.weights, "operating_points": folder / "operating_points.json"}
    inputs = {role: {"path": str(path), "sha256": sha256_file(path)} for role, path in inputs.items()}
    patients = len(set(there.patient_ids.tolist()))
    results = {
        "schema": external.SCHEMA,
        **{"run": folder.name, "cohort": cohort, "split": split, "synthetic": True, "score": "its answer"},
        "counts": {"studies": len(there), "patients": patients, "shared_patients": 0},
        **{"objections": None, "exposure_only": None, "shift": None},
        "bootstrap": {"unit": "patient", "samples": 50, "seed": 0, "level": 0.95},
        "against_own": external.against_own(own.of_split("test"), there, points, 50, 0),
        "abstention": abstention_section(
            own.of_split("validate"), there, points, patient_resamples(there.patient_ids, 50, 0)
        ),
        "provenance": {"inputs": inputs | {"manifest": {"path": "manifest.csv", "sha256": manifest}}},
    }
    return write_record(external.results_path(folder, cohort), results)


def comparison_of(outputs: Path, **changes: Any) -> dict[str, Any]:
    """Configuration of a comparison of `write_three`, as plain data."""
    return {
        "name": "toy",
        "run_name": "cnn",
        "outputs": str(outputs),
        "data": {"synthetic": True, "root": "raw", "work_dir": "work"},
        "evaluation": {"bootstrap_samples": 50},
        "teacher": {"run_name": "teacher"},
        "distillation": {"run_name": "student"},
        **changes,
    }
