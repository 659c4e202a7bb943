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
from typing import Annotated, Any

from pydantic import Field, ValidationError

from mlx_cxr.config_file import ConfigError, read_settings
from mlx_cxr.config_sections import (
    AugmentConfig,
    ComparisonConfig,
    DataConfig,
    DemoConfig,
    DistillationConfig,
    EvaluationConfig,
    ExplainConfig,
    FailureConfig,
    LabelsConfig,
    ModelConfig,
    Name,
    PipelineConfig,
    PixelsConfig,
    Section,
    TeacherConfig,
    TrainingConfig,
)
from mlx_cxr.runs import run_folder


class Config(Section):
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
    teacher: TeacherConfig = TeacherConfig()
    distillation: DistillationConfig = DistillationConfig()
    comparison: ComparisonConfig = ComparisonConfig()
    failure: FailureConfig = FailureConfig()
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
    def reports_path(self) -> Path:
        """`reports.csv` of this experiment: the sections of each study's report."""
        return self.data.work_dir / "reports.csv"

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


def add_training_arguments(parser: argparse.ArgumentParser, run_name: str) -> None:
    """What every stage that trains has besides: `--run_name`, `--seed`, and either `--resume` or `--overwrite`.

    Args:
        parser: gets them.
        run_name: the configuration's key that names the run by default.
    """
    parser.add_argument("--run_name", help=f"folder under outputs/; default: {run_name} of the configuration")
    parser.add_argument("--seed", type=int)
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    existing.add_argument("--overwrite", action="store_true", help="replace a run of that name")


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
