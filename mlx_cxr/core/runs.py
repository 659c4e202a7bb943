"""Run folders and their records, by which a result is traced to its inputs."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import RecordError, read_record, sha256_file, write_record

WEIGHTS: Mapping[str, str] = {
    "train_cnn": "best_model.safetensors",
    "distillation": "best_student.safetensors",
    "lfm_finetune": "adapter_weights/adapters.safetensors",
    "bag_of_words": "bag_of_words.npz",
}
"""The stages that train, and the weights that each leaves in its run's folder."""

_PACKAGES = ("mlx", "mlx-lm", "mlx-vlm", "numpy", "pillow", "pandas", "scikit-learn", "scipy")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class RunExistsError(UserError, FileExistsError):
    """A run of that name is there already."""


class RunNameError(UserError, ValueError):
    """A run name that cannot be a folder of its own under `outputs`."""


def run_folder(outputs: str | Path, name: str) -> Path:
    """`outputs/<name>`, which need not be there.

    Raises:
        RunNameError: the name is not usable as a folder name, such as `../x`.
    """
    if not _RUN_NAME.fullmatch(name):
        raise RunNameError(
            f"run name {name!r}: use up to 100 letters, digits, '.', '_' and '-', and begin with a letter or digit"
        )
    return Path(outputs) / name


def create_run(
    outputs: str | Path,
    name: str,
    *,
    stage: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str | Path],
    device: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Make `outputs/<name>` and write its `config.json` before anything else happens there.

    Args:
        inputs: role -> file the run reads; each is recorded with its SHA-256.
        device: `device.describe()`.
        overwrite: let an existing run of that name be replaced; its old files stay until they are.

    Raises:
        RunNameError: the name is not usable as a folder name.
        RunExistsError: such a run is there and `overwrite` is false.
    """
    folder = run_folder(outputs, name)
    if (folder / "config.json").exists() and not overwrite:
        raise RunExistsError(f"{folder} exists; choose another --run_name, or pass --resume or --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / "config.json", provenance(stage, config, inputs, device))
    return folder


@dataclass(frozen=True)
class RunRecord:
    """The `config.json` of a run that a stage of `WEIGHTS` made.

    Attributes:
        folder: the run's.
        stage: that made it.
        config: the configuration that it was trained with, as plain data.
        inputs: role to `path` and `sha256` of each file that its training read; always with a `manifest`.
        whole: all of the file.
    """

    folder: Path
    stage: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, str]]
    whole: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """`config.json`."""
        return self.folder / "config.json"

    @property
    def weights(self) -> Path:
        """The file of its best weights, which need not be there yet."""
        return self.folder / WEIGHTS[self.stage]

    @property
    def finished(self) -> bool:
        """True if its training came to an end and left weights."""
        return self.weights.exists() and (self.folder / "training.json").exists()

    @property
    def kind(self) -> Literal["CNN", "teacher", "student", "control", "bag of words"]:
        """The model that it holds; a student that learned from other targets than a teacher's is a control.

        Raises:
            RecordError: the configuration of a student does not say what it learned from.
        """
        if self.stage != "distillation":
            kinds: dict[str, Literal["CNN", "teacher", "bag of words"]]
            kinds = {"train_cnn": "CNN", "lfm_finetune": "teacher", "bag_of_words": "bag of words"}
            return kinds[self.stage]
        try:
            return "student" if self.config["distillation"]["targets"] == "teacher" else "control"
        except (KeyError, TypeError):
            raise RecordError(f"{self.path} lacks 'config.distillation.targets'") from None


def open_run(folder: str | Path, *stages: str, finished: bool = False) -> RunRecord:
    """Open a run folder: the record that every reader of a run begins with.

    Args:
        stages: of `WEIGHTS`, whose runs are asked for; without any, all of them.
        finished: refuse a run whose training has not come to its end.

    Raises:
        RecordError: there is no such run, another stage made it, its record lacks a key, or its training has not
            ended; says what to do.
    """
    folder = Path(folder).resolve() if Path(folder).name in ("", ".", "..") else Path(folder)
    path, stages = folder / "config.json", stages or tuple(WEIGHTS)
    if not path.exists():
        raise RecordError(
            f"{path} is missing: there is no such run; make it with {' or '.join(stages)}, or give another's name or "
            "folder"
        )
    whole = read_record(path)
    stage = whole.get("stage")
    if stage not in stages:
        raise RecordError(f"{folder} was made by the stage {stage!r}; a run of {' or '.join(stages)} is asked for here")
    try:
        run = RunRecord(folder, stage, whole["config"], whole["inputs"], whole)
        run.inputs["manifest"]["sha256"]
    except (KeyError, TypeError):
        raise RecordError(f"{path} lacks 'config' or 'inputs.manifest.sha256'; is it a trained run?") from None
    if finished and not run.finished:
        raise RecordError(
            f"the training of {folder} has not ended; resume it: python -m mlx_cxr.{stage} --run_name {folder.name} "
            "--resume --config …"
        )
    return run


def bag_of_words_name(teacher_run: str) -> str:
    """The run of the word counts beside a teacher's, which is given by its name or folder."""
    return f"{Path(teacher_run).name}_bag_of_words"


def runs_that_read(outputs: str | Path, sha256: str) -> list[Path]:
    """Folders of the runs under `outputs` that read a file of this hash; damaged records are passed over."""
    found = []
    for path in sorted(Path(outputs).glob("*/config.json")):
        with suppress(RecordError, KeyError, TypeError, AttributeError):
            if any(entry["sha256"] == sha256 for entry in read_record(path)["inputs"].values()):
                found.append(path.parent)
    return found


def provenance(
    stage: str, config: Mapping[str, Any], inputs: Mapping[str, str | Path], device: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Record of a run: command, configuration, versions, device, seed, commit, hashes of the files it read."""
    commit, dirty = git_state()
    return {
        "schema": 1,
        "stage": stage,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": config.get("seed"),
        "commit": commit,
        "tree_dirty": dirty,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": package_versions(),
        "device": dict(device or {}),
        "inputs": {role: {"path": str(path), "sha256": sha256_file(path)} for role, path in inputs.items()},
        "config": config,
    }


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result; a missing one is `not installed`."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def git_state() -> tuple[str | None, bool | None]:
    """(commit, whether the tree was dirty) of the checkout this package runs from; (None, None) outside one."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=here.parent, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        # Installed into an environment inside somebody else's checkout, this file is not part of it.
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None, None
