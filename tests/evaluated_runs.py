"""Run folders as training and evaluation leave them: a CNN's and its student's, on the toy cohort, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

from made_once import made_once
from toy_cohort import make_cohort, soft_labels

from mlx_cxr import distillation, evaluate_cnn, train_cnn
from mlx_cxr.core.config import config_from_plain, load_config
from mlx_cxr.core.files import read_record, sha256_file, write_record
from mlx_cxr.evaluation.operating_points import OperatingPoints, read_operating_points, write_operating_points
from mlx_cxr.models.convert import save_model
from mlx_cxr.models.resnet import ResNet18
from mlx_cxr.training.preprocessing import preprocessing_record

CNN, STUDENT, TEACHER = "first", "student_v1", "teacher"


def _make(folder: Path) -> None:
    make_cohort(folder)
    config = load_config(folder / "trial.yaml", ["training.epochs=1", f"teacher.run_name={TEACHER}"])
    soft_labels(config, TEACHER)
    train_cnn.run(config)
    distillation.run(config)
    for name in (CNN, STUDENT):
        evaluate_cnn.run(config, name, maps=False)


def evaluated_run(to: Path, name: str = CNN) -> Path:
    """A copy of a run, beside a copy of its teacher's, under `to/outputs`; its cohort stays where it was made."""
    outputs = made_once("evaluated_runs", _make) / "outputs"
    for folder in (name, TEACHER):
        shutil.copytree(outputs / folder, to / "outputs" / folder, ignore=shutil.ignore_patterns("last"))
    return to / "outputs" / name


def change(path: Path, *keys: str, value: object) -> None:
    """Set an entry of a JSON file."""
    entry = plain = read_record(path)
    for key in keys[:-1]:
        entry = entry[key]
    entry[keys[-1]] = value
    write_record(path, plain)


def replace_model(folder: Path, model: ResNet18, size: int, fit: str = "letterbox") -> None:
    """Make a CNN's run one of another network, as if that had been trained and evaluated; its scores stay."""
    change(folder / "config.json", "config", "model", "in_channels", value=model.config.in_channels)
    change(folder / "config.json", "config", "model", "output_stride", value=model.config.output_stride)
    change(folder / "config.json", "config", "pixels", value={"size": size, "fit": fit, "workers": 1})
    save_model(folder / "best_model.safetensors", model)
    sha256 = sha256_file(folder / "best_model.safetensors")
    change(folder / "test_results.json", "provenance", "inputs", "checkpoint", "sha256", value=sha256)
    change(folder / "inference.json", "checkpoint", "sha256", value=sha256)
    config = config_from_plain(read_record(folder / "config.json")["config"], folder)
    change(folder / "inference.json", "preprocessing", value=preprocessing_record(config))
    replace_points(folder, read_operating_points(folder / "operating_points.json")[0])


def replace_points(folder: Path, points: OperatingPoints) -> None:
    """Give a run other operating points, of its present weights."""
    path = folder / "operating_points.json"
    about = read_operating_points(path)[1]
    checkpoint = read_record(folder / "inference.json")["checkpoint"]["sha256"]
    about["made_from"] = {**about["made_from"], "checkpoint": checkpoint}
    write_operating_points(path, points, **about)
