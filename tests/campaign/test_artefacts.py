"""Files that one stage leaves and another reads, damaged at random: noticed by name, or without any effect."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from campaign.chain import CONFIG, PIPELINE, SHARE, STAGES, configured, contents, copied, differing, names, rng, run
from campaign.forks import Outcome, call, stage

pytestmark = [pytest.mark.campaign, pytest.mark.slow]

EXPORTED = "outputs/exported"
PREDICT = ("predict", "data/raw/files/p10", "--run", "outputs/student", "--out", "outputs/asked", "--overlays")
EXPORT = ("export", "--run", "outputs/student", "--to", "outputs/second")
TRAIN = ("train_cnn", *CONFIG, "--run_name", "second", "--set", "training.epochs=1")
DISTIL = ("distillation", *CONFIG, "--run_name", "second", "--set", "distillation.epochs=1")
TUNE = ("lfm_finetune", *CONFIG, "--run_name", "second")
RESUME = ("train_cnn", *CONFIG, "--resume")
PREPARE, MAPS, COMPARE, FAILURES, EXPLAIN, CACHE = (
    STAGES[name]
    for name in (
        "prepare_images",
        "evaluate_cnn",
        "compare_models",
        "failure_analysis",
        "explain_report",
        "cache_teacher_outputs",
    )
)
EVALUATE = (*MAPS, "--without_maps")
CHECK_SUMS = ("sha256sum",)
"""As the export's page says."""
BASE = ("chat_template.jinja", "config.json", "model.safetensors", "preprocessor_config.json")
READERS = {
    "data/made/manifest.csv": (PREPARE, EVALUATE, TRAIN, EXPLAIN),
    "data/made/reports.csv": (EXPLAIN, FAILURES, TUNE),
    "data/made/splits.json": (EVALUATE, PIPELINE),
    "data/made/images_32.npy": (EVALUATE, TRAIN, PIPELINE),
    "data/made/images_32.json": (EVALUATE, TRAIN, PIPELINE),
    "data/raw/masks/**/Support_Devices.png": (MAPS, FAILURES),
    "outputs/cnn/config.json": (EVALUATE, COMPARE),
    "outputs/cnn/training.json": (EVALUATE, COMPARE, PIPELINE),
    "outputs/cnn/best_model.safetensors": (EVALUATE, DISTIL),
    "outputs/student/best_student.safetensors": (PREDICT, EXPORT),
    "outputs/cnn/last/state.safetensors": (RESUME,),
    "outputs/cnn/metrics.jsonl": (RESUME,),
    "outputs/student/predictions.csv": (COMPARE, FAILURES),
    "outputs/student/operating_points.json": (COMPARE, PREDICT, EXPORT),
    "outputs/student/test_results.json": (COMPARE, EXPORT),
    "outputs/student/inference.json": (PREDICT, FAILURES, EXPORT),
    "outputs/student/localization.json": (EXPORT,),
    "outputs/student/cost.json": (COMPARE, EXPORT),
    "outputs/student/failure_analysis/failures.json": (PIPELINE,),
    "outputs/comparison_trial/final_comparison.json": (PIPELINE,),
    "outputs/cnn/pipeline.json": (PIPELINE,),
    "outputs/teacher/teacher.json": (EXPLAIN, COMPARE),
    "outputs/teacher/adapter_weights/adapters.safetensors": (EXPLAIN, CACHE),
    "outputs/teacher/adapter_weights/adapter_config.json": (EXPLAIN, CACHE),
    "outputs/teacher/teacher_soft_labels.npy": (DISTIL,),
    "outputs/teacher/teacher_study_ids.json": (DISTIL,),
    **{f"data/tiny/{name}": (EXPLAIN, TUNE) for name in (*BASE, "tokenizer.json", "tokenizer_config.json")},
    **{f"{EXPORTED}/{name}": (CHECK_SUMS,) for name in ("model.safetensors", "operating_points.json", "SHA256SUMS")},
}
"""Each kind of file, and the stages that read it."""


def cut(content: bytes, draw: np.random.Generator) -> bytes:
    """The beginning only, or nothing."""
    return content[: int(draw.integers(len(content)))]


def flipped(content: bytes, draw: np.random.Generator) -> bytes:
    """One bit the other way."""
    at = int(draw.integers(len(content)))
    return content[:at] + bytes([content[at] ^ (1 << int(draw.integers(8)))]) + content[at + 1 :]


def zeroed(content: bytes, draw: np.random.Generator) -> bytes:
    """A block of 64 bytes, as disks and memory lose them, is zero."""
    at = 64 * int(draw.integers((len(content) + 63) // 64))
    return content[:at] + bytes(len(content[at : at + 64])) + content[at + 64 :]


DAMAGE: tuple[Callable[[bytes, np.random.Generator], bytes], ...] = (cut, flipped, zeroed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """What the pipeline leaves, an export and predictions."""
    folder = configured(tmp_path_factory.mktemp("whole") / "whole")
    for command in (PIPELINE, STAGES["export"], STAGES["predict"]):
        ended = run(folder, *command)
        assert ended.status == 0, ended.said
    return folder


@pytest.fixture(scope="module")
def stopped(whole, tmp_path_factory) -> Path:
    """The same, but the training of the CNN was killed after it had saved a state to resume from."""
    folder = tmp_path_factory.mktemp("stopped") / "stopped"
    for at in range(40, 0, -3):
        shutil.rmtree(copied(whole, folder) / "outputs" / "cnn")
        killed = run(folder, *STAGES["train_cnn"], at=at).status == -9
        if killed and (folder / "outputs/cnn/last/state.safetensors").exists():
            return folder
        shutil.rmtree(folder)
    raise AssertionError("no training was stopped between its first saved state and its end")


def _read(folder: Path, command: tuple[str, ...]) -> Outcome:
    if command is PIPELINE:  # May train again, which rounds alike only in processes that begin alike.
        ended = run(folder, *command)
        return Outcome(
            "traceback" if "Traceback" in ended.said else "refusal" if ended.status else "answer", said=ended.said
        )
    if command is not CHECK_SUMS:
        return call(stage, folder, *command, seconds=120)
    done = subprocess.run([*command, "-c", "SHA256SUMS"], cwd=folder / EXPORTED, capture_output=True, text=True)
    return Outcome("refusal" if done.returncode else "answer", said=done.stdout + done.stderr)


def _verdict(outcome: Outcome, name: str, changed: list[str]) -> str:
    """`named`, `mismatch` (with another file, which is named), `harmless`, or what is wrong."""
    if outcome.kind == "refusal":
        if "FAILED" in outcome.said:  # `sha256sum`, of this file or, where the list of sums is hurt, of another.
            return "named" if f"{name}: FAILED" in outcome.said else "mismatch"
        sentence = f"\n{outcome.said}".rpartition("\nerror: ")[2]
        return "named" if name in sentence else "mismatch" if re.search(r"(data|outputs)/", sentence) else "unnamed"
    if outcome.kind == "answer":
        # A pipeline says what is not as it was left, and makes it again.
        named = any(name in line for line in outcome.said.splitlines() if "runs (" in line or "WARNING" in line)
        return ("named" if named else "silent") if changed else "harmless"
    return outcome.kind


GRAVITY = ("harmless", "named", "mismatch", "unnamed", "silent", "traceback", "died", "hang")


@pytest.mark.parametrize("kind", READERS)
def test_damage_is_noticed_by_name_or_has_no_effect(whole, stopped, counts, tmp_path, kind):
    base = stopped if READERS[kind] == (RESUME,) else whole
    damaged = sorted(base.glob(kind))[0]
    name, content, known = str(damaged.relative_to(base)), damaged.read_bytes(), names(base)
    faults, expected, row = [], {}, counts[kind]

    def read(command: tuple[str, ...], bad: bytes) -> tuple[Outcome, dict[str, str]]:
        folder = copied(base, tmp_path / "read")
        (folder / name).unlink()
        (folder / name).write_bytes(bad)
        outcome = _read(folder, command)
        left = contents(folder, known=known) if outcome.kind == "answer" else {}
        shutil.rmtree(folder)
        return outcome, left

    for number, damage in enumerate(DAMAGE[: max(1, round(SHARE * len(DAMAGE)))]):
        bad = damage(content, rng("artefact", kind, number))
        if bad == content:  # A block of zeros, zeroed.
            bad = flipped(content, rng("artefact", kind, number, "again"))
        verdicts = []
        for command in READERS[kind]:
            outcome, left = read(command, bad)
            if outcome.kind == "answer" and command not in expected:
                sound, expected[command] = read(command, content)
                assert sound.kind == "answer", sound.said
            changed = [one for one in differing(left, expected[command]) if one != name] if left else []
            verdicts.append(_verdict(outcome, damaged.name, changed))
            if verdicts[-1] not in GRAVITY[:3]:
                faults.append((damage.__name__, command[0], verdicts[-1], changed, outcome.said[-500:]))
        row["faults"] += 1
        row[max(verdicts, key=GRAVITY.index)] += 1
    assert faults == []
