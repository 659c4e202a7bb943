"""The chain of all stages on a tiny cohort, its state before each stage, and what two of its folders must agree in."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mlx_cxr.core.files import known_sha256, read_record

SEED = 14
"""Of every place, time and kind of fault that is drawn."""
SHARE = float(os.environ.get("CAMPAIGN_SHARE", "1"))
"""Of the faults, for a quick look."""
ROOT = Path(__file__).resolve().parents[2]
YAML = """
name: trial
run_name: cnn
outputs: outputs
weights_dir: weights
data: {synthetic: true, root: data/raw, work_dir: data/made}
demo: {patients: 24, image_size: 128}
pixels: {size: 32, workers: 1}
model: {weights: scratch, output_stride: 16}
training: {epochs: 2, batch_size: 8, save_every: 2, log_every: 1, learning_rate: 1e-3}
teacher:
  base: data/tiny
  run_name: teacher
  max_tokens: 256
  training: {epochs: 1, batch_size: 4, accumulate: 2, learning_rate: 3e-3, save_every: 1, log_every: 1}
  tiny: {hidden_size: 32, layers: 2, vocabulary: 800, epochs: 1}
distillation: {init: cnn, run_name: student}
comparison: {min_retention: 0.0}
evaluation: {bootstrap_samples: 20, abstention_alpha: 0.6}
explain: {labels: [Support Devices], examples_per_outcome: 1}
failure: {examples: 2}
pipeline: {min_val_auc: 0.0}
"""
CONFIG = ("--config", "trial.yaml")
PIPELINE = ("pipeline", *CONFIG, "--ignore_gates")
STAGES = {
    "make_demo_data": ("make_demo_data", *CONFIG),
    "build_manifest": ("build_manifest", *CONFIG),
    "prepare_images": ("prepare_images", *CONFIG),
    "train_cnn": ("train_cnn", *CONFIG),
    "evaluate_cnn": ("evaluate_cnn", *CONFIG),
    "make_tiny_teacher": ("make_tiny_teacher", *CONFIG),
    "lfm_finetune": ("lfm_finetune", *CONFIG),
    "cache_teacher_outputs": ("cache_teacher_outputs", *CONFIG),
    "bag_of_words": ("bag_of_words", *CONFIG, "--overwrite"),
    "distillation": ("distillation", *CONFIG),
    "evaluate_cnn@student": ("evaluate_cnn", *CONFIG, "--run_name", "student"),
    "compare_models": ("compare_models", *CONFIG),
    "failure_analysis": ("failure_analysis", *CONFIG),
    "explain_report": ("explain_report", *CONFIG),
    "export": ("export", "--run", "outputs/student", "--to", "outputs/exported", "--overwrite"),
    "predict": (
        "predict",
        "data/raw/files",
        "--run",
        "outputs/student",
        "--out",
        "outputs/answers",
        "--overlays",
        "--overwrite",
    ),
}
"""In the order of the chain: module and arguments."""
RESUMED = {
    "train_cnn": "outputs/cnn/config.json",
    "lfm_finetune": "outputs/teacher/config.json",
    "distillation": "outputs/student/config.json",
    "predict": "outputs/answers/films.part.csv",
}
"""Stages that are told to resume what was stopped, and the file that says that something was."""

VOLATILE = frozenset(
    (
        *("started", "command", "commit", "tree_dirty", "self_sha256"),
        *("seconds", "ms_per_sample", "samples_per_second", "tokens_per_second", "films_per_second"),
        *("peak_memory_bytes", "active_memory_bytes", "cache_memory_bytes"),
    )
)
"""Keys that two unbroken chains do not agree in. A `self_sha256` is compared with its file in place of the other one;
the hash of a file of the same folder counts as the name of that file, so hashes that follow from times are held too."""
HASH = re.compile(r"[0-9a-f]{64}")


def rng(*case: object) -> np.random.Generator:
    """Random numbers of one case, whichever other ones run."""
    return np.random.default_rng([SEED, zlib.crc32(repr(case).encode())])


@dataclass(frozen=True)
class Ended:
    """How a process ended: its status, what it said, how long it took and how many changes it made (None: killed)."""

    status: int
    said: str
    seconds: float
    changes: int | None
    group: int

    @property
    def error(self) -> str:
        """The one sentence that an error is told in; empty where it was told otherwise."""
        last = self.said.strip().splitlines()[-1:] or [""]
        alone = "Traceback" not in self.said and self.said.count("error: ") == 1
        return last[0] if alone and last[0].startswith("error: ") else ""


def run(folder: Path, *stage: str, after: float | None = None, at: int = 0, largest: int = 0) -> Ended:
    """Run a stage as a process of its own in a folder.

    Args:
        after: seconds after which it is killed; None never.
        at: the change on disk that it is killed before; 0 for none.
        largest: bytes that no file may exceed; 0 for no limit.
    """
    apart = Path(tempfile.mkdtemp())  # Where a disk that is full does not matter.
    count, said = apart / "changes.txt", apart / "said.txt"
    settings = {"PYTHONPATH": str(ROOT), "CAMPAIGN_COUNT": str(count), "CAMPAIGN_KILL_AT": str(at)}
    command = [sys.executable, str(Path(__file__).with_name("stage_process.py")), *stage]
    begun = time.monotonic()
    with said.open("wb") as out:  # Not a pipe, which the workers of a killed process would hold open.
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | settings | {"CAMPAIGN_LARGEST": str(largest), "OPENBLAS_NUM_THREADS": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout=300 if after is None else after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    changes = int(count.read_text()) if count.exists() else None
    text = said.read_text(encoding="utf-8", errors="replace")
    shutil.rmtree(apart)
    return Ended(process.returncode, text, time.monotonic() - begun, changes, process.pid)


def run_again(folder: Path, stage: str) -> Ended:
    """Run a stage that was stopped or failed before, as its message says to."""
    resumed = stage in RESUMED and (folder / RESUMED[stage]).exists()
    command = [*(part for part in STAGES[stage] if part != "--overwrite"), "--resume"] if resumed else STAGES[stage]
    return run(folder, *command)


def end_workers(ended: Ended) -> None:
    """Kill what a killed process has left running."""
    try:
        os.killpg(ended.group, signal.SIGKILL)
    except ProcessLookupError:
        return


@dataclass
class Chain:
    """States of an unbroken chain: the folder `root/<n>` is as the n-th stage found it, the last as all left it."""

    root: Path
    ended: dict[str, Ended] = field(default_factory=dict)

    @classmethod
    def unbroken(cls, root: Path) -> Chain:
        """Run every stage, each in a copy of the folder that the one before it left."""
        chain = cls(root)
        configured(root / "0")
        for number, (name, stage) in enumerate(STAGES.items()):
            folder = copied(root / str(number), root / str(number + 1))
            chain.ended[name] = run(folder, *stage)
            assert chain.ended[name].status == 0, chain.ended[name].said
        return chain

    def before(self, stage: str) -> Path:
        """The folder as a stage found it."""
        return self.root / str(list(STAGES).index(stage))

    def after(self, stage: str) -> Path:
        """The folder as a stage left it."""
        return self.root / str(list(STAGES).index(stage) + 1)


def configured(folder: Path) -> Path:
    """A new folder with the configuration alone."""
    folder.mkdir(parents=True)
    (folder / "trial.yaml").write_text(YAML)
    return folder


def copied(source: Path, target: Path) -> Path:
    """A copy with all times; large files, which are only ever replaced, are linked where the disk is the same."""

    def copy(one: str, other: str) -> None:
        if Path(one).stat().st_size > 1 << 20 and Path(one).stat().st_dev == Path(other).parent.stat().st_dev:
            os.link(one, other)
        else:
            shutil.copy2(one, other)

    return shutil.copytree(source, target, copy_function=copy, dirs_exist_ok=True)


def contents(
    folder: Path, volatile: frozenset[str] = VOLATILE, known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Name -> content of every file that is not hidden, without what differs between two unbroken chains.

    Args:
        known: `names` of files that have been changed since records told their hashes.
    """
    hashes = {**names(folder), **(known or {})}
    return {name: _content(path, hashes, volatile) for name, path in _files(folder).items()}


def names(folder: Path) -> dict[str, str]:
    """Hash -> name of every file that is not hidden; of the same content, the first."""
    return {known_sha256(path): name for name, path in reversed(_files(folder).items())}


def _files(folder: Path) -> dict[str, Path]:
    unseen = set(hidden(folder))
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in files.items() if name not in unseen}


def hidden(folder: Path) -> list[str]:
    """Files and folders with a leading dot, and what is in these; no stage may leave any."""
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(str(path) for path in paths if any(part.startswith(".") for part in path.parts))


def differing(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """Names of files that are on one side only, or differ."""
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def _content(path: Path, hashes: dict[str, str], volatile: frozenset[str]) -> str:
    try:
        if path.suffix == ".json":
            value = json.loads(path.read_bytes())
            if isinstance(value, dict) and "self_sha256" in value:
                read_record(path)
            return json.dumps(_plain(value, hashes, volatile))
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            return json.dumps([_plain(json.loads(line), hashes, volatile) for line in lines])
        if path.name == "final_comparison.csv":
            return pd.read_csv(path, dtype=str).drop(columns="ms_per_sample").to_csv()
        if path.name == "final_comparison.md":  # The last column of its tables: milliseconds per sample.
            return re.sub(r"\| \d+\.\d+ \|$", "| ms |", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    except ValueError:
        pass  # Damaged: then it is compared by its bytes.
    return known_sha256(path)


def _plain(value: Any, hashes: dict[str, str], volatile: frozenset[str]) -> Any:
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in volatile}
        if "ms_per_sample" in value:
            kept.pop("samples", None)  # The times that its median was taken of.
        return {key: _plain(item, hashes, volatile) for key, item in kept.items()}
    if isinstance(value, list):
        return [_plain(item, hashes, volatile) for item in value]
    if isinstance(value, str) and HASH.fullmatch(value):
        return f"SHA-256 of {hashes[value]}" if value in hashes else value
    return value
