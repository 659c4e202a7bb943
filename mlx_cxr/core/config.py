"""One YAML per experiment, covering every stage: its keys, types, ranges and defaults.

Precedence is command line over YAML over the defaults here. An unknown key, a wrong type or an impossible
combination is an error that names the key and the file. `${NAME}` in a value is replaced by that environment
variable; relative paths are relative to the folder that the command runs in.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from mlx_cxr.core import config_schema as sections
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.plain_yaml import YamlError, read_yaml, read_yaml_file, shorten
from mlx_cxr.core.runs import bag_of_words_name, run_folder

_SAMPLES = Path(__file__).resolve().parents[2] / "configs"


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used; the message names the file, each key and the way out."""


class Config(sections.Section):
    """Configuration of an experiment, a section for each part of it."""

    name: sections.Name
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    outputs: Path = Path("outputs")
    weights_dir: Path = Path("weights")
    run_name: sections.Name = "cnn_baseline"
    data: sections.DataConfig
    demo: sections.DemoConfig = sections.DemoConfig()
    pixels: sections.PixelsConfig = sections.PixelsConfig()
    labels: sections.LabelsConfig = sections.LabelsConfig()
    model: sections.ModelConfig = sections.ModelConfig()
    augment: sections.AugmentConfig = sections.AugmentConfig()
    training: sections.TrainingConfig = sections.TrainingConfig()
    evaluation: sections.EvaluationConfig = sections.EvaluationConfig()
    explain: sections.ExplainConfig = sections.ExplainConfig()
    teacher: sections.TeacherConfig = sections.TeacherConfig()
    distillation: sections.DistillationConfig = sections.DistillationConfig()
    comparison: sections.ComparisonConfig = sections.ComparisonConfig()
    failure: sections.FailureConfig = sections.FailureConfig()
    pipeline: sections.PipelineConfig = sections.PipelineConfig()

    def plain(self) -> dict[str, Any]:
        """The whole configuration as JSON-ready data."""
        return self.model_dump(mode="json")

    @property
    def sample_dir(self) -> Path:
        """Folder of manifest and pixel store: `data.work_dir`, or one in it for each sample (`data.n_studies`)."""
        work_dir, studies = self.data.work_dir, self.data.n_studies
        return work_dir if studies is None else work_dir / f"sample_{studies}_seed{self.seed}"

    @property
    def manifest_path(self) -> Path:
        """`manifest.csv` of this experiment."""
        return self.sample_dir / "manifest.csv"

    @property
    def splits_path(self) -> Path:
        """`splits.json` of this experiment."""
        return self.sample_dir / "splits.json"

    @property
    def reports_path(self) -> Path:
        """`reports.csv` of this experiment: the sections of each study's report."""
        return self.sample_dir / "reports.csv"

    @property
    def pixels_path(self) -> Path:
        """The pixel store of this experiment."""
        return self.sample_dir / f"images_{self.pixels.size}.npy"

    @property
    def dicom_recipe(self) -> Literal["mimic", "window"]:
        """How a DICOM becomes an image like the others: as `pixels` has it, or as the source made its own."""
        return self.pixels.dicom_recipe or ("mimic" if self.data.source == "mimic-cxr-jpg" else "window")

    @property
    def soft_labels_run(self) -> str:
        """The run whose soft labels a student learns from: the teacher's, or that of the word counts beside it."""
        teacher = self.teacher.run_name
        return bag_of_words_name(teacher) if self.distillation.targets == "words" else teacher

    def run_dir(self, run_name: str | None = None) -> Path:
        """Folder of a run, by its name or, of one that is there, its path; None takes `run_name` of the configuration.

        Raises:
            RunNameError: neither such a folder nor usable as the name of one.
        """
        if run_name is not None and os.sep in run_name and (Path(run_name) / "config.json").exists():
            return Path(run_name)
        return run_folder(self.outputs, self.run_name if run_name is None else run_name)


def load_config(path: str | Path, overrides: Sequence[str] = (), **direct: Any) -> Config:
    """Read and check an experiment's YAML.

    Args:
        overrides: `dotted.key=value` texts; values are parsed as YAML.
        direct: dotted keys written with `__`, such as `data__n_studies=500`; None leaves the YAML's value. They win
            over `overrides`. A run may be given by its folder under `outputs` too.

    Raises:
        ConfigError: a missing file, invalid YAML, a key given twice, an override that is none, an unknown key, a wrong
            type or range, an unset `${NAME}`; every fault is listed with its key.
    """
    # The file.
    path = Path(path)
    try:
        raw = read_yaml_file(path)
    except FileNotFoundError:
        near = ", ".join(sorted(str(p) for p in Path("configs").glob("*.yaml"))) or "none in ./configs"
        raise ConfigError(f"{path}: no such file; configurations here: {near}") from None
    except YamlError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(raw).__name__}")

    # The command line: `--set`, then the stage's own options.
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key or key.count(".") > 9:
            raise ConfigError(f"--set {shorten(text)}: write it as KEY=VALUE, such as training.epochs=3")
        try:
            parsed = read_yaml(value, f"--set {shorten(text)}")
        except YamlError as error:
            raise ConfigError(str(error)) from None
        _set_key(raw, key, parsed, f"--set {shorten(text)}")
    for key, value in direct.items():
        if value is not None:
            outputs = Path(str(raw.get("outputs", "outputs")))
            if key.endswith("run_name") and Path(value).parent.resolve() == outputs.resolve():
                value = Path(value).name
            _set_key(raw, key.replace("__", "."), value, f"--{key}")
    return config_from_plain(_expand(raw, path, ""), path)


def _set_key(raw: dict[str, Any], dotted: str, value: Any, origin: str) -> None:
    """Set a key of nested sections, making those that are missing; `origin` is for the error message."""
    *parents, last = dotted.split(".")
    node = raw
    for part in parents:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"{origin}: {part!r} is not a section of the configuration")
    node[last] = value


def _expand(value: Any, path: Path, key: str) -> Any:
    """Replace `${NAME}` and `${NAME:-default}` in all texts by environment variables."""
    if isinstance(value, dict):
        return {name: _expand(item, path, f"{key}.{name}".lstrip(".")) for name, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, path, key) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(3)
        if (found := os.environ.get(name, default)) is None:
            raise ConfigError(
                f"{path}: key '{key}' needs the environment variable {name}; set it, or pass --set {key}=…"
            )
        return found

    return re.sub(r"\$\{(\w+)(:-([^}]*))?\}", replace, value)


def config_from_plain(plain: Mapping[str, Any], where: str | Path) -> Config:
    """Check plain data, such as a run's `config.json` recorded.

    Raises:
        ConfigError: they do not fit this version; names `where` and every faulty key.
    """
    try:
        # JSON mode: strict about types, yet a list may fill a tuple and text a path.
        return Config.model_validate_json(json.dumps(plain, default=str))
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
        sample = next((path for path in sorted(_SAMPLES.glob("*.yaml")) if _has(path, location)), None)
        return f"key '{key}' is missing" + (f"; see configs/{sample.name}, which has it" if sample else "")
    given = fault.get("input")
    value = "" if isinstance(given, dict) else f" (got {shorten(given) if isinstance(given, str) else repr(given)})"
    return f"key '{key}': {fault['msg'].removeprefix('Value error, ')}{value}"


def _has(sample: Path, location: Sequence[str]) -> bool:
    node = read_yaml_file(sample)
    for part in location:
        node = node.get(part) if isinstance(node, dict) else None
    return node is not None


def _known_keys(location: Sequence[str]) -> list[str]:
    section: Any = Config
    for part in location:
        annotation = section.model_fields[part].annotation
        alternatives = (annotation, *getattr(annotation, "__args__", ()))
        section = next((one for one in alternatives if hasattr(one, "model_fields")), None)
        if section is None:
            return []
    return list(section.model_fields)
