"""The runs and comparisons under an outputs folder, those that cannot be used with the reason."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import RecordError, read_record
from mlx_cxr.core.runs import WEIGHTS, open_run
from mlx_cxr.evaluation import comparison, operating_points
from mlx_cxr.evaluation.external import cohorts_of, results_path
from mlx_cxr.evaluation.operating_points import read_operating_points
from mlx_cxr.inference.evaluated_run import EvaluatedRun

CNN, STUDENT, TEACHER, CONTROL, WORDS, UNKNOWN = KINDS = (
    *("CNN", "student", "teacher", "control", "bag of words", "unknown"),
)
_FILES = (
    *("config.json", "training.json", "test_results.json", "operating_points.json", "inference.json"),
    *(*WEIGHTS.values(), "teacher.json"),
)
_COMPARED = "final_comparison.json"


@dataclass(frozen=True)
class RunEntry:
    """A run folder.

    Attributes:
        folder: the run's.
        kind: of `KINDS`.
        stamp: of its files, other when one of them changed.
        synthetic: its data were drawn by a program.
        evaluated: when, as text that sorts; empty where that is not known.
        error: why it cannot be used, in a sentence; empty where it can.
    """

    folder: Path
    kind: str
    stamp: str
    synthetic: bool = False
    evaluated: str = ""
    error: str = ""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name


@dataclass(frozen=True)
class Comparison:
    """A comparison's folder, its `final_comparison.json`, and why that cannot be used; empty where it can."""

    folder: Path
    record: Mapping[str, Any]
    error: str = ""


@dataclass(frozen=True)
class RunIndex:
    """Runs and comparisons of an outputs folder.

    Attributes:
        outputs: the folder.
        runs: in the order of their names.
        comparisons: the newest first.
    """

    outputs: Path
    runs: tuple[RunEntry, ...]
    comparisons: tuple[Comparison, ...]

    def usable(self, *kinds: str) -> list[RunEntry]:
        """Runs of these kinds that can be used: first those of the newest comparison, then the last evaluated."""
        compared = self._compared()
        chosen = [run for run in self.runs if run.kind in kinds and not run.error]
        chosen.sort(key=lambda run: run.evaluated, reverse=True)
        return sorted(chosen, key=lambda run: (kinds.index(run.kind), compared.get(run.name, len(compared))))

    @property
    def faulty(self) -> list[RunEntry]:
        """Runs that cannot be used."""
        return [run for run in self.runs if run.error]

    def _compared(self) -> dict[str, int]:
        """Run to its place among the models of the newest comparison."""
        newest = next((one.record for one in self.comparisons if not one.error), {"models": []})
        return {model["run"]: place for place, model in enumerate(newest["models"])}


def scan(outputs: Path) -> RunIndex:
    """Look at every folder under `outputs`; a run is read again only when its files changed."""
    folders = sorted(path.parent for path in outputs.glob("*/config.json"))
    runs = tuple(_entry(str(folder), stamp_of(folder)) for folder in folders)
    compared = [_comparison(path.parent, _stamp([path])) for path in sorted(outputs.glob(f"comparison_*/{_COMPARED}"))]
    compared.sort(key=lambda one: "" if one.error else one.record["provenance"]["started"], reverse=True)
    return RunIndex(outputs, runs, tuple(compared))


def stamp_of(folder: Path) -> str:
    """A word that changes with the files of a run."""
    return _stamp([*(folder / name for name in _FILES), *(results_path(folder, name) for name in cohorts_of(folder))])


def _stamp(paths: list[Path]) -> str:
    parts = []
    for path in paths:
        try:
            known = path.stat()
        except OSError:
            continue
        parts.append(f"{path.name} {known.st_mtime_ns} {known.st_size}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@st.cache_resource(max_entries=200, show_spinner="Looking at the runs …")
def _entry(folder: str, stamp: str) -> RunEntry:
    path, kind = Path(folder), UNKNOWN
    try:
        kind = open_run(path).kind
        if kind in (TEACHER, WORDS):
            made = read_operating_points(path / operating_points.FILE)[1]
            evaluated = read_record(path / "test_results.json")["provenance"]["started"]
            return RunEntry(path, kind, stamp, made["synthetic"], evaluated)
        run = EvaluatedRun.open(path)
        return RunEntry(path, kind, stamp, run.synthetic, run.results["provenance"]["started"])
    except (UserError, OSError) as error:
        return RunEntry(path, kind, stamp, error=str(error))
    except (KeyError, TypeError, AttributeError) as error:
        return RunEntry(
            path, kind, stamp, error=f"{path}: a record of the run cannot be used ({error!r}); evaluate it again"
        )


@st.cache_resource(max_entries=50, show_spinner=False)
def _comparison(folder: Path, stamp: str) -> Comparison:
    path = folder / _COMPARED
    try:
        record = read_record(path)
        if record["schema"] != comparison.SCHEMA:
            raise RecordError(
                f"{path} has schema {record['schema']}, not {comparison.SCHEMA}; run compare_models again"
            )
        for model in record["models"]:
            model["run"], model["role"]
        record["provenance"]["started"]
    except (UserError, OSError) as error:
        return Comparison(folder, {}, str(error))
    except (KeyError, TypeError) as error:
        return Comparison(folder, {}, f"{path} cannot be used ({error!r}); run compare_models again")
    return Comparison(folder, record)
