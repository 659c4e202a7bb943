"""One YAML per experiment, covering every stage: its keys, types, ranges and defaults.

Precedence is command line over YAML over the defaults here. An unknown key, a wrong type or an impossible
combination is an error that names the key and the file. `${NAME}` in a value is replaced by that environment
variable; relative paths are relative to the folder that the command runs in.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mlx_cxr.config_file import ConfigError, read_settings
from mlx_cxr.labels import LABELS, Empty, LabelPolicy, Uncertain
from mlx_cxr.runs import run_folder

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Label = Literal[LABELS]  # type: ignore[valid-type]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DemoConfig(_Section):
    """The built-in synthetic cohort (`make_demo_data`)."""

    patients: Count = 600
    image_size: Annotated[int, Field(ge=128, le=4096)] = 512
    """Short side of a rendered film in pixels."""


class CsvSource(_Section):
    """How to read any table of films: column names, label mapping, separator. Used when `data.source` is `csv`."""

    table: Path
    separator: Annotated[str, Field(min_length=1)] = ","
    patient: str = "patient_id"
    study: str | None = "study_id"
    image: str = "image_file"
    """Column with the film's path relative to `data.root`; also the film's id."""
    view: str | None = None
    age: str | None = None
    sex: str | None = None
    text: str | None = None
    split: str | None = None
    """Column with train / validate / test; None makes a patient-grouped split."""
    where: dict[str, str] = {}
    """Keep only rows whose column matches this regular expression (from its beginning)."""
    findings: str | None = None
    """Column with a list of findings as text; None means one 1 / 0 / -1 / empty column per label."""
    findings_separator: Annotated[str, Field(min_length=1)] = "|"
    label_map: dict[str, Label] = {}
    """Source name -> one of the 14; names mapped to nothing are counted and ignored."""
    labels_covered: tuple[Label, ...] | None = None
    """Labels the source annotates: absent from the list means 0. The others stay empty. None: those mapped to."""


class DataConfig(_Section):
    """Where the raw data lie and what of them becomes the manifest."""

    source: Literal["mimic-cxr-jpg", "csv"] = "mimic-cxr-jpg"
    synthetic: bool = False
    """True for the built-in cohort: every result and picture then says so."""
    root: Path
    work_dir: Path
    """Where `manifest.csv`, `splits.json` and the pixel store go."""
    reports: Path | None = None
    """Folder or zip of MIMIC-CXR reports; None looks for them beside the films and does without."""
    report_sections: tuple[Literal["indication", "findings", "impression", "last_paragraph", "whole"], ...] = (
        "impression",
        "findings",
        "last_paragraph",
    )
    report_mode: Literal["first", "all"] = "first"
    """`first`: the first of `report_sections` that a report has (a fall-back order). `all`: all of them, in order."""
    labeler: Literal["chexpert", "negbio"] = "chexpert"
    views: tuple[str, ...] | None = ("AP", "PA")
    """View positions kept; None keeps all. `missing` stands for films without one."""
    n_studies: Count | None = None
    patients_table: Path | None = None
    """Optional table with `subject_id`, `gender` and `anchor_age` (MIMIC-IV `patients.csv.gz`)."""
    split: Literal["source", "made"] = "source"
    """`source`: the split the data come with, where they do. `made`: one by patient in its place, as for a download so
    partial that the official validation patients are not in it; figures are then not comparable with published ones."""
    validation_fraction: Fraction = 0.15
    test_fraction: Fraction = 0.2
    """Shares of patients in a split that is made here, and least shares of a sample of `n_studies`: MIMIC-CXR's
    official validation and test splits are so small that a proportional sample would leave too few to score."""
    csv: CsvSource | None = None

    @model_validator(mode="after")
    def _csv_goes_with_csv(self) -> DataConfig:
        if (self.source == "csv") != (self.csv is not None):
            raise ValueError("'data.csv' and 'source: csv' go together: give both or neither")
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction leave no training patients; make them smaller")
        return self


class PixelsConfig(_Section):
    """The pixel store, and the same transform at inference."""

    size: Annotated[int, Field(ge=32, le=2048)] = 224
    fit: Literal["letterbox", "center_crop"] = "letterbox"
    workers: Annotated[int, Field(ge=0)] = 0
    """Decoding processes; 0 takes one per core."""


class LabelsConfig(_Section):
    """The label policy for training; see `labels.LabelPolicy`."""

    uncertain: Uncertain = "zeros"
    empty: Empty = "negative"
    soft_value: Fraction = 0.5
    uncertain_per_label: dict[Label, Uncertain] = {}

    def policy(self) -> LabelPolicy:
        """The policy object that is applied to raw labels."""
        return LabelPolicy(**self.model_dump())


class ModelConfig(_Section):
    """The ResNet-18 (He et al., arXiv:1512.03385)."""

    weights: str = "imagenet"
    """`imagenet`, `scratch`, or a path to torchvision / timm `resnet18` safetensors."""
    in_channels: Literal[1, 3] = 1
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    output_stride: Literal[16, 32] = 32
    """Pixels per cell of the last feature map; 16 dilates the last stage for finer maps at small film sizes."""
    freeze_stages: Annotated[int, Field(ge=0, le=5)] = 0
    """Leading parts kept as loaded: 1 is the stem, 2..5 add layer1..layer4."""
    freeze_batchnorm: bool = False


class AugmentConfig(_Section):
    """Label-safe augmentation on the device. There is no flip: it would move the heart to the right."""

    shift: Fraction = 0.05
    """Largest shift as a share of the side."""
    scale: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    rotate: Annotated[float, Field(ge=0.0, le=45.0)] = 7.0
    """Largest rotation in degrees."""
    brightness: Fraction = 0.1
    contrast: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.15


class TrainingConfig(_Section):
    """The one training loop."""

    epochs: Count = 10
    batch_size: Count = 32
    learning_rate: Positive = 3e-4
    final_learning_rate: Annotated[float, Field(ge=0.0)] = 1e-6
    warmup_fraction: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-2
    clip_norm: Positive = 5.0
    class_weighting: Literal["none", "inverse_sqrt", "balanced"] = "none"
    """Weight of positives against negatives: 1, sqrt(n0/n1) or n0/n1; from 1 / `max_class_weight` up to it."""
    max_class_weight: Annotated[float, Field(ge=1.0)] = 10.0
    patience: Annotated[int, Field(ge=0)] = 0
    """Epochs without a better validation macro AUC before stopping; 0 never stops early."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    save_every: Count = 200
    """Steps between saves of the state to resume from (and at each epoch's end)."""
    log_every: Count = 10
    pixel_budget_gb: Positive = 4.0
    """Films are kept in device memory when the store is smaller than this, else read from disk."""


class EvaluationConfig(_Section):
    """Scoring: thresholds and temperatures are fitted on validation."""

    batch_size: Count = 64
    threshold_rule: Literal["youden", "f1"] = "f1"
    bootstrap_samples: Annotated[int, Field(ge=0)] = 1000
    calibration_bins: Annotated[int, Field(ge=2)] = 15


class ExplainConfig(_Section):
    """Class-activation maps on the test split."""

    method: Literal["grad_cam", "grad_cam_pp", "hires_cam"] = "grad_cam"
    labels: tuple[Label, ...] | None = None
    """Findings to map; None takes all but No Finding."""
    examples_per_outcome: Annotated[int, Field(ge=0)] = 3
    """Films shown per finding for each of true positive, false positive and false negative."""
    mask_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of a map's pixels taken as its extent when it is compared with a mask by IoU."""


class PipelineConfig(_Section):
    """What stops the pipeline."""

    min_val_auc: Fraction = 0.80


class Config(_Section):
    """Everything an experiment can be told."""

    name: Name
    seed: Annotated[int, Field(ge=0)] = 0
    outputs: Path = Path("outputs")
    weights_dir: Path = Path("weights")
    run_name: Name = "cnn_baseline"
    data: DataConfig
    demo: DemoConfig = DemoConfig()
    pixels: PixelsConfig = PixelsConfig()
    labels: LabelsConfig = LabelsConfig()
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    explain: ExplainConfig = ExplainConfig()
    pipeline: PipelineConfig = PipelineConfig()

    def plain(self) -> dict[str, Any]:
        """The whole configuration as JSON-ready data."""
        return self.model_dump(mode="json")

    @property
    def manifest_path(self) -> Path:
        """`manifest.csv` of this experiment."""
        return self.data.work_dir / "manifest.csv"

    @property
    def splits_path(self) -> Path:
        """`splits.json` of this experiment."""
        return self.data.work_dir / "splits.json"

    @property
    def pixels_path(self) -> Path:
        """The pixel store of this experiment."""
        return self.data.work_dir / f"images_{self.pixels.size}.npy"

    def run_dir(self, run_name: str | None = None) -> Path:
        """Folder of a run; None takes `run_name` of the configuration.

        Raises:
            RunNameError: the name is not usable as a folder name.
        """
        return run_folder(self.outputs, self.run_name if run_name is None else run_name)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The two options every stage has: `--config` and repeatable `--set KEY=VALUE`."""
    parser.add_argument("--config", type=Path, required=True, help="YAML of the experiment, such as configs/demo.yaml")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key, such as training.epochs=3 (YAML value; repeatable)",
    )


def load_config(path: str | Path, overrides: Sequence[str] = (), **direct: Any) -> Config:
    """Read and check an experiment's YAML.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value` texts; values are parsed as YAML.
        direct: dotted keys written with `__`, such as `data__n_studies=500`; None leaves the YAML's value.

    Raises:
        ConfigError: a missing file, invalid YAML, an unknown key, a wrong type or range, an unset `${NAME}`; every
            fault is listed with its key.
    """
    return _validated(read_settings(path, overrides, direct), path)


def config_from_plain(plain: Mapping[str, Any], where: str | Path) -> Config:
    """The `Config` that a run's `config.json` recorded.

    Raises:
        ConfigError: the record does not fit this version; names `where` and the keys.
    """
    return _validated(plain, where)


def _validated(raw: Mapping[str, Any], where: str | Path) -> Config:
    try:
        # JSON mode: strict about types, yet a list may fill a tuple and text a path.
        return Config.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {_explain(fault)}" for fault in error.errors())) from None


def _explain(fault: Mapping[str, Any]) -> str:
    location = [str(part) for part in fault["loc"] if part != "[key]"]
    key = ".".join(location) or "(whole file)"
    if fault["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key '{key}'; {hint}"
    if fault["type"] == "missing":
        return f"key '{key}' is missing"
    value = "" if isinstance(fault.get("input"), dict) else f" (got {fault.get('input')!r})"
    return f"key '{key}': {fault['msg'].removeprefix('Value error, ')}{value}"


def _known_keys(location: Sequence[str]) -> list[str]:
    section: Any = Config
    for part in location:
        annotation = section.model_fields[part].annotation
        section = next(
            (a for a in (annotation, *getattr(annotation, "__args__", ())) if hasattr(a, "model_fields")), None
        )
        if section is None:
            return []
    return list(section.model_fields)
